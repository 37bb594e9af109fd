"""skip-ffn: the listing in its docstring, the model's own modules as an oracle, and that what is skipped is not run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import graft
from graft.codegen import aten_rows
from graft.codegen.aten import AtenExecutable
from graft.codegen.cpp.executable import CppExecutable
from graft.codegen.executable import Executable
from graft.codegen.kernel_ir import AtenKernel, Kernel, MatmulKernel
from graft.compiler.capture import capture
from graft.compiler.errors import PassError, PlanError
from graft.compiler.passing import Pass
from graft.compiler.pipeline import run_passes
from graft.compiler.program import DENSE, Function, Program
from graft.compiler.trunk import find_trunk
from graft.passes import skip_ffn
from graft.passes.skip_ffn import SkipFFN
from tests.codegen.functions import random_states
from tests.families import build
from tests.passes.listings import Sheet, listings, outputs, run, transform
from tests.programs import USUAL

OPTIONS = {"similarity": 0.9, "skip": 1, "cold_first": 0, "cold_last": 0, "warmup": 4}


def program_of(model: PreTrainedModel, passes: Sequence[Pass]) -> Program:
    """The model's program after the passes."""
    captured = capture(model)
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    run_passes(program, passes, sample=[range(3, 12)])
    return program


def sheet() -> Sheet:
    """A sheet on which norm, feed_forward and cosine are known, and h0 is the embedded tokens."""
    made = Sheet(DENSE, {"table": (11, 8), "w_up": (12, 8), "w_down": (8, 12), "scale": (8,)})
    aten = torch.ops.aten

    def cosine(x: Any, y: Any) -> Any:
        wide = [made["_to_copy"](value, dtype=torch.float32) for value in (x, y)]
        total = lambda a, b: made.graph.call_function(aten.sum.dim_IntList, (made["mul"](a, b), [-1], True))  # noqa: E731
        root = lambda a: made.graph.call_function(aten.sqrt.default, (total(a, a),))  # noqa: E731
        lengths = made["mul"](root(wide[0]), root(wide[1]))
        return made.graph.call_function(aten.div.Tensor, (total(*wide), lengths))

    made["norm"] = lambda x: made["mul"](x, made["scale"])
    made["feed_forward"] = lambda x: made["linear"](made["silu"](made["linear"](x, made["w_up"])), made["w_down"])
    made["cosine"] = cosine
    made["h0"] = made["embedding"](made["table"], made["tokens"])
    return made


def model_of(made: Sheet, listing: str) -> Function:
    made.run(listing)
    return made.function(made["linear"](made["h3"], made["table"]), made["h3"])


def test_the_docstring_shows_what_it_does() -> None:
    before, after = listings(skip_ffn)
    function, expected = model_of(sheet(), before), model_of(sheet(), after)
    assert transform(function, SkipFFN(**OPTIONS)).matches == 2
    assert outputs(function) == outputs(expected)
    for found, wanted in zip(run(function), run(expected), strict=True):
        torch.testing.assert_close(found, wanted)


class Latched(nn.Module):
    """A layer's feed-forward as the paper's pseudo-code has it, with what is left to skip in the context."""

    def __init__(self, mlp: nn.Module, context: dict[str, Tensor], options: SkipFFN, hot: bool) -> None:
        super().__init__()
        self.mlp, self.context, self.options, self.hot = mlp, context, options, hot

    def forward(self, normed: Tensor) -> Tensor:
        out, left = self.mlp(normed), self.context["left"]
        if not self.hot:
            return out
        late = self.context["positions"] >= self.options.warmup
        left = left * late
        running = left == 0
        out = out * running[..., None]
        x = self.context["stream"]
        alike = torch.nn.functional.cosine_similarity(x, x + out, dim=-1) >= self.options.similarity
        fresh = torch.where(running & alike, self.options.skip, 0)
        self.context["left"] = torch.where(running, fresh, left - 1)
        self.context["ran"] += running.sum()
        return out


@pytest.mark.parametrize("skip", [2, 9])
def test_it_skips_what_the_papers_procedure_skips(skip: int) -> None:
    model = build("llama", num_hidden_layers=7)
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 0.3  # so that feed-forwards change the stream a little
    options = SkipFFN(similarity=0.993, skip=skip, cold_first=1, cold_last=1, warmup=3)
    program = program_of(model, [*USUAL[:1], options])
    tokens = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9).expand(2, 9).contiguous()
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        found = program["forward"].module()(tokens, positions)[0]
    context = {"left": torch.zeros(2, 9), "positions": positions, "ran": torch.zeros(())}
    for number, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, inputs: context.__setitem__("stream", inputs[0])
        )
        layer.mlp = Latched(layer.mlp, context, options, 1 <= number < 6)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
    assert 18 * 2 < context["ran"] < 18 * 5  # some were skipped, and not all
    assert (found - expected).abs().max() < 1e-5 < (found - plain).abs().max()


def test_the_trunk_is_found_behind_it() -> None:
    program = program_of(build("llama", num_hidden_layers=4), [*USUAL[:1], SkipFFN(similarity=0.5)])
    trunk = find_trunk(program["forward"].graph)
    assert [block.kind for block in trunk.blocks] == ["attention", "feed-forward"] * 4


