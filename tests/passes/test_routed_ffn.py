"""routed-ffn: the listing in its docstring, plain products as an oracle, and that what no row runs reads no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import graft
from graft.codegen.aten import AtenExecutable
from graft.codegen.cpp.executable import CppExecutable
from graft.codegen.kernel_ir import MatmulKernel
from graft.compiler.capture import capture
from graft.compiler.errors import CheckpointError, PassError
from graft.compiler.passing import View
from graft.compiler.pipeline import run_passes
from graft.compiler.program import DENSE, Function, Program
from graft.passes import routed_ffn
from graft.passes.routed_ffn import RoutedFFN
from graft.passes.routing.config import WEIGHTS, RoutingConfig
from graft.passes.routing.folder import CONFIG
from tests.codegen.functions import call_of, random_states
from tests.families import build
from tests.passes.listings import Sheet, listings, outputs, run, transform
from tests.programs import TIDY, USUAL

WIDTH, NEURONS = 64, 96
BOUNDS = (0, 20, 48, 96)


def write(folder: Path, config: RoutingConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random routers of a kind in a folder."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{at}.weight": torch.randn(config.outputs, config.width, generator=generator) for at in config.layers}
    tensors |= {f"{at}.bias": torch.randn(config.outputs, generator=generator) for at in config.layers}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config.to_json()))
    return tensors


def program_of(model: PreTrainedModel, *passes: Any) -> Program:
    captured = capture(model)
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    run_passes(program, passes, sample=[range(3, 12)])
    return program


def test_the_docstring_shows_what_it_does(tmp_path: Path) -> None:
    tensors = write(tmp_path, RoutingConfig(8, 12, (0, 6, 12), (0,), top_k=1))
    weights = {"table": (11, 8), "scale": (8,), "w_up": (12, 8), "w_down": (8, 12)}
    made = []
    for listing, more in zip(listings(routed_ffn), ({}, {"w_router": (2, 8), "b_router": (2,)}), strict=True):
        sheet = Sheet(DENSE, weights | more)
        sheet["h0"] = sheet["embedding"](sheet["table"], sheet["tokens"])
        sheet["x"] = sheet["mul"](sheet["h0"], sheet["scale"])
        sheet.run(listing)
        made.append(sheet.function(sheet["linear"](sheet["h1"], sheet["table"]), sheet["h1"]))
    function, expected = made
    expected.weights.w_router.data, expected.weights.b_router.data = tensors["0.weight"], tensors["0.bias"]
    for name in weights:
        getattr(expected.weights, name).data = getattr(function.weights, name).data
    assert transform(function, RoutedFFN(tmp_path)).matches == 1
    at = "routers_of_forward.at_0"
    named = [one.replace(f"{at}.weight", "w_router").replace(f"{at}.bias", "b_router") for one in outputs(function)]
    assert named == outputs(expected)
    for found, wanted in zip(run(function), run(expected), strict=True):
        torch.testing.assert_close(found, wanted)


def routed(x: Tensor, mlp: torch.nn.Module, config: RoutingConfig, weight: Tensor, bias: Tensor) -> Tensor:
    """A feed-forward as the papers have it: each row's blocks, one row at a time."""
    out = torch.zeros_like(x)
    for at, row in enumerate(x):
        scores = weight @ row + bias
        if config.top_k is not None:
            chosen = scores.topk(config.top_k).indices.tolist()
        else:
            chosen = range(config.prefixes[int(scores.argmax())])
        for block in chosen:
            part = slice(*config.bounds[block : block + 2])
            if hasattr(mlp, "gate_proj"):
                inner = mlp.act_fn(mlp.gate_proj.weight[part] @ row) * (mlp.up_proj.weight[part] @ row)
                out[at] += mlp.down_proj.weight[:, part] @ inner
            else:
                inner = mlp.act(mlp.c_fc.weight[part] @ row + mlp.c_fc.bias[part])
                out[at] += mlp.c_proj.weight[:, part] @ inner
    return out if hasattr(mlp, "gate_proj") else out + mlp.c_proj.bias


