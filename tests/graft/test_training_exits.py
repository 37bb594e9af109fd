"""Training Kangaroo's adapter and exit classifiers: the loss falls, what comes out is used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from graft.compiler.drafting import Context
from graft.runtime.decoder import Rows
from graft.runtime.split import split_of
from graft.training import TrainOptions, train_heads
from graft.training.exits import Exit, TrainedAdapter, chain_length
from graft.training.features import Sample
from tests.families import build
from tests.graft.test_self_draft import kangaroo_reference
from tests.graft.test_training import Interrupted, stop_at, texts

OPTIONS = TrainOptions(kind="kangaroo", heads=3, layer=1, length=24, new_tokens=16, labels=8, batch=96, epochs=5,
                       held_out=0.2, rate=0.01, patience=5)  # fmt: skip
SAMPLE = [range(3, 9)]
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module")
def compiled() -> graft.CompiledModel:
    return graft.compile(build("llama", eos_token_id=None), graft.Plan(sample=SAMPLE), backend="aten")


def plan(**parts: Any) -> graft.CompiledModel:
    return graft.compile(build("llama", eos_token_id=None), graft.Plan(sample=SAMPLE, **parts), backend="aten")


@pytest.fixture(scope="module", params=["kangaroo", "acceptance", "exit-classifier"])
def trained(
    request: pytest.FixtureRequest, compiled: graft.CompiledModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    folder, said = tmp_path_factory.mktemp("trained") / "out", list[str]()
    options = replace(OPTIONS, kind=request.param)
    with pytest.raises(Interrupted):
        train_heads(compiled, texts(), folder, options, say=stop_at("held-out", 2))
    train_heads(compiled, texts(), folder, options, name="tiny", say=said.append)
    return folder, said


def test_the_loss_falls_and_what_comes_out_is_used(
    trained: tuple[Path, list[str]], compiled: graft.CompiledModel, tmp_path: Path
) -> None:
    folder, said = trained
    data = json.loads((folder / "config.json").read_text())
    losses = [float(line.split("held-out loss ")[1].split(",")[0]) for line in said if "held-out" in line]
    assert data["figures"]["loss"] == pytest.approx(min(losses), abs=1e-3) and losses[-1] < losses[0]
    assert data["layer"] == 1 and data["training"]["data"] == texts().digest
    ids = torch.tensor([texts().prompts[0]])
    if data["training"]["kind"] == "kangaroo":
        fast = plan(draft=[graft.Kangaroo(str(folder), layer=1, eta=0.0)], controller=graft.FixedBudget(3))
        assert fast.generate(ids, **GREEDY).equal(compiled.generate(ids, **GREEDY))
        assert fast.stats["accepted"] > 0
        with pytest.raises(graft.CheckpointError, match="another exit"):
            plan(draft=[graft.Kangaroo(str(folder), layer=2)])
        return
    if data["training"]["kind"] == "acceptance":
        spec = graft.LayerSkip(1, acceptance=str(folder), threshold=0.99)
        fast = plan(draft=[spec], controller=graft.FixedBudget(3))
        assert fast.generate(ids, **GREEDY).equal(compiled.generate(ids, **GREEDY))
        assert fast.stats["drafted"] > 0
        with pytest.raises(graft.CheckpointError, match="does not fit"):
            plan(draft=[graft.LayerSkip(2, acceptance=str(folder))])
        with pytest.raises(graft.PlanError, match="by itself"):
            graft.LayerSkip(1, eta=0.5, acceptance=str(folder))
        assert_judged_by_the_equations(fast, spec, load_file(folder / "acceptance.safetensors"))
        return
    never, always = (plan(target=[graft.ConfidenceExit(1, at, str(folder))]) for at in (1.0, 1e-6))
    assert never.generate(ids, **GREEDY).equal(compiled.generate(ids, **GREEDY))
    exit_ = plan(target=[graft.EarlyExit(1)])
    assert always.generate(ids, **GREEDY).equal(exit_.generate(ids, **GREEDY))
    with pytest.raises(graft.CheckpointError, match="does not fit"):
        plan(target=[graft.ConfidenceExit(2, 0.5, str(folder))])
    with pytest.raises(graft.CheckpointError, match="no exit classifier"):
        plan(target=[graft.ConfidenceExit(1, 0.5, str(tmp_path))])


def assert_judged_by_the_equations(fast: graft.CompiledModel, spec: graft.LayerSkip, tensors: dict[str, Any]) -> None:
    """Every drafted token's chance, against the head's equations on transformers' stream; then the rule that stops."""
    model, text = build("llama", eos_token_id=None), [5, 6, 7, 8, 9]
    chances: list[float] = []
    for threshold in (1.0, 0.5):
        drafting: Any = replace(spec, threshold=threshold).open(fast.decoder, graft.Chain())
        slot, rows = fast.decoder.open(), Rows()
        rows.add_chain(slot, text[:-1], 0)
        fast.decoder.forward(rows)
        fast.decoder.commit(slot, range(4))
        (tree,) = drafting.propose([Context(list(text), 5, {"slot": slot})], [4])
        split_of(fast.decoder).forget(slot)
        fast.decoder.close(slot)
        if threshold < 1:
            products = torch.tensor(chances).cumprod(0)
            assert len(tree) == min(4, 1 + int((1 - products <= threshold).sum()))
            continue
        for node, chance in enumerate(tree.probabilities):
            ids = torch.tensor([[*text, *tree.tokens[:node]]])
            with torch.no_grad():
                x = model.model(ids, output_hidden_states=True).hidden_states[1][0, -1]
            x = x / (x.pow(2).mean() + 1e-6).sqrt()
            x = x + torch.nn.functional.silu(tensors["model.0.linear.weight"] @ x + tensors["model.0.linear.bias"])
            expected = (tensors["model.1.weight"] @ x + tensors["model.1.bias"]).softmax(-1)[1]
            assert chance == pytest.approx(float(expected), abs=1e-5)
            chances.append(chance)


