"""Which blocks a model can do without: a greedy search by measured divergence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from rich import box
from rich.table import Table
from torch import Tensor, fx

from graft.calibration.measuring import Progress, given, next_token_loss, table_text, tidy
from graft.calibration.stored import fingerprint, read, write
from graft.compiler.errors import PlanError
from graft.compiler.evaluate import Sequences, agreement, divergence, logits_of
from graft.compiler.passing import Pass
from graft.compiler.program import Function
from graft.compiler.trunk import Block, find_trunk
from graft.passes.drop_block import DropBlock

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["ffn", "attention", "layer"]
STORED = "drops"


@dataclass(frozen=True)
class Dropped:
    """The model without some blocks, over the texts."""

    index: tuple[int, ...]
    """Which of the kind, ascending."""
    kl: float
    """Mean KL divergence of the whole model from it, nats a token."""
    nll: float
    """Mean negative log-likelihood of the texts' tokens, nats."""
    agreement: float
    """Share of tokens whose best follower is the whole model's."""


@dataclass(frozen=True)
class DropCalibration:
    """What a search for blocks to drop found."""

    kind: Kind
    best: tuple[Dropped, ...]
    """The blocks chosen so far, after each choice: one, two, ..."""
    tried: tuple[Dropped, ...]
    """All that was run, in order."""
    nll: float
    """Of the whole model."""
    tokens: int
    """Of the texts."""
    model: dict[str, Any]
    """Which model it is of (calibration.stored.fingerprint)."""

    def passes(self, count: int | None = None) -> tuple[Pass, ...]:
        """What drops the `count` blocks, None for as many as were searched: for `Plan(target=...)` or `SelfDraft`.

        Raises PlanError for more than were searched.
        """
        count = len(self.best) if count is None else count
        if not 1 <= count <= len(self.best):
            raise PlanError("so many drops were not calibrated", expected=f"1 to {len(self.best)}", found=count)
        index = self.best[count - 1].index
        kinds: dict[Kind, tuple[Literal["attention", "feed-forward"], ...]] = {
            "ffn": ("feed-forward",), "attention": ("attention",), "layer": ("attention", "feed-forward"),
        }  # fmt: skip
        return tuple(DropBlock(index, kind) for kind in kinds[self.kind])

    def save(self, path: str | Path) -> None:
        """Write it as JSON. Raises CheckpointError where that cannot be done."""
        write(path, STORED, self.model, {name: value for name, value in asdict(self).items() if name != "model"})

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> DropCalibration:
        """What `save` wrote. Raises CheckpointError for a file that is damaged or something else, and, given a model,
        for a calibration of another one."""
        known, data = read(path, STORED, model)
        best, tried = (
            tuple(Dropped(**{**one, "index": tuple(one["index"])}) for one in data[name]) for name in ("best", "tried")
        )
        return cls(data["kind"], best, tried, data["nll"], data["tokens"], known)

    def __str__(self) -> str:
        title = f"{self.kind} dropped"
        table = Table(title, "KL", "NLL", "agreement", "which", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_row("0", "0", f"{self.nll:.3f}", "1.000", "")
        for count, one in enumerate(self.best, 1):
            figures = f"{one.kl:.4f}", f"{one.nll:.3f}", f"{one.agreement:.3f}"
            table.add_row(str(count), *figures, ", ".join(map(str, one.index)))
        return table_text(table)


def calibrate_drops(
    model: PreTrainedModel,
    texts: Iterable[Sequence[int]],
    *,
    kind: Kind = "ffn",
    count: int = 4,
    width: int | None = None,
    progress: Progress | None = None,
) -> DropCalibration:
    """The `count` feed-forwards, attentions or layers that the model misses least on the token ids of some texts, one
    after the other: each time the block whose loss adds least to the divergence from the whole model.

    Every block is tried alone; with `width`, only that many of those that are left are tried at each further step, the
    best of the step before, which takes less time and may miss a better one.

    Raises PlanError for texts without tokens, an unknown kind, or no block left to run.
    """
    say = progress or (lambda _: None)
    if kind not in get_args(Kind):
        raise PlanError("there is no such kind of block to drop", expected=", ".join(get_args(Kind)), found=kind)
    function, sequences = tidy(model), given(texts)
    run, blocks = without(function, kind, sequences)
    if not 0 < count < blocks or (width is not None and width < 1):
        raise PlanError(
            "so many blocks cannot be dropped",
            expected=f"count from 1 to {blocks - 1}, width of 1 or more",
            found=f"count {count}, width {width}",
        )
    wanted = logits_of(function, sequences)
    chosen, best, tried = frozenset[int](), list[Dropped](), list[Dropped]()
    ranked = list(range(blocks))
    while len(best) < count:
        found: dict[int, Dropped] = {}
        for block in ranked[: width if best else None]:
            index = tuple(sorted(chosen | {block}))
            say(f"{kind} {', '.join(map(str, index))}")
            logits = run(index)
            figures = divergence(wanted, logits), next_token_loss(logits, sequences), agreement(wanted, logits)
            found[block] = Dropped(index, *figures)
        tried += found.values()
        order = sorted(found, key=lambda block: found[block].kl)
        best.append(found[order[0]])
        chosen |= {order[0]}
        ranked = order[1:] + [block for block in ranked if block not in found]
    nll = next_token_loss(wanted, sequences)
    return DropCalibration(kind, tuple(best), tuple(tried), nll, sum(map(len, sequences)), fingerprint(model))


def without(
    function: Function, kind: Kind, sequences: Sequences
) -> tuple[Callable[[Sequence[int]], list[Tensor]], int]:
    """What gives the logits of the function without some blocks, and how many blocks of the kind there are. One copy
    of the function serves all choices."""
    own = function.copy()
    trunk = find_trunk(own.graph)
    groups: list[list[Block]] = trunk.layers if kind == "layer" else [
        [block] for block in trunk.of_kind("feed-forward" if kind == "ffn" else "attention")
    ]  # fmt: skip
    terms = [[part.output.node for block in blocks for part in block.parts or [block]] for blocks in groups]
    module = fx.GraphModule(own.weights, own.graph)
    names = [[node.name for node in nodes] for nodes in terms]

    def run(index: Sequence[int]) -> list[Tensor]:
        interpreter = Without(module, frozenset(name for number in index for name in names[number]))
        return logits_of(function, sequences, interpreter.run)

    return run, len(groups)


class Without(fx.Interpreter):
    """Runs a graph some of whose values are nothing."""

    def __init__(self, module: fx.GraphModule, dropped: frozenset[str]) -> None:
        super().__init__(module)
        self.dropped = dropped

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, or a zero of its dtype, which adds nothing to a stream."""
        return torch.zeros((), dtype=n.meta["val"].dtype) if n.name in self.dropped else super().run_node(n)