@pytest.mark.parametrize(
    ("family", "choice"),
    [("llama", {"top_k": 2}), ("llama", {"prefixes": (0, 1, 3)}), ("starcoder2", {"prefixes": (1, 2)})],
)
def test_a_row_runs_the_blocks_that_its_router_names(family: str, choice: dict[str, Any], tmp_path: Path) -> None:
    model, config = build(family), RoutingConfig(WIDTH, NEURONS, BOUNDS, (0, 2), **choice)
    tensors = write(tmp_path, config)
    program = program_of(model, *TIDY[:1], RoutedFFN(tmp_path))
    tokens = torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(1))
    for layer in config.layers:
        mlp, router = model.model.layers[layer].mlp, (tensors[f"{layer}.weight"], tensors[f"{layer}.bias"])
        mlp.forward = lambda x, mlp=mlp, router=router: routed(x[0], mlp, config, *router)[None]
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        found = program["forward"].module()(tokens, torch.arange(9)[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> CppExecutable:
    """A model in bfloat16 whose feed-forwards run none, one or all of three blocks for a row."""
    folder = tmp_path_factory.mktemp("routers")
    write(folder, RoutingConfig(WIDTH, NEURONS, BOUNDS, (0, 1, 2), prefixes=(0, 1, 3)))
    program = program_of(build("llama", dtype=torch.bfloat16), *USUAL[:1], RoutedFFN(folder), *USUAL[1:])
    with torch.no_grad():
        return CppExecutable(program["forward"], threads=1)


def test_a_block_that_no_row_runs_reads_no_weights(lowered: CppExecutable) -> None:
    products = [kernel for kernel in lowered.cut.kernels if isinstance(kernel, MatmulKernel) and kernel.guard]
    assert len(products) == 2 * 3 * 3  # in each of three layers three blocks of gate with up, and down
    assert {kernel.columns for kernel in products} == {None, *((start, NEURONS) for start in BOUNDS[:-1])}
    aten = AtenExecutable(lowered.function)
    inputs, _ = call_of([(0, (-1, 0, 1)), (2, (-1,))], (3, 0, 5, 0))
    results = []
    for executable in (lowered, aten):
        executable.forget_skips()
        results.append(executable(*inputs, *random_states(lowered.function)))
    assert [one.skipped_rows for one in lowered.skips] == [one.skipped_rows for one in aten.skips]
    weights = 2 * 3 * WIDTH * NEURONS  # bytes of one feed-forward
    assert sum(one.weights for one in lowered.skips) == sum(one.weights for one in aten.skips) == 3 * weights
    torch.testing.assert_close(results[0][0], results[1][0], atol=0.1, rtol=0.05)
    alone, _ = call_of([(2, (-1,))], (3, 0, 5, 0))
    alone[0] = inputs[0][3:]
    lowered.forget_skips()
    single = lowered(*alone, *random_states(lowered.function))
    assert 0 < sum(one.skipped_calls for one in lowered.skips) < 9
    assert torch.equal(single[0][0], results[0][0][3])  # a row's result does not depend on what others run


def test_it_drafts_without_changing_the_output(tmp_path: Path) -> None:
    write(tmp_path, RoutingConfig(WIDTH, NEURONS, BOUNDS, (0, 1, 2), top_k=2))
    model, tokens = build("llama"), torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(0))
    plan = graft.Plan(draft=[graft.SelfDraft(RoutedFFN(tmp_path))], controller=graft.FixedBudget())
    fast = graft.compile(model, plan)
    plain = model.generate(tokens, max_new_tokens=20, do_sample=False)
    assert fast.generate(tokens, max_new_tokens=20, do_sample=False).tolist() == plain.tolist()
    assert fast.stats["drafted"] > 0 and "self_draft" in fast.report().rpartition("Skipping")[2]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bounds": (0, 21, 96)}, "description of routers"),
        ({"prefixes": (0, 1)}, "description of routers"),
        ({"intermediate": 128, "bounds": (0, 20, 128)}, "not for this model"),
        ({"layers": (0, 7)}, "not fit their description"),
    ],
)
def test_routers_that_do_not_fit_are_refused(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    config = RoutingConfig(WIDTH, NEURONS, BOUNDS, (0,), top_k=2)
    tensors = write(tmp_path, config)
    if "bounds" in change and problem == "not for this model":
        save_file({name: tensor[:2].clone() for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
        change = {**change, "top_k": 1}
    (tmp_path / CONFIG).write_text(json.dumps({**config.to_json(), **change}))
    with pytest.raises(CheckpointError, match=problem):
        RoutedFFN(tmp_path).run(View(tidy_copy("llama"), "routed-ffn"))


def test_what_is_not_a_dense_feed_forward_is_refused(tmp_path: Path) -> None:
    write(tmp_path, RoutingConfig(WIDTH, NEURONS, BOUNDS, (0,), top_k=2))
    with pytest.raises(PassError, match="cannot be cut into blocks of neurons"):
        RoutedFFN(tmp_path).run(View(tidy_copy("mixtral"), "routed-ffn"))
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        RoutedFFN(tmp_path).run(View(tidy_copy("llama"), "routed-ffn"))


def tidy_copy(family: str) -> Program:
    from tests.programs import program_of

    return program_of(family, TIDY).copy()
