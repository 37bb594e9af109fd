"""SmolLM2-135M-Instruct in bfloat16: every drafter that brings a model part leaves the ids of plain decoding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import graft
from graft.compiled import CompiledModel
from graft.compiler.drafting import Drafter, TreePolicy
from graft.compiler.host import plain_host, speculative_host
from graft.compiler.passing import View
from graft.compiler.program import Program
from graft.compiling import assembled, decoder_of
from tests.conftest import ROOT, Prompt, RealModel

pytestmark = pytest.mark.real
PROMPTS, NEW_TOKENS, NODES = 20, 12, 4
EXIT = 3
"""Layers in front of Kangaroo's exit."""

HEADS = graft.Heads(ROOT / "examples" / "hydra-smollm2")
DROPPED = graft.DropBlock(tuple(range(5, 25, 2)), "feed-forward")
FUNCTIONS = {
    "dropped": DROPPED,
    "early": graft.EarlyExit(24),
    "parallel": graft.LayerParallel(2, keep_first=4),
    "retrieval": graft.CompressKV(selection=graft.PageMeans(unit=8), recent=16),
}
DRAWN = graft.SelfDraft(DROPPED, function="dropped", sample=True)
WITHOUT = graft.SelfDraft(DROPPED, function="dropped", sample=True, replacement=False)
ON_THE_TARGET: dict[str, tuple[list[Drafter], TreePolicy | None]] = {
    "lookup, recycle and trie": ([graft.Lookup(), graft.Recycle(), graft.Trie()], None),
    "hydra heads": ([HEADS], None),
    "hydra heads with tables": ([HEADS, graft.Lookup(), graft.Recycle()], None),
    **{name: ([graft.SelfDraft(one, function=name)], graft.Chain()) for name, one in FUNCTIONS.items()},
    "best first, as EAGLE-2": ([graft.SelfDraft(DROPPED, function="dropped")], graft.BestFirst()),
    "best first of draws, as DySpec": ([DRAWN], graft.BestFirst()),
    "branches of draws, as RSD-C": ([WITHOUT], graft.Fixed.branching(2, 1)),
    "a stochastic beam, as RSD-S": ([WITHOUT], graft.StochasticBeam(2)),
}


class Real:
    """The model, compiled once with every function that drafts on its weights, and the prompts as one batch."""

    def __init__(self, real: RealModel, prompts: list[Prompt]) -> None:
        chat: Any = real.tokenizer.apply_chat_template
        messages = ([{"role": "user", "content": one.turns[0]}] for one in prompts)
        texts = sorted((chat(one, add_generation_prompt=True, tokenize=False) for one in messages), key=len)
        half = texts[: max(PROMPTS, len(texts) // 2)]
        chosen = [half[index * len(half) // PROMPTS] for index in range(PROMPTS)]
        self.batch = real.tokenizer(
            chosen, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        self.model = copy.deepcopy(real.model).bfloat16()
        drafts = [graft.SelfDraft(one, function=name) for name, one in FUNCTIONS.items()]
        self.base = graft.compile(self.model, graft.Plan(draft=[HEADS, *drafts]), backend="cpp")
        self.panels = {name: one for part in self.base.executables for name, one in part.panels.items()}

    def texts(self, fast: CompiledModel) -> list[list[int]]:
        """Ids of prompts and continuations."""
        return fast.generate(**self.batch, max_new_tokens=NEW_TOKENS, do_sample=False).tolist()

    def compiled(self, drafters: list[Drafter], policy: TreePolicy | None = None) -> CompiledModel:
        """What compile() makes of a plan with these drafters, whose functions are there."""
        program = Program(self.base.program.functions, speculative_host() if drafters else plain_host())
        return assembled(program, self.plan(drafters, policy), self.base.decoder, self.base.generator.face)

    def lowered(self, program: Program, drafters: list[Drafter]) -> CompiledModel:
        """The same of other functions on the target's weights."""
        known = self.base.decoder
        decoder = decoder_of(program, known.vocabulary, known.max_positions, "cpp", self.panels)
        return assembled(program, self.plan(drafters, None), decoder, self.base.generator.face)

    def plan(self, drafters: list[Drafter], policy: TreePolicy | None) -> graft.Plan:
        """A full tree at every step."""
        return graft.Plan(draft=drafters, tree=graft.Tree(NODES, policy), controller=graft.FixedBudget())

    def adapter(self, folder: Path) -> str:
        """Kangaroo's adapter as training starts: the attention block behind the exit, and the final norm."""
        model, names = self.model.model, ("input_layernorm.weight", *(f"self_attn.{x}_proj.weight" for x in "qkvo"))
        tensors = {f"layers.0.{name}": model.layers[EXIT].get_parameter(name) for name in names}
        save_file({**tensors, "norm.weight": model.norm.weight}, folder / "adapter.safetensors")
        return str(folder / "adapter.safetensors")


@pytest.fixture(scope="module")
def real(smollm2: RealModel, prompts: list[Prompt]) -> Real:
    return Real(smollm2, prompts)


@pytest.fixture(scope="module")
def plain(real: Real) -> list[list[int]]:
    """Every text decoded token by token."""
    return real.texts(real.compiled([]))


@pytest.mark.parametrize("name", ON_THE_TARGET)
def test_drafts_on_the_target_leave_every_id(real: Real, plain: list[list[int]], name: str) -> None:
    fast = real.compiled(*ON_THE_TARGET[name])
    assert real.texts(fast) == plain
    assert fast.stats["accepted"] > 0


@pytest.mark.parametrize("name", ["layer-skip", "del", "kangaroo"])
def test_a_target_cut_at_an_exit_leaves_every_id(real: Real, plain: list[list[int]], name: str, tmp_path: Path) -> None:
    drafters: dict[str, Drafter] = {"layer-skip": graft.LayerSkip(24), "del": graft.DEL((12, 24))}
    drafter = drafters.get(name) or graft.Kangaroo(real.adapter(tmp_path), EXIT, eta=0.0)
    program = Program({"forward": real.base.program["forward"].copy()}, speculative_host())
    for one in drafter.passes:
        one.run(View(program, one.pass_name()))
    fast = real.lowered(program, [drafter])
    assert real.texts(fast) == plain
    assert fast.stats["drafted"] > 0


def test_a_draft_model_leaves_every_id(real: Real, plain: list[list[int]]) -> None:
    function = real.base.program["dropped"].copy()
    function.name = "forward"
    other = real.lowered(Program({"forward": function}, plain_host()), [])
    fast = real.compiled([graft.DraftModel(other)], graft.Chain())
    assert real.texts(fast) == plain
    assert fast.stats["accepted"] > 0
