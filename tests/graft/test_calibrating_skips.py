"""Calibration of skips and drops: thresholds for a share of feed-forwards, blocks to drop, files that are checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import graft
from graft.calibration.measuring import changed, tidy
from graft.calibration.skip_ffn import cold_ends, latched
from graft.compiler.evaluate import divergence, logits_of
from tests.families import build

TEXT = ((5, 9, 3, 17, 22, 6, 8, 40), (7, 7, 31, 4, 12))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    made = build("llama", num_hidden_layers=5)
    for number, layer in enumerate(made.model.layers):
        layer.mlp.down_proj.weight.data *= (3.0, 0.3, 0.1, 0.2, 3.0)[number]
    return made


@pytest.fixture(scope="module")
def skips(model: PreTrainedModel) -> graft.SkipCalibration:
    return graft.calibrate_skip_ffn(model, TEXT, rates=(0.05, 0.1), cold=(1, 1), warmup=2)


@pytest.fixture(scope="module")
def drops(model: PreTrainedModel) -> graft.DropCalibration:
    return graft.calibrate_drops(model, TEXT, count=2)


def test_the_cosines_are_those_of_the_stream_on_both_sides_of_each_feed_forward(
    model: PreTrainedModel, skips: graft.SkipCalibration
) -> None:
    found = []
    for layer in model.model.layers:
        seen: dict[str, torch.Tensor] = {}
        before = layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, inputs, seen=seen: seen.__setitem__("before", inputs[0])
        )
        behind = layer.register_forward_hook(
            lambda _, __, out, seen=seen: seen.__setitem__("behind", out[0] if isinstance(out, tuple) else out)
        )
        total = 0.0
        for tokens in TEXT:
            with torch.no_grad():
                model(torch.tensor([tokens]), use_cache=False)
            total += float(torch.nn.functional.cosine_similarity(seen["before"], seen["behind"], dim=-1).sum())
        found.append(total / 13)
        before.remove()
        behind.remove()
    assert skips.cosines == pytest.approx(found, abs=1e-5)
    assert cold_ends(found) == (1, 1)


def test_a_proposal_comes_near_its_share_and_says_what_the_pass_costs(
    model: PreTrainedModel, skips: graft.SkipCalibration
) -> None:
    function = tidy(model)
    wanted = logits_of(function, TEXT)
    for one, rate in zip(skips.proposals, (0.05, 0.1), strict=True):
        assert one.skipped == pytest.approx(rate, abs=0.04)
        assert one.change.warmup == 2 and (one.change.cold_first, one.change.cold_last) == (1, 1)
        logits = logits_of(changed(function, [one.change]), TEXT)
        assert one.kl == pytest.approx(divergence(wanted, logits)) and one.kl > 0
    assert skips.best(skips.proposals[0].kl) == skips.proposals[0].change
    assert skips.best(0.0) is None and "skipped" in str(skips)


def test_the_latch_skips_what_its_equations_say() -> None:
    alike = torch.tensor([[0.9, 0.1], [0.9, 0.9], [0.9, 0.9], [0.9, 0.9]])
    late = torch.tensor([True, True])
    assert latched(alike, late, 0.5, 1) == 2 + 1  # every other one of the first token; the second starts one later
    assert latched(alike, late, 0.5, 9) == 3 + 2
    assert latched(alike, torch.tensor([True, False]), 0.5, 9) == 3


def test_drops_are_chosen_one_by_one_by_their_divergence(
    model: PreTrainedModel, drops: graft.DropCalibration
) -> None:
    function = tidy(model)
    wanted = logits_of(function, TEXT)

    def cost(*index: int) -> float:
        return divergence(wanted, logits_of(changed(function, [graft.DropBlock(index)]), TEXT))

    alone = {block: cost(block) for block in range(5)}
    first = min(alone, key=alone.__getitem__)
    assert [one.kl for one in drops.tried[:5]] == pytest.approx(list(alone.values()))
    second = min(set(alone) - {first}, key=lambda block: cost(first, block))
    assert [one.index for one in drops.best] == [(first,), tuple(sorted((first, second)))]
    assert drops.passes() == (graft.DropBlock(drops.best[1].index),)
    assert drops.passes(1) == (graft.DropBlock((first,)),)
    with pytest.raises(graft.PlanError, match="were not calibrated"):
        drops.passes(3)


def test_layers_are_dropped_whole_and_fewer_are_tried_with_a_width(model: PreTrainedModel) -> None:
    found = graft.calibrate_drops(model, TEXT, kind="layer", count=2, width=2)
    assert len(found.tried) == 5 + 2
    index = found.best[1].index
    assert found.passes() == (graft.DropBlock(index, "attention"), graft.DropBlock(index, "feed-forward"))
    function = tidy(model)
    logits = logits_of(changed(function, found.passes()), TEXT)
    assert found.best[1].kl == pytest.approx(divergence(logits_of(function, TEXT), logits))


def test_what_cannot_be_calibrated_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(graft.PlanError, match="no such kind"):
        graft.calibrate_drops(model, TEXT, kind="mlp")
    with pytest.raises(graft.PlanError, match="so many blocks"):
        graft.calibrate_drops(model, TEXT, count=5)
    with pytest.raises(graft.PlanError, match="rates are shares"):
        graft.calibrate_skip_ffn(model, TEXT, rates=(1.5,))


def test_a_calibration_comes_back_from_its_file_and_a_bad_file_is_refused(
    model: PreTrainedModel, skips: graft.SkipCalibration, drops: graft.DropCalibration, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.json"
    for one in (skips, drops):
        one.save(path)
        assert type(one).load(path, model) == one
    whole = path.read_text()
    for text, problem in (
        (whole[: len(whole) // 2], "cannot be read"),
        (json.dumps({"format": "other"}), "not a calibration"),
        (whole.replace(str(drops.tokens), str(drops.tokens + 1), 1), "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(graft.CheckpointError, match=problem):
            graft.DropCalibration.load(path)
    path.write_text(whole)
    with pytest.raises(graft.CheckpointError, match="another kind"):
        graft.SkipCalibration.load(path)
    other = build("llama", num_hidden_layers=5)
    with pytest.raises(graft.CheckpointError, match="another model"):
        graft.DropCalibration.load(path, other)
    with pytest.raises(graft.CheckpointError, match="cannot be read"):
        graft.DropCalibration.load(tmp_path / "none.json")
