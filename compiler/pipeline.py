"""Running passes on a program: in order, as transactions, each checked before it counts."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from graft.compiler.canonical import STATE_WRITES
from graft.compiler.checker import check
from graft.compiler.errors import GraftError, PassError, PlanError
from graft.compiler.evaluate import Sample, divergence, logits_of, own_sample, vocabulary
from graft.compiler.nodes import call_nodes
from graft.compiler.ordering import ordered
from graft.compiler.passing import Pass, View, changed_nodes, mark_touched
from graft.compiler.program import Function, PassRecord, Program
from graft.compiler.spec import show, show_arguments
from graft.compiler.tolerance import difference, tolerance_of

CAPTURE = "capture"
"""The name of the first snapshot: the program before any pass."""

Progress = Callable[[str, int, int], None]
"""Called before each pass with its name, how many are done, and how many there are."""


class PassWarning(UserWarning):
    """What a pass did may not be what was meant: it matched nothing, or gives up more than its figures show."""


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    *,
    side: tuple[str, ...] = ("forward",),
    facts: Collection[str] = (),
    sample: Sequence[Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> None:
    """Run the passes on `program`, each as a transaction, and record each in `records` and `snapshots`.

    The given order is kept where the passes' declared facts allow it. `side` names the functions that the passes are
    aimed at, `facts` what holds of them already. `sample`: token ids of sequences on which contracts are checked; None
    for text that the model samples.

    Raises PlanError before anything runs if the passes do not go together; PassError if a pass fails or breaks its
    contract, and CheckError if what it leaves is not well formed, with the program as it was before that pass.
    Warns with PassWarning where a pass finds nothing to do that was meant to.
    """
    order = ordered(passes, facts)
    if not program.snapshots:
        program.snapshots[CAPTURE] = program.copy()
    evidence = Evidence(sample)
    for done, one in enumerate(order):
        if progress is not None:
            progress(one.pass_name(), done, len(order))
        run_pass(program, one, side, evidence)


@dataclass
class Evidence:
    """The sample, and what the program made of it so far; computed when first asked for."""

    given: Sequence[Sequence[int]] | None
    sample: Sample | None = None
    logits: dict[str, list[Tensor]] = field(default_factory=dict)
    """Function -> its logits on the sample at present."""
    original: dict[str, list[Tensor]] = field(default_factory=dict)
    """Function -> its logits on the sample as captured."""

    def sample_for(self, program: Program) -> Sample:
        """The user's text, or the model's own."""
        if self.sample is None:
            self.sample = own_sample(program["forward"]) if self.given is None else given_sample(program, self.given)
        return self.sample

    def before(self, program: Program, name: str) -> list[Tensor]:
        """The function's logits before the pass."""
        if name not in self.logits:
            sequences = self.sample_for(program).sequences
            self.logits[name] = logits_of(program[name], sequences)
            captured = program.snapshots[CAPTURE].functions.get(name) if program.records else None
            self.original[name] = logits_of(captured, sequences) if captured else self.logits[name]
        return self.logits[name]


def given_sample(program: Program, sequences: Sequence[Sequence[int]]) -> Sample:
    """The user's text. Raises PlanError where a token id is not one of the model's."""
    size = vocabulary(program["forward"])
    wrong = [token for sequence in sequences for token in sequence if not 0 <= token < size]
    if wrong or not sequences:
        raise PlanError(
            "the plan's sample cannot be run through the model",
            expected=f"sequences of token ids from 0 to {size - 1}",
            found=wrong[0] if wrong else "no sequence",
            where="plan.sample",
        )
    return Sample(tuple(tuple(map(int, sequence)) for sequence in sequences), "the plan's sample")


def run_pass(program: Program, one: Pass, side: tuple[str, ...], evidence: Evidence) -> None:
    """One pass: run on a copy, check the copy, check the contract, and only then let the program be the copy."""
    start, name = time.perf_counter(), one.pass_name()
    candidate = program.copy()
    view = View(candidate, name, side)
    call(one, view)
    changed = mark_touched(program, candidate, name)
    check(candidate, f"after {name}")
    refuse_strays(program, candidate, one, side)
    matches = view.matches or changed or max(0, program.node_count - candidate.node_count)
    outcome, logits = numeric_check(program, candidate, one, side, evidence) if matches else ("nothing changed", {})
    if not matches:
        keep_unchanged(program, candidate)
    options = show_arguments(one)
    notes = [*([f"options: {options}"] if options else []), *view.notes, *nothing_matched(one, view, matches)]
    record = PassRecord(
        name,
        one.contract,
        matches,
        time.perf_counter() - start,
        program.node_count,
        candidate.node_count,
        program.parameter_bytes,
        candidate.parameter_bytes,
        outcome,
        tuple(notes),
    )
    commit(program, candidate, record, name)
    evidence.logits.update(logits)


def call(one: Pass, view: View) -> None:
    """Run the pass; what it raises becomes a PassError that names the line of the pass where it happened."""
    try:
        one.run(view)
    except GraftError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PassError(
            f"{view.by} failed",
            found=f"{type(error).__name__}: {error}",
            where=f"{frame.filename}:{frame.lineno}, in {frame.name}",
            remedy="the program is as it was before the pass",
        ) from error


def commit(program: Program, candidate: Program, record: PassRecord, name: str) -> None:
    """Let the program be the candidate. Committed functions are never changed again: a later pass gets a copy."""
    runs = sum(known.split("#")[0] == name for known in program.snapshots)
    program.snapshots[f"{name}#{runs + 1}" if runs else name] = Program(dict(candidate.functions), candidate.host)
    program.records.append(record)
    program.functions, program.host = candidate.functions, candidate.host


