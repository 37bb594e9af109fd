"""Training draft heads: the loss falls, a run can be interrupted, and what comes out drafts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import graft
from graft.cli import main
from graft.passes.heads.dialects import WEIGHTS, read_heads
from graft.training import TrainOptions, run, train_heads
from graft.training import features as module
from graft.training.features import Sample, Texts
from graft.training.networks import HeadsNetwork
from graft.training.steps import Places
from tests.families import build
from tests.heads import HYDRA, MEDUSA, PREFIXED, SMALL, random_tensors, reference_logits, reference_prefix

OPTIONS = TrainOptions(heads=2, vocabulary=60, length=24, new_tokens=16, labels=8, batch=96, epochs=6, held_out=0.2,
                       rate=0.02, patience=6)  # fmt: skip


@pytest.fixture(scope="module")
def compiled() -> graft.CompiledModel:
    return graft.compile(build("llama", eos_token_id=None), graft.Plan(sample=[range(3, 9)]), backend="aten")


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SHARD", 120)
        yield


def texts() -> Texts:
    """Documents that repeat, and prompts."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(3, 40, (7,), generator=generator).tolist()
    prompts = tuple(tuple(torch.randint(3, 131, (4 + place,), generator=generator).tolist()) for place in range(9))
    return Texts((tuple(pattern * 60),), prompts)


@pytest.fixture(scope="module")
def trained(compiled: graft.CompiledModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder, said = tmp_path_factory.mktemp("trained") / "heads", list[str]()
    train_heads(compiled, texts(), folder, OPTIONS, name="tiny", say=said.append)
    return folder, said


def test_the_loss_falls_and_the_figures_are_kept(trained: tuple[Path, list[str]]) -> None:
    folder, said = trained
    steps = [float(line.rpartition(" ")[2]) for line in said if ", step " in line]
    assert sum(steps[-5:]) < 0.8 * sum(steps[:5])
    data = json.loads((folder / "config.json").read_text())
    assert data["training"]["model"] == "tiny" and data["training"]["data"] == texts().digest
    assert len(data["figures"]["top_1"]) == 2 and data["figures"]["places"] > 0
    assert 1 < data["figures"]["tokens_per_step"] <= data["figures"]["with_tree"] <= 3
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]


def test_what_comes_out_drafts_for_the_model(trained: tuple[Path, list[str]], compiled: graft.CompiledModel) -> None:
    plan = graft.Plan(draft=[graft.Heads(trained[0])], controller=graft.FixedBudget(), sample=[range(3, 9)])
    fast = graft.compile(build("llama", eos_token_id=None), plan, backend="aten")
    ids = torch.tensor([texts().prompts[0]])
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    assert fast.generate(ids, **options).equal(compiled.generate(ids, **options))
    assert fast.stats["accepted"] > 0


class Interrupted(Exception):
    pass


def stop_at(text: str, times: int) -> Callable[[str], None]:
    """Raises when a line with this text is said for the so-manieth time."""
    left = [times]

    def say(line: str) -> None:
        left[0] -= text in line
        if left[0] == 0:
            raise Interrupted

    return say


