"""Heads: small networks on the target's last hidden state draft, all requests' trees grown in lockstep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from graft.compiler.drafting import Drafter, Drafting, HiddenRows, Target, TreePolicy
from graft.compiler.errors import CheckpointError, PlanError
from graft.compiler.passing import Pass
from graft.passes.clover_heads import CloverHeads
from graft.passes.eagle_heads import EagleHeads
from graft.passes.heads.dialects import kind_of, read_config
from graft.passes.hydra_heads import HydraHeads
from graft.passes.medusa_heads import MedusaHeads
from graft.runtime.decoder import Decoder
from graft.runtime.drafters.feature_heads import FeatureHeads
from graft.runtime.drafters.head_levels import (
    HeadsDrafting,
    ParallelHeads,
    PrefixedHeads,
    RecurrentHeads,
    SequentialHeads,
)
from graft.runtime.drafters.text_rows import DraftTokens

PASSES: dict[str, Callable[[Path, str], Pass]] = {
    "medusa": MedusaHeads,
    "hydra": HydraHeads,
    "eagle-3": EagleHeads,
    "clover-2": CloverHeads,
}
"""What adds heads of a kind."""


@dataclass(frozen=True)
class Heads(Drafter):
    """Trained draft heads in a folder: Medusa (2401.10774), Hydra or Hydra++ (2402.05109), EAGLE-3 (2503.01840),
    Clover-2 (2408.00264).

    What the heads propose is a function of the text, so the kind is deterministic: greedy decoding and sampling both
    keep the target's distribution.
    """

    folder: Path
    """config.json and the tensors: what `python -m graft train-heads` writes, or a published checkpoint."""
    function: str = "heads"
    """Name of the heads in the program; two sets of heads need two names."""
    candidates: int = 8
    """How many tokens per place a tree may choose from."""

    def __post_init__(self) -> None:
        if not 1 <= self.candidates <= 64 or not self.function.isidentifier():
            raise PlanError(
                "The options of heads are not right.",
                expected="candidates of 1 to 64, and an identifier for function",
                found=f"candidates {self.candidates}, function {self.function!r}",
                where="Heads",
            )

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The pass for the kind of heads that the folder holds. Raises CheckpointError where it holds none."""
        kind = kind_of(self.folder)
        if kind not in PASSES:
            raise CheckpointError(
                "draft heads of a kind that graft does not know",
                expected=", ".join(PASSES),
                found=kind,
                where=self.folder,
            )
        return (PASSES[kind](self.folder, self.function),)

    @property
    def reads_hidden(self) -> HiddenRows:
        """Layers with a KV of their own read the whole text, also where the folder is gone and only the compiled heads
        are left."""
        try:
            data, kind = read_config(self.folder), kind_of(self.folder)
        except CheckpointError:
            return "all"
        layered = kind not in ("medusa", "hydra") or data.get("prefix") or "prefix" in str(data.get("hydra_head_arch"))
        return "all" if layered else "rows"

    def open(self, target: Target, policy: TreePolicy) -> Drafting:
        """See `Drafter.open`; raises PlanError if the model was not compiled with these heads."""
        functions, name = target.functions, self.function
        levels: list[Decoder] = [functions[name]] if name in functions else []
        while f"{name}_{len(levels)}" in functions:
            levels.append(functions[f"{name}_{len(levels)}"])
        if not levels:
            raise PlanError(
                "the model was not compiled with these heads",
                expected=f"a function {name} or {name}_0",
                found=", ".join(functions) or "no function that drafts",
                where="Heads",
                remedy="name the heads in the plan that the model is compiled by",
            )
        says = DraftTokens(levels[0], self.candidates, target.vocabulary)
        return way_of(levels, name)(f"heads {name}", says, levels, policy)


def way_of(levels: Sequence[Decoder], name: str) -> type[HeadsDrafting] | type[FeatureHeads]:
    """How trees are grown with these functions, which say so by what they read and keep."""
    first, deeper = levels[0].function, levels[-1].function
    if first.name == name:
        return ParallelHeads
    if not first.states:
        return SequentialHeads
    if len(levels) > 1 and deeper.states:
        return FeatureHeads
    # A head of Hydra reads the hidden state of the text and all tokens behind it, a recurrent one a state and a token.
    return RecurrentHeads if len(levels) > 1 and len(deeper.row_inputs) == 1 else PrefixedHeads
