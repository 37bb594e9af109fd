"""Passes as transactions: order, checks, numeric contracts, and what is recorded."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from graft.compiler.errors import CheckError, PassError, PlanError
from graft.compiler.evaluate import divergence, logits_of, own_sample
from graft.compiler.passing import Contract, Pass, View, exact, lossless
from graft.compiler.pipeline import PassWarning, run_passes
from graft.compiler.program import Program
from graft.compiler.tolerance import TOLERANCE, difference, tolerance_of
from graft.passes.dead_code import DeadCode
from graft.passes.drop_block import DropBlock
from graft.passes.kv_cache import KVCache
from graft.passes.merge_linears import MergeLinears
from tests.programs import TIDY, program_of

FACTS = ("canonical", "cache-free")
SAMPLE = ((3, 4, 5, 6, 7), (90, 80))


@dataclass(frozen=True)
class PipelineScale(Pass):
    """Scale the output of every feed-forward block."""

    factor: float = 1.0

    def run(self, view: View) -> None:
        """Change every block."""
        for block in view.trunk.feed_forward:
            block.output = block.output * self.factor


@dataclass(frozen=True)
class PipelineScaleExactly(PipelineScale):
    """The same, under a promise that only a factor of 1 keeps."""

    contract: ClassVar[Contract] = exact


@dataclass(frozen=True)
class PipelineScaleLosslessly(PipelineScale):
    """The same, under a promise that no change keeps."""

    contract: ClassVar[Contract] = lossless


class PipelineCrash(Pass):
    """Fails half-way."""

    def run(self, view: View) -> None:
        """Change something, then fail."""
        view.trunk.feed_forward[0].drop()
        raise RuntimeError("half-way")


class PipelineInterrupted(Pass):
    """Is interrupted half-way."""

    def run(self, view: View) -> None:
        """Change something, then stop."""
        view.trunk.feed_forward[0].drop()
        raise KeyboardInterrupt


class PipelineUnsound(Pass):
    """Leaves a node without metadata."""

    def run(self, view: View) -> None:
        """Break a rule of the checker."""
        del view.trunk.feed_forward[0].residual.meta["origin"]


class PipelineSilent(Pass):
    """Finds nothing, and does not say why."""

    def run(self, view: View) -> None:
        """Nothing."""


@dataclass(frozen=True)
class PipelineAdd(Pass):
    """Add a function beside the target's, as a draft head does."""

    contract: ClassVar[Contract] = lossless
    touch: bool = False

    def run(self, view: View) -> None:
        """Add a copy of the target, and perhaps change the target too."""
        draft = view.function.copy()
        draft.name = "draft"
        view.program.functions["draft"] = draft
        view.match()
        if self.touch:
            view.trunk.feed_forward[0].drop()


def fresh() -> Program:
    """A tiny model in canonical form, without history."""
    return program_of("llama", TIDY).copy()


def text(program: Program) -> list[str]:
    """Everything a pass could have changed."""
    return [node.format_node() for function in program.functions.values() for node in function.graph.nodes]


