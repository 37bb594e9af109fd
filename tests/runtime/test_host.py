"""The host program: its text, its checks, and that the text is what runs."""

from __future__ import annotations

import pytest

from graft.compiler import host as host_module
from graft.compiler.errors import CheckError
from graft.compiler.host import Call, Host, If, While, plain_host, speculative_host
from graft.runtime.run import PRIMITIVES

SPECULATIVE = """\
def generate(requests):
    while active(requests):
        trees = draft(requests)
        rows = lay_out(requests, trees)
        logits = forward(rows)
        outcomes = verify(requests, logits, trees)
        commit(requests, outcomes)
"""


def test_the_speculative_program_prints_as_python() -> None:
    assert str(speculative_host()) == SPECULATIVE


def test_the_plain_program_is_the_speculative_one_without_drafts() -> None:
    assert "draft" not in str(plain_host())
    assert plain_host().calls == ["active", "lay_out", "forward", "verify", "commit"]


def test_the_runtime_provides_every_primitive_the_compiler_promises() -> None:
    assert set(PRIMITIVES) == set(host_module.PRIMITIVES)


@pytest.mark.parametrize("program", [plain_host(), speculative_host()])
def test_the_printed_text_decodes_with_a_fake_model(program: Host) -> None:
    """The model counts upwards; the drafter is right about one token and wrong about the next."""
    text, steps = [3], []

    def lay_out(requests: list[int], trees: tuple[int, ...] = ()) -> list[int]:
        return [requests[-1], *trees]

    def verify(requests: list[int], logits: list[int], trees: tuple[int, ...] = ()) -> list[int]:
        accepted = [drafted for drafted, best in zip(trees, logits, strict=False) if drafted == best]
        return [*accepted, logits[len(accepted)]]

    def commit(requests: list[int], outcomes: list[int]) -> None:
        requests.extend(outcomes)
        steps.append(len(outcomes))

    scope = {
        "active": lambda requests: len(requests) < 9,
        "draft": lambda requests: (requests[-1] + 1, 0),
        "lay_out": lay_out,
        "forward": lambda rows: [row + 1 for row in rows],
        "verify": verify,
        "commit": commit,
    }
    exec(str(program), scope)
    scope["generate"](text)
    assert text[:9] == list(range(3, 12))
    assert steps == ([2] * 4 if "draft" in program.calls else [1] * 8)


def test_load_runs_what_is_printed() -> None:
    seen: list[str] = []
    program = Host((If(Call("ready", ("x",)), (Call("left", ("x",)),), (Call("right", ("x",)),)),), "go", ("x",))
    namespace = {"ready": bool, "left": lambda x: seen.append("left"), "right": lambda x: seen.append("right")}
    go = program.load(namespace)
    go(1)
    go(0)
    assert seen == ["left", "right"]
    assert str(program) == "def go(x):\n    if ready(x):\n        left(x)\n    else:\n        right(x)\n"


def test_an_empty_body_prints_as_pass() -> None:
    assert str(Host((While(Call("active", ("requests",)), ()),))).endswith("        pass\n")


def test_a_call_of_what_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(CheckError, match="found: forward"):
        plain_host().check({"draft_forward": None})


def test_a_name_read_before_it_has_a_value_is_refused() -> None:
    with pytest.raises(CheckError, match="found: logits"):
        Host((Call("commit", ("requests", "logits")),)).check(())


@pytest.mark.parametrize("rest", [(), (Call("forward", (), ("other",)),)])
def test_a_value_that_only_one_branch_gives_is_refused(rest: tuple[Call, ...]) -> None:
    give = Call("forward", (), ("x",))
    program = Host((If(Call("active", ("requests",)), (give,), rest), Call("commit", ("x",))))
    with pytest.raises(CheckError, match="found: x"):
        program.check({"forward"})
    Host((If(Call("active", ("requests",)), (give,), (give,)), Call("commit", ("x",)))).check({"forward"})


def test_a_value_from_a_loop_that_may_not_run_is_refused() -> None:
    give = Call("forward", (), ("x",))
    with pytest.raises(CheckError, match="found: x"):
        Host((While(Call("active", ("requests",)), (give,)), Call("commit", ("x",)))).check({"forward"})


@pytest.mark.parametrize("word", ["a b", "import", "__class__", "x.y", "f(", ""])
def test_nothing_but_names_reaches_the_text(word: str) -> None:
    with pytest.raises(CheckError, match="only names"):
        Host((Call("forward", (), (word,)),)).check({"forward"})


def test_assigning_to_a_function_is_refused() -> None:
    with pytest.raises(CheckError, match="assigns to a function"):
        Host((Call("forward", (), ("commit",)),)).check({"forward"})
