"""The judge head: what it is trained on, that it is trained, and what the verifier does with what it says."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

import graft
from graft.compiler.building import Builder
from graft.compiler.canonical import aten
from graft.compiler.host import scored_host
from graft.compiler.passing import Contract, View, lossless
from graft.compiler.program import Input
from graft.training import TrainOptions, train_heads
from graft.training.features import Texts
from graft.training.lines import EVERY, places
from graft.training.options import RUN
from tests.families import build
from tests.graft.test_training import Interrupted, stop_at, texts

OPTIONS = TrainOptions(kind="judge", heads=2, length=48, new_tokens=40, labels=4, ahead=6, batch=40, epochs=5,
                       rate=0.05, held_out=0.2, patience=5)  # fmt: skip
SAMPLE = [range(3, 9)]
PROMPT = [5, 6, 7, 8, 5, 6]


@pytest.fixture(scope="module")
def compiled() -> graft.CompiledModel:
    return graft.compile(build("llama", eos_token_id=None), graft.Plan(sample=SAMPLE), backend="aten")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge that likes about half of all tokens."""
    found = tmp_path_factory.mktemp("judge")
    save_file({"weight": torch.randn(1, 64, generator=torch.Generator().manual_seed(2)), "bias": torch.zeros(1)},
              found / "judge.safetensors")  # fmt: skip
    (found / "config.json").write_text("{}")
    return found


def judged_by(folder: Path, threshold: float, *draft: graft.Drafter, backend: str = "aten") -> graft.CompiledModel:
    plan = graft.Plan(draft=draft, verifier=graft.LossyJudge(str(folder), threshold), sample=SAMPLE,
                      controller=graft.FixedBudget(5), tree=graft.Tree(6))  # fmt: skip
    assert graft.Plan.from_toml(plan.to_toml()) == plan
    return graft.compile(build("llama", eos_token_id=None), plan, backend=backend)


def accepted_by_the_equations(folder: Path, threshold: float, ids: list[int], prompt: int) -> tuple[int, int]:
    """(tokens that are the model's best, tokens that only the judge lets stand) of a text; all must be one of the two,
    by transformers' own hidden states."""
    from safetensors.torch import load_file

    model, tensors = build("llama", eos_token_id=None), load_file(folder / "judge.safetensors")
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
        best = model.lm_head(hidden).argmax(-1)
        likes = (hidden @ tensors["weight"][0] + tensors["bias"]).sigmoid() > threshold
    own = [int(best[at - 1]) == ids[at] for at in range(prompt, len(ids))]
    assert all(mine or bool(likes[at]) for at, mine in enumerate(own, prompt))
    return sum(own), len(own) - sum(own)


@pytest.mark.parametrize("backend", ["aten", "cpp"])
def test_a_token_stands_if_the_target_chooses_it_or_the_judge_likes_it(
    folder: Path, compiled: graft.CompiledModel, backend: str
) -> None:
    fast = judged_by(folder, 0.5, graft.Lookup(), graft.Recycle(), backend=backend)
    ids = fast.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False)[0].tolist()
    own, liked = accepted_by_the_equations(folder, 0.5, ids, len(PROMPT))
    assert own > 0 and liked > 0
    assert "LOSSY: verifier lossy-judge" in fast.report() and "scores = judge(rows)" in str(fast.program.host)


def test_a_judge_that_likes_nothing_leaves_plain_decoding_greedy_and_sampled(
    folder: Path, compiled: graft.CompiledModel
) -> None:
    fast = judged_by(folder, 1.0, graft.Lookup(), graft.Recycle())
    batch = torch.tensor([PROMPT, [9, 10, 11, 9, 10, 11]])
    for options in ({"do_sample": False}, {"do_sample": True, "seed": 3, "temperature": 0.8}):
        plain = compiled.generate(batch, max_new_tokens=20, **options)
        assert fast.generate(batch, max_new_tokens=20, **options).equal(plain)


def test_the_judge_reads_what_a_target_cut_in_two_leaves_and_is_saved_with_it(folder: Path, tmp_path: Path) -> None:
    fast = judged_by(folder, 0.5, graft.LayerSkip(1))
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    ids = fast.generate(torch.tensor([PROMPT]), **options)
    assert accepted_by_the_equations(folder, 0.5, ids[0].tolist(), len(PROMPT))[1] > 0
    fast.save(tmp_path / "saved")
    assert graft.load(tmp_path / "saved").generate(torch.tensor([PROMPT]), **options).equal(ids)


@dataclass(frozen=True)
class LikeSums(graft.Pass):
    """A judge of one's own: the sum of what the unembedding reads."""

    contract: ClassVar[Contract] = lossless
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "kv-cache"})

    def run(self, view: View) -> None:
        builder = Builder(view, "liking", [Input("hidden", ("N", 64), torch.float32)])
        said = builder.wanted(builder["hidden"]).apply(aten.sum.dim_IntList, [-1], True).apply(aten.sigmoid.default)
        builder.finish(said, builder["hidden"])
        view.program.host = scored_host(view.program.host, "liking")