def keep_unchanged(before: Program, after: Program) -> None:
    """Let functions that are as they were be the same objects: snapshots then hold one for both."""
    for name, function in after.functions.items():
        old = before.functions.get(name)
        if old is None or old.weights is not function.weights or old.draft_vocabulary != function.draft_vocabulary:
            continue
        if unchanged(old, function):
            after.functions[name] = old


def refuse_strays(before: Program, after: Program, one: Pass, side: tuple[str, ...]) -> None:
    """A pass may change the functions it is aimed at and add others; a lossless one may only add functions, and hand
    out more of the target's than its final hidden states."""
    kept = [name for name in before.functions if one.contract == "lossless" or name not in side]
    for name in kept:
        same = only_taps if one.contract == "lossless" and name in side else unchanged
        if name not in after.functions or not same(before[name], after[name]):
            raise PassError(
                f"{one.pass_name()} changed the function {name!r}",
                expected="no change: it is declared lossless" if name in side else "no change: it is not aimed at it",
                found=next((node for owner, node in changed_nodes(before, after) if owner == name), "removed nodes"),
                where=f"function {name}",
                remedy="the program is as it was; declare the contract exact or approximate",
            )


def unchanged(before: Function, after: Function) -> bool:
    """Whether two functions have the same nodes, states and inputs."""
    text = lambda function: [node.format_node() for node in function.graph.nodes]  # noqa: E731
    return (before.inputs, before.states, text(before)) == (after.inputs, after.states, text(after))


def only_taps(before: Function, after: Function) -> bool:
    """Whether a function is as it was but for its second result, hidden states: logits and states come of the very
    nodes that they came of, and nothing else writes a state."""
    same = (before.inputs, before.states) == (after.inputs, after.states) and deciding(before) == deciding(after)
    return same and len(call_nodes(before.graph, STATE_WRITES)) == len(call_nodes(after.graph, STATE_WRITES))


def deciding(function: Function) -> list[tuple[str, ...]]:
    """The nodes that logits and states come of, in order, and which of them these are."""
    logits, _, *states = function.output.args[0]
    found, todo = set[fx.Node](), [logits, *states]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    text = [(one.name, one.op, str(one.target), str(one.args), str(one.kwargs)) for one in sorted(found)]
    return [*text, tuple(map(str, (logits, *states)))]


def numeric_check(
    before: Program, after: Program, one: Pass, side: tuple[str, ...], evidence: Evidence
) -> tuple[str, dict[str, list[Tensor]]]:
    """What the report says of the contract on the sample, and each function's logits after the pass."""
    if one.contract == "lossless":
        return "the target's logits are unchanged", {}
    sample, logits, outcomes = evidence.sample_for(before), {}, []
    for name in side:
        old, new = evidence.before(before, name), run_on_sample(after[name], one, sample)
        logits[name] = new
        if one.contract == "exact":
            gap = max(difference(a, b) for a, b in zip(old, new, strict=True))
            outcomes.append(exact_outcome(one, after[name], rounding_dtype(before, after, name), gap, sample))
        else:
            nats = divergence(evidence.original[name], new)
            outcomes.append(f"KL {nats:.3g} nats per token from the captured model, on {sample.description}")
            if any(state.pages for state in after[name].states):
                outcomes.append("nothing of it is far enough for pages to matter: measure that on long text")
    return "; ".join(outcomes), logits


def run_on_sample(function: Function, one: Pass, sample: Sample) -> list[Tensor]:
    """The function's logits on the sample; a function that does not run is the pass's fault."""
    try:
        return logits_of(function, sample.sequences)
    except Exception as error:
        raise PassError(
            f"the function {function.name!r} no longer runs after {one.pass_name()}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="the program is as it was before the pass",
        ) from error


def exact_outcome(one: Pass, function: Function, dtype: torch.dtype, gap: float, sample: Sample) -> str:
    """The line for the report. Raises PassError where the logits moved further than rounding moves them."""
    allowed = tolerance_of(dtype)
    if not gap <= allowed:
        raise PassError(
            f"{one.pass_name()} is declared exact, but changes the logits",
            expected=f"a difference of at most {allowed:.3g} of the largest logit ({dtype})",
            found=f"{gap:.3g}",
            where=f"function {function.name}, on {sample.description}",
            remedy="the program is as it was; declare the pass approximate if that is what it is",
        )
    return f"logits differ by {gap:.2g} of the largest at most, on {sample.description}"


def rounding_dtype(before: Program, after: Program, name: str) -> torch.dtype:
    """The coarsest floating dtype among the parameters and the values that the pass made or changed: a float64 model
    may still compute its rotary frequencies in float32, and rounding happens there."""
    function = after[name]
    changed = {node for owner, node in changed_nodes(before, after) if owner == name}
    values = [node.meta.get("val") for node in function.graph.nodes if node.name in changed]
    tensors = [*function.weights.parameters(), *(value for value in values if isinstance(value, Tensor))]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def nothing_matched(one: Pass, view: View, matches: int) -> list[str]:
    """The note for a pass that found nothing to do, and the warning where that was not to be expected."""
    if matches:
        return []
    reason = f"first failed condition: {view.misses[0]}" if view.misses else "it does not say why"
    note = f"matched nothing; {reason}"
    if not one.tidies:
        warnings.warn(f"{show(one)} {note}", PassWarning, stacklevel=4)
    return [note]