def test_a_classifier_decides_by_its_own_line(compiled: graft.CompiledModel, tmp_path: Path) -> None:
    """Rows that it is sure of have the exit's logits, the others the whole model's where no row above left."""
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    save_file({"weight": weight, "bias": torch.zeros(1)}, tmp_path / "classifier.safetensors")
    (tmp_path / "config.json").write_text('{"layer": 1}')
    model = build("llama", eos_token_id=None)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
    with torch.no_grad():
        stream = model.model(tokens, output_hidden_states=True).hidden_states[1]
        share = (model.model.norm(stream) @ weight.T).sigmoid()[0, :, 0]
        early = model.lm_head(model.model.norm(stream))[0]
    threshold = float(share.median())
    fast = plan(target=[graft.ConfidenceExit(1, threshold, str(tmp_path))])
    dense = fast.program.snapshots["common-subexpression"]["forward"].module()
    found = dense(tokens, torch.arange(7)[None])[0][0]
    same = [torch.allclose(one, other, atol=1e-4) for one, other in zip(found, early, strict=True)]
    assert same == (share >= threshold).tolist() and 0 < sum(same) < 7


def test_what_is_trained_are_kangaroos_equations_on_the_targets_own_stream(compiled: graft.CompiledModel) -> None:
    adapter, tokens = TrainedAdapter(compiled, OPTIONS), [5, 6, 7, 8, 9, 10]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in adapter.network.named().values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    batch = [Sample(torch.tensor(tokens), Exit(compiled, 1).stream(tokens), torch.zeros(6, 1).long(), torch.ones(6, 1))]
    expected = kangaroo_reference(tokens, {name: one.double() for name, one in adapter.network.named().items()}, 1)
    torch.testing.assert_close(adapter.logits(batch).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_chain_is_as_long_as_its_guesses_are_right_in_a_row() -> None:
    assert chain_length([torch.tensor([True, True, False, True])], 2) == pytest.approx((2 + 1 + 0) / 3)
    assert chain_length([torch.tensor([True])], 2) == 0.0


def test_the_files_are_named_by_the_paper(trained: tuple[Path, list[str]]) -> None:
    folder, _ = trained
    names = {path.name for path in folder.iterdir()}
    if "adapter.safetensors" in names:
        assert {"layers.0.self_attn.q_proj.weight", "layers.0.input_layernorm.weight", "norm.weight"} <= set(
            load_file(folder / "adapter.safetensors")
        )
    assert len(names) == 2 and names & {"adapter.safetensors", "acceptance.safetensors", "classifier.safetensors"}
