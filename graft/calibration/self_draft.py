"""The draft from the model itself that promises the most tokens per second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from torch import Tensor

from graft.calibration.measuring import Progress, changed, given, predicted, run_on, table_text, tidy
from graft.compiler.drafting import Drafter
from graft.compiler.evaluate import agreement, logits_of
from graft.compiler.passing import Pass, View
from graft.compiler.program import Program, StepSeconds
from graft.compiler.spec import show
from graft.passes.add_draft import AddDraft
from graft.passes.dead_code import DeadCode
from graft.passes.drop_block import DropBlock
from graft.passes.early_exit import EarlyExit
from graft.passes.kv_cache import KVCache
from graft.passes.layer_parallel import LayerParallel
from graft.passes.merge_linears import MergeLinears
from graft.passes.split import Split
from graft.runtime.drafters.early_exits import LayerSkip
from graft.runtime.drafters.self_draft import SelfDraft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT = 256
"""Tokens of context at which steps are predicted."""


@dataclass(frozen=True)
class Tried:
    """One draft that a search tried."""

    drafter: Drafter
    agreement: float
    """Share of tokens of the text whose best follower it names."""
    draft_seconds: float
    """Predicted, of a call over one row."""
    length: int
    """Tokens to draft for the most tokens per second."""
    tokens_per_second: float
    """Predicted."""


@dataclass(frozen=True)
class Search:
    """What a search tried, best first, and what plain decoding is predicted to do."""

    tried: tuple[Tried, ...]
    plain: float
    """Tokens per second without a draft."""

    @property
    def best(self) -> Drafter | None:
        """The draft to use; None where plain decoding is predicted to be as fast as any."""
        return self.tried[0].drafter if self.tried and self.tried[0].tokens_per_second > self.plain else None

    def __str__(self) -> str:
        table = Table("draft", "agreement", "ms a token", "length", "tokens/s", box=box.SIMPLE_HEAD, pad_edge=False)
        for one in self.tried:
            figures = f"{one.agreement:.3f}", f"{1e3 * one.draft_seconds:.2f}", str(one.length)
            table.add_row(show(one.drafter), *figures, f"{one.tokens_per_second:.1f}")
        table.add_row("none", "", "", "0", f"{self.plain:.1f}")
        return table_text(table)


def search_self_draft(
    model: PreTrainedModel,
    texts: Iterable[Sequence[int]],
    *,
    drafts: Sequence[SelfDraft | LayerSkip] | None = None,
    nodes: int = 8,
    progress: Progress | None = None,
) -> Search:
    """The draft from the model itself that promises the most tokens per second on this machine.

    Every draft in `drafts` (None: exits, dropped blocks and grouped layers, alone and together) is run over the token
    ids of the texts for its agreement a with the model, and lowered for its predicted seconds t. A chain of d tokens,
    at most `nodes`, then gives (1 - a^(d+1)) / (1 - a) tokens for d t_draft(1) + t_target(d + 1) seconds; a draft that
    splits the model, for (d + 1) t_below(1) + t_above(d + 1). Nothing is drafted: agreement over a text stands for
    acceptance, which is what it is while drafts are short.

    Raises PlanError for texts without tokens, LoweringError where generated code does not run or cannot be predicted.
    """
    say = progress or (lambda _: None)
    function, sequences = tidy(model), given(texts)
    wanted = logits_of(function, sequences)
    dense = Program({"forward": function})
    flat = dense.copy()
    for one in (KVCache(), MergeLinears(), DeadCode()):
        one.run(View(flat, one.pass_name()))
    panels: dict[str, Tensor] = {}
    target = predicted(flat["forward"], panels)
    layers = len(View(dense, "search").trunk.layers)
    tried = []
    for drafter in default_drafts(layers) if drafts is None else drafts:
        say(show(drafter))
        if isinstance(drafter, LayerSkip):
            program = flat.copy()
            run_on(program, Split((drafter.layer,)))
            below, above = (predicted(program[f"{part}_{drafter.layer}"], panels) for part in ("shallow", "deep"))
            changes: Sequence[Pass] = [EarlyExit(drafter.layer)]
            once = 1
        else:
            program = dense.copy()
            run_on(program, AddDraft(drafter.changes, drafter.function))
            below, above, changes, once = predicted(program[drafter.function], panels), target, drafter.changes, 0
        rate = agreement(wanted, logits_of(changed(function, changes), sequences))
        tried.append(best_length(drafter, rate, below, above, nodes, once))
    tried.sort(key=lambda one: -one.tokens_per_second)
    return Search(tuple(tried), 1.0 / target.seconds(1, CONTEXT))


def best_length(
    drafter: Drafter, rate: float, below: StepSeconds, above: StepSeconds, nodes: int, once: int
) -> Tried:
    """The length with the most tokens per second; `once` more calls of the draft than it has tokens."""
    seconds = below.seconds(1, CONTEXT)
    share = min(rate, 1.0 - 1e-6)
    speeds = {
        length: (1.0 - share ** (length + 1)) / (1.0 - share)
        / ((length + once) * seconds + above.seconds(length + 1, CONTEXT))
        for length in range(1, nodes + 1)
    }  # fmt: skip
    length = max(speeds, key=speeds.__getitem__)
    return Tried(drafter, rate, seconds, length, speeds[length])


def default_drafts(layers: int) -> list[SelfDraft | LayerSkip]:
    """Exits at a quarter, a half and three quarters of the layers, every other block dropped, layers in groups."""
    exits = sorted({max(1, layers * quarter // 4) for quarter in (1, 2, 3)})
    inner = tuple(range(2, layers - 2, 2))
    drops = [DropBlock(inner, "attention"), DropBlock(inner, "feed-forward")] if inner else []
    groups = [LayerParallel(size) for size in (2, 4)] if layers > 5 else []
    alone: list[tuple[Pass, ...]] = [(one,) for one in (*drops, *groups)]
    together: list[tuple[Pass, ...]] = [(EarlyExit(exits[-1]), one) for one in groups]
    both: list[tuple[Pass, ...]] = [(drops[0], groups[0])] if drops and groups else []
    return [*(LayerSkip(layer) for layer in exits), *(SelfDraft(*passes) for passes in (*alone, *together, *both))]
