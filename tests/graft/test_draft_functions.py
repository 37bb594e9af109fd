"""Drafters with a graph part: their functions are lowered, reached, shown and saved with the target's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import graft
from graft.compiler.building import Builder, add_parameters
from graft.compiler.canonical import aten
from graft.compiler.drafting import Context, Drafting, DraftTree, HiddenRows, Outcome, Target
from graft.compiler.nodes import cat
from graft.compiler.passing import Contract
from graft.compiler.program import Input
from graft.runtime.decoder import Decoder
from graft.runtime.drafters.merge import Merge
from tests.families import VOCABULARY, build

IDS = torch.tensor([[5, 6, 7, 8, 5, 6, 9, 7]])
OPTIONS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}


@dataclass(frozen=True)
class GuessFromHidden(graft.Pass):
    """A linear over the last hidden state and two tokens' embeddings, then the target's unembedding."""

    function: str = "guess"
    contract: ClassVar[Contract] = graft.lossless
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "kv-cache"})

    def run(self, view: graft.View) -> None:
        trunk = view.trunk
        table, hidden = trunk.embedding.args[0].target, trunk.hidden.meta["val"]
        width = int(hidden.shape[-1])
        weight = torch.randn(width, 3 * width, generator=torch.Generator().manual_seed(0)) / width
        add_parameters(view, self.function, {"mix.weight": weight.to(hidden.dtype)})
        inputs = [Input("hidden", ("N", width), hidden.dtype), Input("token_1", ("N",), torch.int64)]
        builder = Builder(view, self.function, inputs)
        parts = [builder["hidden"], builder.embed("token_1", table), builder.embed("tokens", table)]
        x = builder.linear(cat(parts), f"{self.function}.mix")
        logits = builder.wanted(x).apply(aten.linear.default, builder.parameter(trunk.unembedding.args[1].target))
        builder.finish(builder.wide(logits), x)


@dataclass(frozen=True)
class ChangesTheTarget(GuessFromHidden):
    """Says what no drafter's pass may be."""

    contract: ClassVar[Contract] = graft.approximate


@dataclass(frozen=True)
class Guess(graft.Drafter):
    """Drafts one token by the function."""

    function: str = "guess"
    reads: HiddenRows = "rows"
    changes: bool = False
    seen: Any = field(default=None, compare=False)
    """A list for what it is shown."""

    @property
    def reads_hidden(self) -> HiddenRows:
        return self.reads

    @property
    def passes(self) -> tuple[graft.Pass, ...]:
        return (ChangesTheTarget() if self.changes else GuessFromHidden(self.function),)

    def open(self, target: Target, policy: graft.TreePolicy) -> Drafting:
        return Guessing(target.functions[self.function], self.seen if self.seen is not None else [])


@dataclass
class Guessing:
    decoder: Decoder
    seen: list[Any]

    def begin(self, context: Context, prompt_best: np.ndarray | None, prompt_hidden: Tensor | None = None) -> None:
        self.seen.append((list(context.tokens), prompt_hidden))

    def propose(self, contexts: Sequence[Context], budgets: Sequence[int]) -> list[DraftTree]:
        trees = []
        for context in contexts:
            hidden = context.data["guess"]
            last = torch.tensor(context.tokens[-1:])
            rows = [last, last * 0, last * 0, last * 0 - 1, torch.tensor([0]), torch.tensor([0])]
            logits, _ = self.decoder.executable(*rows, hidden, torch.tensor(context.tokens[-2:-1]))
            trees.append(DraftTree([int(logits.argmax())], [-1], [0.5]))
        return trees

    def observe(self, context: Context, outcome: Outcome) -> None:
        assert outcome.hidden is not None and len(outcome.hidden) == 1 + len(outcome.tree)
        row = 1 + outcome.path[-1] if outcome.path else 0
        context.data["guess"] = outcome.hidden[row : row + 1]
        self.seen.append((list(context.tokens), outcome.hidden[[0, *(1 + node for node in outcome.path)]]))

    def end(self, context: Context) -> None:
        context.data.pop("guess", None)


