"""What makes a good draft of a model: groups of layers by their agreement, whole drafts by tokens per second."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from graft.codegen.executable import Executable
from graft.codegen.lowering import lower
from graft.compiler.capture import capture, check_model
from graft.compiler.drafting import Drafter
from graft.compiler.errors import LoweringError, PlanError
from graft.compiler.evaluate import Sequences, agreement, logits_of
from graft.compiler.passing import Pass, View
from graft.compiler.pipeline import run_passes
from graft.compiler.program import DENSE, Function, Program, StepSeconds
from graft.compiler.spec import show
from graft.passes.add_draft import AddDraft
from graft.passes.canonicalise import Canonicalise
from graft.passes.common_subexpression import CommonSubexpression
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

Kind = Literal["attention", "layer"]
CONTEXT = 256
"""Tokens of context at which steps are predicted."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Grouping:
    """One way to group layers, and how often its best token is the model's."""

    change: LayerParallel
    agreement: float

    def __str__(self) -> str:
        return f"{self.agreement:.3f}  {show(self.change)}"


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
        console = Console(file=io.StringIO(), width=120, color_system=None)
        console.print(table)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())


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


def tidy(model: PreTrainedModel) -> Function:
    """The model's function without a cache, in canonical form."""
    check_model(model)
    captured = capture(model)
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    run_passes(program, (Canonicalise(), DeadCode(), CommonSubexpression()), sample=[[0, 1]])
    return program["forward"]


def given(texts: Iterable[Sequence[int]]) -> Sequences:
    """The texts as token ids."""
    sequences = tuple(tuple(map(int, text)) for text in texts)
    if not sequences or not all(sequences):
        raise PlanError("a calibration needs texts", expected="token ids of one text or several", found=sequences)
    return sequences


def changed(function: Function, changes: Sequence[Pass]) -> Function:
    """A copy of the function behind some passes."""
    program = Program({"forward": function.copy()})
    for one in changes:
        run_on(program, one)
    return program["forward"]


def run_on(program: Program, one: Pass) -> None:
    """Run a pass, in place."""
    one.run(View(program, one.pass_name()))


def predicted(
    function: Function, panels: dict[str, Tensor], keep: dict[str, Executable] | None = None
) -> StepSeconds:
    """How long calls of the function take here; `panels` are parameters packed so far, to which its own are added, and
    `keep` is where to put what runs it."""
    executable = lower(function, "auto", panels)
    panels |= executable.panels
    if keep is not None:
        keep[function.name] = executable
    if executable.prediction is None:
        raise LoweringError(
            "the time of a step cannot be predicted",
            expected="a function that generated C++ runs without ATen",
            found=f"backend {executable.backend}",
            where=f"function {function.name}",
        )
    return executable.prediction
