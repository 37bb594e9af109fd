"""Training routers: sets of least error, routers that find them on text they have not seen, and what comes out."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import graft
from graft.calibration.measuring import tidy
from graft.cli import main
from graft.compiler.trunk import find_trunk
from graft.passes.routing.config import RoutingConfig, read_routers
from graft.passes.routing.parts import take_apart
from graft.training.routers import Router, Sample, bounds_of
from tests.families import build

GENERATOR = torch.Generator().manual_seed(0)
TEXTS = [torch.randint(3, 10, (24,), generator=GENERATOR).tolist() for _ in range(20)]
OPTIONS = graft.RouterOptions(blocks=3, top_k=1, layers=(0, 2), epochs=60, batch=64)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llama")


@pytest.fixture(scope="module")
def trained(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trained") / "routers"
    return folder, graft.train_routers(model, TEXTS, folder, OPTIONS)


@pytest.fixture(scope="module")
def sample(model: PreTrainedModel) -> tuple[torch.Tensor, Sample]:
    """What random inputs give: of each block its part of the first feed-forward, and the sample."""
    function = tidy(model)
    part = take_apart(find_trunk(function.graph).feed_forward[0])
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    config = RoutingConfig(64, 96, (0, 20, 48, 96), (0,), top_k=2)
    mlp, parts = model.model.layers[0].mlp, []
    for start, end in ((0, 20), (20, 48), (48, 96)):
        gate, up = (x @ one.weight[start:end].T for one in (mlp.gate_proj, mlp.up_proj))
        parts.append((mlp.act_fn(gate) * up) @ mlp.down_proj.weight[:, start:end].T)
    return torch.stack(parts, 1).detach(), Sample.of(function, part, config, x)


def test_errors_are_distances_from_the_whole_feed_forward(sample: tuple[torch.Tensor, Sample]) -> None:
    parts, found = sample
    sets = torch.tensor([[1.0, 1, 0], [1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 1]])
    whole = parts.sum(1, keepdim=True)
    expected = ((whole - torch.einsum("nb,tbw->tnw", sets, parts)) ** 2).sum(-1)
    torch.testing.assert_close(found.errors(sets), expected, atol=1e-5, rtol=1e-4)
    chosen = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    mine = found.errors(sets[chosen][:, None])[:, 0]
    torch.testing.assert_close(mine, expected[torch.arange(7), chosen], atol=1e-5, rtol=1e-4)


def test_the_best_set_is_the_nearest_of_all_and_prefixes_keep_to_their_share(
    sample: tuple[torch.Tensor, Sample]
) -> None:
    parts, found = sample
    config = RoutingConfig(64, 96, (0, 20, 48, 96), (0,), top_k=2)
    router = Router(config, found, graft.RouterOptions(blocks=3))
    pairs = list(combinations(range(3), 2))
    left = torch.stack([(parts.sum(1) - parts[:, list(pair)].sum(1)).pow(2).sum(-1) for pair in pairs], 1)
    assert torch.equal(router.best(found), left.argmin(1))
    config = RoutingConfig(64, 96, (0, 20, 48, 96), (0,), prefixes=(0, 1, 3))
    router = Router(config, found, graft.RouterOptions(blocks=3, top_k=None, prefixes=(0, 1, 3), share=0.4))
    shares = torch.tensor([0, 20 / 96, 1.0])
    assert float(shares[router.best(found)].mean()) <= 0.4
    assert router.best(found).unique().numel() > 1


def test_a_trained_router_is_better_than_one_set_for_all_and_no_better_than_the_best(
    trained: tuple[Path, dict[str, Any]]
) -> None:
    folder, figures = trained
    for one in figures["layers"].values():
        assert one["error_of_best"] <= one["error"] < one["error_of_one_set"]
        assert one["neurons"] == pytest.approx(1 / 3, abs=1e-4)
    assert figures["kl"] > 0 and list(figures["layers"]) == ["0", "2"]
    config, _ = read_routers(folder)
    assert (config.bounds, config.layers, config.top_k) == ((0, 32, 64, 96), (0, 2), 1)
    assert json.loads((folder / "config.json").read_text())["figures"] == figures


def test_what_was_trained_is_run_by_the_pass(model: PreTrainedModel, trained: tuple[Path, dict[str, Any]]) -> None:
    fast = graft.compile(model, graft.Plan(target=[graft.RoutedFFN(trained[0])]))
    fast.generate(torch.tensor([TEXTS[0]]), max_new_tokens=8, do_sample=False)
    counts = fast.decoder.executable.skips
    assert len(counts) == 6 and sum(one.skipped_rows for one in counts) == 2 * 2 * counts[0].rows


def test_bounds_are_multiples_of_what_panels_hold() -> None:
    assert bounds_of(1536, 4) == (0, 384, 768, 1152, 1536)
    assert bounds_of(1000, 3) == (0, 320, 672, 1000)
    assert bounds_of(50, 4) == (0, 12, 24, 38, 50)


def test_what_cannot_be_trained_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(graft.PlanError, match="options of routers"):
        graft.RouterOptions(top_k=4)
    with pytest.raises(graft.PlanError, match="measured on others"):
        graft.train_routers(model, TEXTS[:1], tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(graft.CheckpointError, match="folder of their own"):
        graft.train_routers(model, TEXTS, tmp_path)


def test_the_command_line_trains(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(kind: str, *_: Any, **__: Any) -> Any:
        return model if "Model" in kind else lambda text: {"input_ids": [3 + ord(letter) % 90 for letter in text]}

    monkeypatch.setattr("graft.cli.load", loaded)
    (tmp_path / "text.txt").write_text("abcdefghij klmnop qrst " * 8)
    words = ["train-routers", "tiny", "--out", str(tmp_path / "out"), "--data", str(tmp_path / "text.txt")]
    options = ["--length", "32", "--prefixes", "0,1,3", "--blocks", "3", "--layers", "1", "--epochs", "2", "--quiet"]
    assert main([*words, *options]) == 0
    assert json.loads(capsys.readouterr().out)["layers"].keys() == {"1"}
    assert read_routers(tmp_path / "out")[0].prefixes == (0, 1, 3)