def plan(*drafters: graft.Drafter) -> graft.Plan:
    return graft.Plan(draft=drafters, controller=graft.FixedBudget(), sample=[range(3, 9)])


@pytest.fixture(scope="module", params=["aten", "cpp"])
def guessing(request: pytest.FixtureRequest) -> tuple[graft.CompiledModel, torch.Tensor]:
    """A model whose embedding and unembedding are one parameter, given up where it is packed, and its plain text."""
    model = build("llama", tie_word_embeddings=True)
    expected = model.generate(IDS, pad_token_id=0, **OPTIONS)
    release = request.param == "cpp"
    return graft.compile(model, plan(Guess(), graft.Lookup()), backend=request.param, release=release), expected


def test_a_function_that_drafts_changes_no_token(guessing: tuple[graft.CompiledModel, Tensor]) -> None:
    fast, expected = guessing
    assert fast.generate(IDS, **OPTIONS).equal(expected)
    assert fast.stats["drafted"] > 0
    assert fast.decoder.functions["guess"].vocabulary == VOCABULARY


def test_what_several_functions_multiply_with_is_packed_once(guessing: tuple[graft.CompiledModel, Tensor]) -> None:
    fast, _ = guessing
    target, guess = (executable.panels for executable in fast.executables)
    shared = set(target) & set(guess)
    assert not target or shared
    assert all(target[name] is guess[name] for name in shared)


def test_all_functions_are_saved_and_shown(guessing: tuple[graft.CompiledModel, Tensor], tmp_path: Path) -> None:
    fast, expected = guessing
    fast.save(tmp_path / "saved")
    back = graft.load(tmp_path / "saved")
    assert back.generate(IDS, **OPTIONS).equal(expected)
    assert back.stats["accepted"] == fast.stats["accepted"]
    assert str(back.program["guess"]) == str(fast.program["guess"])
    assert "guess" in fast.report() and "def guess(" in str(fast.program)
    difference = fast.program.diff("merge-linears", "guess-from-hidden")
    assert "guess" in str(difference)
    back.save(tmp_path / "again")
    name = "weights.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_a_drafter_sees_the_hidden_states_that_a_forward_pass_gives() -> None:
    model = build("qwen3")
    seen: list[Any] = []
    fast = graft.compile(model, plan(Guess(reads="all", seen=seen), graft.Lookup()), backend="aten")
    text = fast.generate(IDS, **OPTIONS)
    with torch.no_grad():
        expected = model.model(text[:, :-1]).last_hidden_state[0]
    length = IDS.shape[1]
    (_, prompt), *steps = seen
    torch.testing.assert_close(prompt, expected[:length], atol=1e-5, rtol=1e-5)
    for tokens, hidden in steps:
        place = len(tokens) - 1
        torch.testing.assert_close(hidden, expected[place - len(hidden) : place], atol=1e-5, rtol=1e-5)
    assert sum(len(hidden) for _, hidden in steps) >= OPTIONS["max_new_tokens"] - 2


def test_two_functions_of_one_name_are_refused_with_both_owners() -> None:
    model = build("llama")
    with pytest.raises(graft.PassError, match=r"'guess'[^$]*guess-from-hidden and guess-from-hidden"):
        graft.compile(model, plan(Guess(), Guess(reads="all")), backend="aten")
    with pytest.raises(graft.PassError, match=r"'model'[^$]*the target and guess-from-hidden"):
        graft.compile(model, plan(Guess("model")), backend="aten")


def test_a_drafter_cannot_change_the_target() -> None:
    with pytest.raises(graft.PlanError, match=r"contract lossless[^$]*changes-the-target, approximate"):
        graft.compile(build("llama"), plan(Guess(changes=True)), backend="aten")


def test_merging_passes_on_what_its_parts_ask_for() -> None:
    both = Merge((graft.Lookup(), Guess(), Guess("other", "all")))
    assert both.reads_hidden == "all" and Merge((Guess(), graft.Lookup())).reads_hidden == "rows"
    assert Merge((graft.Lookup(), graft.Recycle())).reads_hidden == "no"
    assert both.passes == (GuessFromHidden(), GuessFromHidden("other"))