def test_a_run_that_was_interrupted_gives_the_same_heads(
    trained: tuple[Path, list[str]], compiled: graft.CompiledModel, tmp_path: Path
) -> None:
    folder = tmp_path / "heads"
    for text, times in (("hidden states", 2), (", step", 3), (", step", 9), ("held-out", 2)):
        with pytest.raises(Interrupted):
            train_heads(compiled, texts(), folder, OPTIONS, name="tiny", say=stop_at(text, times))
        assert (folder / "training").is_dir() and not (folder / "config.json").exists()
    train_heads(compiled, texts(), folder, OPTIONS, name="tiny")
    assert (folder / "config.json").read_text() == (trained[0] / "config.json").read_text()
    found, expected = (load_file(one / WEIGHTS) for one in (folder, trained[0]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_of_other_options_or_into_a_used_folder_is_refused(
    trained: tuple[Path, list[str]], compiled: graft.CompiledModel, tmp_path: Path
) -> None:
    with pytest.raises(graft.CheckpointError, match="a folder of their own"):
        train_heads(compiled, texts(), trained[0], OPTIONS)
    with pytest.raises(Interrupted):
        train_heads(compiled, texts(), tmp_path / "new", OPTIONS, say=stop_at("hidden", 1))
    with pytest.raises(graft.CheckpointError, match="another training run"):
        train_heads(compiled, texts(), tmp_path / "new", replace(OPTIONS, rate=0.5))
    with pytest.raises(graft.CheckpointError, match="too little text"):
        train_heads(compiled, Texts((tuple(range(3, 20)),)), tmp_path / "little", OPTIONS)


def test_training_ends_when_it_no_longer_helps(compiled: graft.CompiledModel, tmp_path: Path) -> None:
    said: list[str] = []
    options = replace(OPTIONS, rate=1e-12, epochs=50, patience=1, kind="medusa", unembedding="shared")
    train_heads(compiled, texts(), tmp_path / "heads", options, say=said.append)
    assert sum("held-out" in line for line in said) < 10
    assert read_heads(tmp_path / "heads")[0].unembedding == "shared"


@pytest.mark.parametrize(
    "config", [SMALL, replace(HYDRA, unembedding="shared", biased=False), replace(MEDUSA, unembedding="shared"),
               replace(PREFIXED, unembedding="shared", biased=False)],
    ids=["reduced", "hydra", "medusa", "hydra++"],
)  # fmt: skip
def test_what_is_trained_are_the_published_equations(config: Any) -> None:
    tensors = random_tensors(config)
    own, table = torch.randn(131, 64), torch.randn(131, 64)
    network = HeadsNetwork(config, own[tensors["draft_vocabulary"]] if config.reduced else own, 0)
    with torch.no_grad():
        for name, tensor in network.named().items():
            tensor.copy_(tensors[name])
    tokens = torch.randint(131, (2, 9))
    batch = [Sample(one, torch.randn(9, 64), torch.zeros(9, 1).long(), torch.ones(9, 1)) for one in tokens]
    places = Places(network, batch, table)
    states = [reference_prefix(config.prefix, tensors, one.hidden) if config.prefix else one.hidden for one in batch]
    rows = 9 - config.heads - 1
    for head in range(config.heads):
        expected: list[Tensor] = []
        for one, state in zip(batch, states, strict=True):
            embedded = [table[one.tokens[1 + back : 1 + back + rows]] for back in range(head + 1)]
            expected.append(reference_logits(config, tensors, head, state[:rows], embedded, own))
        torch.testing.assert_close(places.logits(network, head), torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_options_that_cannot_be_are_refused() -> None:
    for wrong in ({"heads": 0}, {"held_out": 1.0}, {"kind": "medusa", "prefix": True}, {"length": 3}):
        with pytest.raises(graft.PlanError, match="options of training"):
            TrainOptions(**wrong)  # type: ignore[arg-type]


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"other": 1}\n')
    for name in ("bad.jsonl", "none.txt"):
        with pytest.raises(graft.CheckpointError, match=name):
            module.read_texts([tmp_path / name], None)


def test_the_command_line_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen: list[Any] = []

    def train(compiled: Any, texts: Texts, folder: str, options: TrainOptions, **_: Any) -> dict[str, Any]:
        seen.append((texts, folder, options))
        return {"loss": 1.0}

    def words(text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    class Tokenizer:
        chat_template = None
        __call__ = staticmethod(words)

    monkeypatch.setattr(run, "train_heads", train)
    monkeypatch.setattr("graft.training.train_heads", train)
    monkeypatch.setattr("graft.compiling.compile", lambda *_, **__: None)
    monkeypatch.setattr(
        "graft.cli.load", lambda kind, *_, **__: Tokenizer() if kind == "AutoTokenizer" else torch.nn.Linear(1, 1)
    )
    (tmp_path / "text.txt").write_text("a bb ccc")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a b"}\n{"turns": ["a bb", "c"]}\n')
    files = [str(tmp_path / "text.txt"), str(tmp_path / "prompts.jsonl")]
    assert main(["train-heads", "m", "--out", "o", "--heads", "3", "--quiet", "--device", "cpu", "--data", *files]) == 0
    ((found, folder, options),) = seen
    assert found == Texts(((1, 2, 3),), ((1, 1), (1, 2))) and folder == "o"
    assert options == TrainOptions(heads=3)
    assert json.loads(capsys.readouterr().out) == {"loss": 1.0}
