"""What compressions lose by mechanism: kept, checked when read, and added up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.cli import main
from graft.compiler.errors import CheckpointError, PlanError
from graft.compiler.spec import show
from graft.quality import Interval, Losses, Options, Quality, measure
from graft.quality.losses import parts
from tests.families import VOCABULARY, build
from tests.graft.test_quality import Letters

SIZES = Options(context=192, tokens=32, streamed=0, passkeys=0, references="none", resamples=50)
CODES = graft.KeyChannels(0.5, graft.Affine(2, 4))
SELECTION = graft.DoubleSparsity(least=16, dense_layers=0)
THREE = graft.CompressKV(graft.Affine(2, 4), graft.H2O(ratio=0.6), SELECTION, prompt="dense")
NARROW = graft.CompressKV(CODES, selection=SELECTION, prompt="dense")


def model() -> Any:
    return build("llama", num_hidden_layers=2, max_position_embeddings=512, eos_token_id=None)


@pytest.fixture(scope="module")
def quality() -> Quality:
    plans = {show(one): one for whole in (THREE, NARROW) for one in (whole, *parts(whole))}
    text = torch.randint(3, VOCABULARY, (SIZES.length,), generator=torch.Generator().manual_seed(0)).tolist()
    return measure(model(), plans, [text], SIZES, backend="aten")


@pytest.fixture(scope="module")
def losses(quality: Quality) -> Losses:
    return Losses.of(quality, graft.Plan(target=[THREE]), model(), {"text": "chance", "context": 192})


def test_a_compression_is_taken_apart_into_mechanisms_that_lose_something_alone() -> None:
    assert [(one.codec, one.eviction, one.selection) for one in parts(NARROW)] == [
        (graft.KeyChannels(0.5), None, None),
        (graft.Affine(2, 4), None, None),
        (graft.InPlace(), None, SELECTION),
    ]
    assert [one.codec for one in parts(THREE)] == [graft.Affine(2, 4), graft.DensePages(), graft.InPlace()]
    assert {(one.prompt, one.every) for one in parts(replace(THREE, every=128))} == {("dense", 128)}
    half = graft.CompressKV(graft.DensePages(), graft.H2O())
    assert parts(half) == [half]


@pytest.mark.parametrize("whole", [THREE, NARROW], ids=["codec, eviction, selection", "two codecs, selection"])
def test_losses_of_mechanisms_add_up_to_what_their_combination_was_measured_to(
    quality: Quality, losses: Losses, whole: graft.CompressKV
) -> None:
    found = losses.estimate(whole)
    alone = [quality.kl(show(part)).mean for part in parts(whole)]
    assert found.total is not None and found.measured is not None
    assert found.total.mean == pytest.approx(sum(alone)) and found.measured == quality.kl(show(whole))
    assert found.total.low < found.total.mean < found.total.high
    assert 0.5 < found.total.mean / found.measured.mean < 2
    assert found.measured.mean > max(alone) / 2


@pytest.fixture(scope="module")
def fast() -> graft.CompiledModel:
    return graft.compile(model(), graft.Plan(target=[NARROW], sample=[[5, 6]]), backend="aten")


def test_the_report_says_what_a_plan_is_expected_to_lose_and_what_it_lost(
    losses: Losses, fast: graft.CompiledModel
) -> None:
    rows = {line.split("  ")[0].strip(): line.split() for line in fast.report(losses).splitlines()}
    found = losses.estimate(NARROW)
    assert found.total is not None and found.measured is not None
    assert rows["estimated, the sum"][3] == f"{found.total.mean:.2g}" != rows["measured"][1]
    assert rows["measured"][1:] == [f"{found.measured.mean:.2g}", f"{found.measured.low:.2g}", "to",
                                    f"{found.measured.high:.2g}"]  # fmt: skip
    known = {name: one for name, one in losses.kl.items() if name not in (repr(NARROW), repr(parts(NARROW)[0]))}
    less = fast.report(replace(losses, kl=known))
    assert "chance" in less and [line.split()[-1] for line in less.splitlines() if "the sum" in line] == ["-"]
    assert "the sum" not in fast.report()


def test_losses_of_something_else_are_refused(losses: Losses) -> None:
    other = graft.Plan(target=[graft.DropBlock([1]), NARROW])
    with pytest.raises(PlanError, match="measured beside other passes"):
        losses.estimate(other)
    with pytest.raises(PlanError, match="nothing to measure in a plan"):
        losses.estimate(graft.Plan())
    with pytest.raises(PlanError, match="another model"):
        losses.estimate(NARROW, build("llama", num_hidden_layers=1).config)
    with pytest.raises(PlanError, match="cannot stand beside each other"):
        losses.beside(replace(losses, about={**losses.about, "text": "another"}))
    newer = replace(losses, kl={repr(NARROW): Interval(1.0, 1.0, 1.0)})
    both = newer.beside(losses)
    assert both.kl == {**losses.kl, **newer.kl}


def test_losses_are_kept_and_a_file_that_was_changed_is_refused(losses: Losses, tmp_path: Path) -> None:
    path = tmp_path / "kl.json"
    losses.save(path)
    again = Losses.load(path, model())
    found, wanted = (one.estimate(NARROW).measured for one in (again, losses))
    assert found is not None and wanted is not None and found.mean == pytest.approx(wanted.mean, rel=1e-5)
    assert again.kl.keys() == losses.kl.keys() and again.about == losses.about
    with pytest.raises(CheckpointError, match="another model"):
        Losses.load(path, build("llama", num_hidden_layers=1))
    text = path.read_text()
    figure = f"{losses.kl[repr(THREE)].to_json()['mean']}"
    for damaged in (text.replace(figure, "0.001"), text[: len(text) // 2]):
        assert damaged != text
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
            Losses.load(path)


def test_the_command_measures_mechanisms_and_keeps_them_for_combinations(
    fast: graft.CompiledModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from graft import cli
    from graft.quality import command

    loaded = {"AutoTokenizer": Letters(), "AutoModelForCausalLM": model()}
    monkeypatch.setattr(command, "load", lambda kind, arguments, **options: loaded[kind])
    monkeypatch.setattr(cli, "compile_model", lambda arguments, progress: fast)
    (tmp_path / "text.txt").write_text("some text " * 40)
    spec, kept = f"target={show(NARROW)}", tmp_path / "kl.json"
    sizes = ("--context", "192", "--tokens", "8", "--streamed", "0", "--passkeys", "0", "--documents", "1")
    asked = ("quality", "m", "--text", str(tmp_path / "text.txt"), *sizes, "--backend", "aten", "--quiet",
             "--references", "none", "--save", str(kept), "--spec", spec)  # fmt: skip
    assert main([*asked, "--parts"]) == 0
    assert "together" not in capsys.readouterr().out and len(json.loads(kept.read_text())["result"]["kl"]) == 3
    assert main(["inspect", "m", "--quiet", "--spec", spec, "--losses", str(kept)]) == 0
    shown = capsys.readouterr().out
    estimated = next(line.split()[3] for line in shown.splitlines() if "the sum" in line)
    assert float(estimated) > 0 and "measured   " in shown
    assert main(list(asked)) == 0
    together = capsys.readouterr().out.split("its mechanisms together ")[1].split()[0]
    assert float(together) == pytest.approx(float(estimated), rel=0.05)  # the report has two digits
    kept.write_text(kept.read_text().replace("16", "17", 1))
    assert main(list(asked)) == 2
    assert "damaged" in capsys.readouterr().err