@dataclass(frozen=True)
class LossyOwn(graft.LossyJudge):
    """A verifier of one's own that reads it."""

    @property
    def passes(self) -> tuple[graft.Pass, ...]:
        return (LikeSums(),)


def test_a_verifier_of_ones_own_brings_a_function_of_its_own(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1, 64), "bias": torch.zeros(1)}, tmp_path / "judge.safetensors")
    (tmp_path / "config.json").write_text("{}")
    same = judged_by(tmp_path, 0.5, graft.Lookup(), graft.Recycle())
    plan = replace(same.plan, verifier=LossyOwn(str(tmp_path)))
    own = graft.compile(build("llama", eos_token_id=None), plan, backend="aten")
    assert "scores = liking(rows)" in str(own.program.host)
    ids = own.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False)
    assert ids.equal(same.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False))
    assert accepted_by_the_equations(tmp_path, 0.5, ids[0].tolist(), len(PROMPT))[1] > 0


def test_what_a_plan_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(graft.PlanError, match="out of range"):
        graft.LossyJudge("folder", 1.5)
    with pytest.raises(graft.CheckpointError, match="no judge head here"):
        judged_by(tmp_path, 0.5, graft.Lookup())
    with pytest.raises(graft.PlanError, match="not right"):
        TrainOptions(kind="judge", ahead=RUN - 1)


def test_a_label_says_whether_the_target_comes_back_to_the_text(compiled: graft.CompiledModel) -> None:
    """Against transformers' own greedy continuation of each text with one token replaced."""
    model = build("llama", eos_token_id=None)
    generated = compiled.generate(torch.tensor([PROMPT]), max_new_tokens=60, do_sample=False)[0].tolist()
    labels = list[int]()
    for text in (generated, [7, 8, 9] * 14):
        found = places(compiled, text, OPTIONS)
        starts = range(EVERY, len(text) - OPTIONS.ahead - RUN, EVERY)
        assert found["labels"].shape == found["shares"].shape == (len(starts), 1)
        for start, token, label, hidden in zip(starts, found["tokens"].tolist(), found["labels"], found["hidden"],
                                               strict=True):  # fmt: skip
            ids = torch.tensor([[*text[:start], token]])
            assert token != text[start]
            branch = model.generate(ids, max_new_tokens=OPTIONS.ahead, do_sample=False)[0, start + 1 :].tolist()
            own = f" {' '.join(map(str, text[start : start + OPTIONS.ahead + RUN]))} "
            runs = [f" {' '.join(map(str, branch[at : at + RUN]))} " for at in range(OPTIONS.ahead - RUN + 1)]
            assert bool(label) == any(one in own for one in runs)
            with torch.no_grad():
                expected = model.model(ids).last_hidden_state[0, -1]
            torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
            labels.append(int(label))
    assert 0 < sum(labels) < len(labels)


def test_a_judge_is_trained_resumed_and_used(compiled: graft.CompiledModel, tmp_path: Path) -> None:
    said = list[str]()
    corpus = Texts(texts().documents, (*texts().prompts, (3, 4)))
    with pytest.raises(Interrupted):
        train_heads(compiled, corpus, tmp_path / "judge", OPTIONS, say=stop_at("held-out", 2))
    figures = train_heads(compiled, corpus, tmp_path / "judge", OPTIONS, name="tiny", say=said.append)
    losses = [float(line.split("held-out loss ")[1].split(",")[0]) for line in said if "held-out" in line]
    assert figures["loss"] == pytest.approx(min(losses), abs=1e-3) and losses[-1] < losses[0]
    assert figures["tokens_per_step"] == pytest.approx(1 + figures["accepted"], abs=1e-3)
    assert json.loads((tmp_path / "judge" / "config.json").read_text())["format"] == "graft judge head"
    fast = judged_by(tmp_path / "judge", 0.0, graft.Lookup(), graft.Recycle())
    fast.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False)
    assert fast.stats["accepted"] > 0
    shown = list[tuple[str, float]]()
    assert train_heads(compiled, corpus, tmp_path / "whole", OPTIONS, bar=lambda *one: shown.append(one)) == figures
    parts = [part for _, part in shown]
    assert parts == sorted(parts) and 0 < parts[0] < parts[-1] == pytest.approx(1)
    assert all(" loss " in text for text, _ in shown) and "tokens a step" in shown[-2][0]
    with pytest.raises(graft.CheckpointError, match="another training run"):
        stopped = tmp_path / "stopped"
        with pytest.raises(Interrupted):
            train_heads(compiled, corpus, stopped, OPTIONS, say=stop_at("hidden", 1))
        train_heads(compiled, corpus, stopped, replace(OPTIONS, ahead=8))