def run(program: Program, *passes: Pass, **options: Any) -> None:
    """Run the passes on the sample, a warning being an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_passes(program, passes, facts=FACTS, **{"sample": SAMPLE, **options})


def test_each_pass_leaves_a_record_and_a_snapshot() -> None:
    program = fresh()
    run(program, PipelineScale(0.5), DropBlock(index=(0,)), DropBlock(index=(0,)), KVCache(), MergeLinears())
    names = ["pipeline-scale", "drop-block", "drop-block", "kv-cache", "merge-linears"]
    assert [record.name for record in program.records] == names
    assert list(program.snapshots) == ["capture", "pipeline-scale", "drop-block", "drop-block#2", *names[3:]]
    first, drop, *_, merge = program.records
    assert (first.matches, first.contract, first.notes) == (6, "approximate", ("options: factor=0.5",))
    assert drop.bytes_before - drop.bytes_after == 4 * (3 * 64 * 96 + 64)
    assert (merge.matches, merge.nodes_after - merge.nodes_before) == (4, 4)
    assert merge.seconds > 0
    assert text(program.snapshots["merge-linears"]) == text(program)
    assert program.snapshots["capture"].node_count == fresh().node_count


def test_nodes_remember_the_passes_that_touched_them() -> None:
    program = fresh()
    run(program, PipelineScale(0.5))
    touched = {node.meta["origin"].passes for node in program["forward"].graph.nodes if "mul_tensor" in node.name}
    assert touched == {("pipeline-scale",)}


def test_passes_run_in_the_order_that_their_facts_allow() -> None:
    program, seen = fresh(), []
    run(
        program,
        KVCache(),
        PipelineScale(0.5),
        DropBlock(index=(1,)),
        progress=lambda name, done, count: seen.append((name, done, count)),
    )
    assert seen == [("pipeline-scale", 0, 3), ("drop-block", 1, 3), ("kv-cache", 2, 3)]


def test_passes_that_do_not_go_together_are_refused_before_anything_runs() -> None:
    program = fresh()
    with pytest.raises(PlanError, match="kv-cache cannot run twice"):
        run(program, PipelineScale(0.5), KVCache(), KVCache())
    assert (program.records, program.snapshots) == ([], {})


@pytest.mark.parametrize(
    ("one", "error", "message"),
    [
        (PipelineCrash(), PassError, r"pipeline-crash failed(.|\n)*RuntimeError: half-way(.|\n)*test_pipeline\.py:"),
        (PipelineInterrupted(), KeyboardInterrupt, None),
        (PipelineUnsound(), CheckError, r"lacks metadata(.|\n)*after pipeline-unsound, function forward"),
        (PipelineScaleExactly(1.01), PassError, r"declared exact, but changes the logits(.|\n)*7 tokens of the plan's"),
        (PipelineScaleLosslessly(1.01), PassError, r"changed the function 'forward'(.|\n)*declared lossless"),
        (PipelineAdd(touch=True), PassError, r"changed the function 'forward'"),
        (DropBlock(index=(7,)), PassError, r"no such feed-forward block"),
    ],
)
def test_a_pass_that_fails_leaves_the_program_as_it_was(
    one: Pass, error: type[BaseException], message: str | None
) -> None:
    program = fresh()
    before = text(program)
    with pytest.raises(error, match=message):
        run(program, one)
    assert (text(program), program.records, list(program.snapshots)) == (before, [], ["capture"])


def test_passes_before_one_that_fails_stay_done() -> None:
    program = fresh()
    with pytest.raises(PassError):
        run(program, PipelineScale(0.5), PipelineCrash())
    assert [record.name for record in program.records] == ["pipeline-scale"]
    assert text(program) == text(program.snapshots["pipeline-scale"])


def test_a_promise_that_is_kept_is_recorded_with_the_difference() -> None:
    program = fresh()
    run(program, PipelineScaleExactly(1.0 + 1e-7), KVCache())
    for record in program.records:
        assert record.check.startswith("logits differ by ")
        assert record.check.endswith("of the largest at most, on 7 tokens of the plan's sample")


def test_an_approximation_is_measured_against_the_captured_model() -> None:
    program = fresh()
    captured = logits_of(program["forward"], SAMPLE)
    run(program, PipelineScale(0.9), PipelineScale(0.8))
    expected = divergence(captured, logits_of(program["forward"], SAMPLE))
    assert expected > 0
    assert program.records[1].check.startswith(f"KL {expected:.3g} nats per token from the captured model")


def test_without_a_sample_the_model_writes_its_own_and_the_report_says_so() -> None:
    program = fresh()
    run(program, PipelineScale(0.5), sample=None)
    assert program.records[0].check.endswith("on 13 tokens of text sampled by the model itself, seed 0")


def test_the_models_own_text_is_the_same_every_time() -> None:
    function = fresh()["forward"]
    first, second, other = (own_sample(function, (5, 3), seed).sequences for seed in (0, 0, 1))
    assert first == second != other
    assert [len(sequence) for sequence in first] == [5, 3]


@pytest.mark.parametrize("sample", [[[1, 131]], [[-1]], []])
def test_a_sample_that_the_model_cannot_read_is_refused(sample: list[list[int]]) -> None:
    with pytest.raises(PlanError, match=r"expected: sequences of token ids from 0 to 130"):
        run(fresh(), PipelineScale(0.5), sample=sample)


def test_a_lossless_pass_may_add_functions() -> None:
    program = fresh()
    run(program, PipelineAdd())
    assert list(program.functions) == ["forward", "draft"]
    assert program.records[0].check == "the target's logits are unchanged"


def test_a_pass_aimed_at_the_draft_may_not_touch_the_target() -> None:
    class PipelineAstray(Pass):
        def run(self, view: View) -> None:
            view.program["forward"].graph.eliminate_dead_code()
            view.program["forward"].output.prev.name = "renamed"
            view.match()

    program = fresh()
    run(program, PipelineAdd())
    run(program, PipelineScale(0.5), side=("draft",))
    assert "KL" in program.records[-1].check
    with pytest.raises(PassError, match="changed the function 'forward'"):
        run(program, PipelineAstray(), side=("draft",))


def test_a_pass_that_matches_nothing_warns_with_the_first_failed_condition() -> None:
    program = fresh()
    with pytest.warns(PassWarning, match="drop-block matched nothing; first failed condition: index: no"):
        run_passes(program, [DropBlock()], facts=FACTS, sample=SAMPLE)
    with pytest.warns(PassWarning, match="pipeline-silent matched nothing; it does not say why"):
        run_passes(program, [PipelineSilent()], facts=FACTS, sample=SAMPLE)
    assert [record.matches for record in program.records] == [0, 0]
    assert program.records[0].notes == ("matched nothing; first failed condition: index: no block is named",)


def test_a_pass_that_tidies_may_find_nothing_to_do() -> None:
    program = fresh()
    function = program["forward"]
    run(program, DeadCode())
    assert program.records[0].notes[0].startswith("matched nothing")
    assert program["forward"] is function  # and the snapshot holds no copy of it


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype_keeps_its_promises_within_the_table(dtype: torch.dtype) -> None:
    program = program_of("llama", TIDY, dtype=dtype).copy()
    run(program, KVCache(), MergeLinears())
    assert program.records[0].check.startswith("logits differ by")
    with pytest.raises(PassError, match="declared exact"):
        run(program, PipelineScaleExactly(1.0 + 30 * tolerance_of(dtype)))


def test_a_difference_is_relative_to_the_largest_logit() -> None:
    before = torch.tensor([[1.0, -4.0], [2.0, 0.0]])
    after = before + torch.tensor([[0.0, 0.0], [0.4, 0.0]])
    assert difference(before, after) == pytest.approx(0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_on_one_side_is_an_infinite_difference(value: float) -> None:
    before = torch.tensor([[1.0, 2.0]])
    after = torch.tensor([[1.0, value]])
    assert difference(before, after) == difference(before, after[:, :1]) == float("inf")
    assert difference(after, after) == 0