@pytest.fixture(scope="module")
def lowered() -> CppExecutable:
    """A model whose feed-forwards behind the first hot one are all skipped, beyond the warm-up."""
    options = SkipFFN(similarity=-1.0, skip=9, cold_first=1, cold_last=1, warmup=4)
    program = program_of(build("llama", num_hidden_layers=5), [*USUAL[:1], options, *USUAL[1:]])
    with torch.no_grad():
        return CppExecutable(program["forward"])


def call(executable: Executable, positions: list[int]) -> tuple[Tensor, ...]:
    """One row of each of two slots at these positions."""
    lengths = torch.tensor(positions)
    inputs = (torch.tensor([5, 6]), lengths, torch.tensor([0, 1]), torch.tensor([-1, -1]), lengths, torch.arange(2))
    return executable(*inputs, *random_states(executable.function))


def writes(executable: CppExecutable, kernel: Kernel, positions: list[int], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the place of the kernel's result holds something else behind the kernel than in front of it."""
    kernels, held = executable.cut.kernels, []
    for count in (kernels.index(kernel), kernels.index(kernel) + 1):
        executable.arena.zero_()
        with monkeypatch.context() as patch:
            patch.setattr(executable, "segments", [(False, list(kernels[:count]))])
            call(executable, positions)
        held.append(executable.array(kernel.arrays[1].name, {})[:2].clone())
    return not torch.equal(*held)


def test_a_feed_forward_that_every_row_skips_is_not_run_and_one_that_a_row_needs_is(
    lowered: CppExecutable, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = [kernel for kernel in lowered.cut.kernels if kernel.guard and isinstance(kernel, MatmulKernel)]
    assert len(products) == 4  # of two of three hot feed-forwards gate with up, and down
    assert [bool(record.guard) for record in lowered.kernels] == [bool(kernel.guard) for kernel in lowered.cut.kernels]
    assert lowered.source.count("if (!step.any(") == 3  # gate with up, activation, down: one code for both layers
    for product in products:
        assert not writes(lowered, product, [9, 9], monkeypatch)
        assert writes(lowered, product, [9, 2], monkeypatch)
    # The first slot's row is the same whether the second one's skips or not.
    skipped, needed = call(lowered, [9, 9]), call(lowered, [9, 2])
    assert all(torch.equal(one[0], two[0]) for one, two in zip(skipped, needed, strict=True))


def test_what_was_skipped_is_counted_and_aten_counts_the_same(lowered: CppExecutable) -> None:
    aten = AtenExecutable(lowered.function)
    for executable in (lowered, aten):
        executable.forget_skips()
        for positions in ([9, 9], [9, 2], [1, 2], [8, 9]):
            call(executable, positions)
    counted = [(1, 4, 2, 8, 5)] * 2  # of four calls two were needed by no row; of their eight rows five went past
    shown = [(one.regions, one.calls, one.skipped_calls, one.rows, one.skipped_rows) for one in lowered.skips]
    assert shown == counted and lowered.skips == aten.skips
    config = build("llama").config
    assert [one.weights for one in aten.skips] == [3 * 4 * config.hidden_size * config.intermediate_size] * 2
    lowered.profile(1, 8)
    assert lowered.skips == aten.skips  # what is measured does not count
    lowered.forget_skips()
    assert lowered.skips[0].calls == 0


def test_a_skipping_model_generates_what_it_says_with_drafts_and_without() -> None:
    model = build("llama", num_hidden_layers=5)
    target = [SkipFFN(similarity=0.9, skip=2)]
    tokens = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    plain = graft.compile(model, graft.Plan(target=target)).generate(tokens, max_new_tokens=24)
    drafted = graft.compile(model, graft.Plan(target=target, draft=[graft.Lookup(), graft.Recycle()]))
    assert torch.equal(drafted.generate(tokens, max_new_tokens=24), plain)
    counts = drafted.decoder.executable.skips
    assert len(counts) == 2 and counts[0].rows >= 12 + 23 and 0 < counts[0].calls <= 24
    assert "regions skipped whole" in drafted.report()


def test_routers_that_aten_runs_are_run_for_the_rows_that_need_them(monkeypatch: pytest.MonkeyPatch) -> None:
    options = SkipFFN(similarity=-1.0, skip=9, cold_first=1, cold_last=1, warmup=4)
    program = program_of(build("phimoe", num_hidden_layers=4), [*USUAL[:1], options, *USUAL[1:]])
    with torch.no_grad():
        executable = CppExecutable(program["forward"])
    guarded = [kernel for kernel in executable.cut.kernels if kernel.guard and isinstance(kernel, AtenKernel)]
    ran: list[Any] = []
    evaluate = aten_rows.evaluate
    monkeypatch.setattr(aten_rows, "evaluate", lambda node, *rest: ran.append(node) or evaluate(node, *rest))
    router = guarded[0].nodes[-1]
    found = []
    for positions, rows in (([9, 9], 0), ([9, 2], 1), ([1, 2], 2)):
        ran.clear()
        found.append(call(executable, positions))
        assert ran.count(router) == rows
    assert all(torch.equal(one[0], two[0]) for one, two in zip(*found[:2], strict=True))


def test_bad_options_are_refused() -> None:
    with pytest.raises(PlanError, match="out of range"):
        SkipFFN(similarity=0.9, skip=0)
    with pytest.raises(PassError, match="no feed-forward that could be skipped"):
        program_of(build("llama", num_hidden_layers=3), [*USUAL[:1], SkipFFN(similarity=0.9)])
