"""Which layers bear being grouped: agreement of grouped functions with the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from graft.calibration.measuring import Progress, changed, given, tidy
from graft.compiler.errors import PlanError
from graft.compiler.evaluate import agreement, logits_of
from graft.compiler.passing import View
from graft.compiler.program import Function, Program
from graft.compiler.spec import show
from graft.passes.layer_parallel import LayerParallel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["attention", "layer"]


@dataclass(frozen=True)
class Grouping:
    """One way to group layers, and how often its best token is the model's."""

    change: LayerParallel
    agreement: float

    def __str__(self) -> str:
        return f"{self.agreement:.3f}  {show(self.change)}"


def calibrate_layer_parallel(
    model: PreTrainedModel,
    texts: Iterable[Sequence[int]],
    *,
    sizes: Sequence[int] = (2, 3, 4),
    kinds: Sequence[Kind] = ("attention", "layer"),
    keep_first: int = 2,
    keep_last: int = 2,
    pairs: bool = True,
    uncounted: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[Grouping]:
    """How well the model's layers bear being grouped (`LayerParallel`), on the token ids of some texts.

    Each grouping in `sizes` and `kinds` is run over the texts, and its best token at every place compared with the
    model's, but for the first `uncounted` places of each text: a draft goes on what the model writes, so the best texts
    are its own, prompts not counted. With `pairs`, every pair of neighbours is measured alone too, and the best
    pairs that do not overlap are put together, a quarter, a half and three quarters of them: where agreement falls with
    the number of groups these are better than as many pairs in a row. Returns all of them, most agreement first.

    Raises PlanError for texts without tokens, PassError for a model whose layers cannot be grouped.
    """
    say = progress or (lambda _: None)
    function, sequences = tidy(model), given(texts)
    skipped = list(uncounted) if uncounted is not None else [0] * len(sequences)
    if len(skipped) != len(sequences) or any(not 0 <= n < len(s) for n, s in zip(skipped, sequences, strict=True)):
        raise PlanError("uncounted places fit no text", expected=[len(text) - 1 for text in sequences], found=skipped)

    def logits(one: Function) -> list[Tensor]:
        return [rows[start:] for rows, start in zip(logits_of(one, sequences), skipped, strict=True)]

    wanted = logits(function)

    def measured(change: LayerParallel) -> Grouping:
        say(show(change))
        return Grouping(change, agreement(wanted, logits(changed(function, [change]))))

    found = [measured(LayerParallel(size, keep_first, keep_last, kind)) for kind in kinds for size in sizes]
    count = len(View(Program({"forward": function}), "calibration").trunk.layers)
    if pairs and "attention" in kinds:
        inner = range(keep_first, count - keep_last - 1)
        alone = sorted((measured(LayerParallel(groups=((at, at + 1),))) for at in inner), key=by_agreement)
        found += alone
        apart = disjoint([one.change.groups[0] for one in alone])
        shares = sorted({max(1, len(apart) * quarter // 4) for quarter in (1, 2, 3)} - {1})
        found += [measured(LayerParallel(groups=tuple(sorted(apart[:share])))) for share in shares]
    return sorted(found, key=by_agreement)


def by_agreement(one: Grouping) -> float:
    """What groupings are sorted by."""
    return -one.agreement


def disjoint(pairs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The pairs that do not overlap with one before them."""
    kept: list[tuple[int, ...]] = []
    for pair in pairs:
        if not {number for one in kept for number in one}.intersection(pair):
            kept.append(pair)
    return kept
