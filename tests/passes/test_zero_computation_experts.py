"""zero-computation-experts: the listing in its docstring, and mixtures in plain torch as an oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from graft.codegen.cpp.executable import CppExecutable
from graft.codegen.kernel_ir import AtenKernel
from graft.compiler.capture import capture
from graft.compiler.errors import CheckpointError, PassError
from graft.compiler.passing import View
from graft.compiler.program import DENSE, Function, Program
from graft.passes import zero_computation_experts
from graft.passes.mixture.config import WEIGHTS, ZeroComputationConfig
from graft.passes.routing.folder import CONFIG
from graft.passes.zero_computation_experts import ZeroComputationExperts
from tests.codegen.compiled import LENGTHS, TREES, assert_same_step
from tests.codegen.functions import call_of
from tests.families import build
from tests.passes.listings import Sheet, listings, outputs, run, transform
from tests.programs import USUAL, program_of

ALL = ZeroComputationConfig(zero=1, copy=2, constant=2, layers=(0, 2))


def write(folder: Path, config: ZeroComputationConfig, width: int = 64) -> dict[str, Tensor]:
    """Random experts of a kind in a folder."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"router": config.count, "mix": 2 * config.constant, "vectors": config.constant}
    tensors = {
        f"{layer}.{name}": 0.2 * torch.randn(size, width, generator=generator)
        for layer in config.layers
        for name, size in sizes.items()
        if size
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config.to_json()))
    return tensors


def test_the_docstring_shows_what_it_does(tmp_path: Path) -> None:
    tensors = write(tmp_path, ZeroComputationConfig(1, 1, 1, (0,)), width=8)
    weights = {"table": (11, 8), "scale": (8,), "w_router": (4, 8), "w_up": (4, 12, 8), "w_down": (4, 8, 12)}
    names = {"w_more": "router", "w_mix": "mix", "vectors": "vectors"}
    made = []
    for listing, more in zip(listings(zero_computation_experts), ({}, names), strict=True):
        sheet = Sheet(DENSE, weights | {name: tuple(tensors[f"0.{path}"].shape) for name, path in more.items()})
        sheet["h0"] = sheet["embedding"](sheet["table"], sheet["tokens"])
        sheet["x"] = sheet["mul"](sheet["h0"], sheet["scale"])
        sheet.run(listing)
        made.append(sheet.function(sheet["linear"](sheet["h1"], sheet["table"]), sheet["h1"]))
    function, expected = made
    for name, path in names.items():
        getattr(expected.weights, name).data = tensors[f"0.{path}"]
    for name in weights:
        getattr(expected.weights, name).data = getattr(function.weights, name).data
    assert transform(function, ZeroComputationExperts(tmp_path)).matches == 1
    named = outputs(function)
    for name, path in names.items():
        named = [one.replace(f"zero_computation_experts_of_forward.at_0.{path}", name) for one in named]
    assert named == outputs(expected)
    for found, wanted in zip(run(function), run(expected), strict=True):
        torch.testing.assert_close(found, wanted)


def reference(block: nn.Module, router: Tensor, softmax_first: bool, given: dict[str, Tensor]) -> Any:
    """A mixture's forward in plain torch, one token and slot at a time, with two experts a token."""
    experts, count = block.experts, len(block.experts.down_proj)

    def one(x: Tensor, expert: int) -> Tensor:
        if expert < count:
            gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
            return experts.down_proj[expert] @ (nn.functional.silu(gate) * up)
        kind = expert - count
        if kind < ALL.zero:
            return torch.zeros_like(x)
        if kind < ALL.zero + ALL.copy:
            return x
        at = kind - ALL.zero - ALL.copy
        a = torch.softmax(given["mix"][2 * at : 2 * at + 2] @ x, 0)
        return a[0] * x + a[1] * given["vectors"][at]

    def forward(hidden: Tensor) -> Tensor:
        rows = torch.cat([router, given["router"]]) if given else router
        out = torch.zeros_like(hidden.reshape(-1, hidden.shape[-1]))
        for token, x in enumerate(hidden.reshape(-1, hidden.shape[-1])):
            scores = rows @ x
            best = (torch.softmax(scores, 0) if softmax_first else scores).topk(2)
            gates = best.values / best.values.sum() if softmax_first else torch.softmax(best.values, 0)
            seen.update(best.indices.tolist())
            out[token] = sum(gate * one(x, int(expert)) for gate, expert in zip(gates, best.indices, strict=True))
        return out.reshape(hidden.shape)

    seen: set[int] = set()
    forward.seen = seen  # type: ignore[attr-defined]
    return forward


@pytest.mark.parametrize(
    ("family", "mixture", "router", "softmax_first"),
    [("mixtral", "mlp", "gate", True), ("granitemoe", "block_sparse_moe", "router", False)],
)
def test_a_token_gets_what_the_experts_that_it_chose_give(
    tmp_path: Path, family: str, mixture: str, router: str, softmax_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, model = write(tmp_path, ALL), build(family)
    captured = capture(model)
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    for one in (*USUAL[:1], ZeroComputationExperts(tmp_path), *USUAL[1:3]):
        one.run(View(program, one.pass_name()))
    tokens = torch.randint(3, 131, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = program["forward"].copy().module()(tokens, torch.arange(7).expand(3, 7).contiguous())[0]
        for number, layer in enumerate(model.model.layers):
            block = getattr(layer, mixture)
            given = {path[2:]: one for path, one in tensors.items() if path.startswith(f"{number}.")}
            forward = reference(block, getattr(block, router).weight, softmax_first, given)
            monkeypatch.setattr(block, "forward", forward)
        expected = model(input_ids=tokens, use_cache=False).logits
    seen = set().union(*(getattr(layer, mixture).forward.seen for layer in model.model.layers))
    assert seen == set(range(4 + ALL.count))
    assert (logits - expected).abs().max() <= 1e-5
    if family == "mixtral":
        for one in USUAL[3:]:
            one.run(View(program, one.pass_name()))
        with torch.no_grad():
            executable = CppExecutable(program["forward"])
        assert not [kernel for kernel in executable.cut.kernels if isinstance(kernel, AtenKernel)]
        assert_same_step(executable, program["forward"], call_of(TREES, LENGTHS))


def test_other_mixtures_and_wrong_experts_are_refused(tmp_path: Path) -> None:
    def apply(family: str) -> None:
        program = program_of(family, USUAL[:1]).copy()
        ZeroComputationExperts(tmp_path).run(View(program, "zero-computation-experts"))

    with pytest.raises(CheckpointError, match="cannot be read"):
        apply("mixtral")
    write(tmp_path, ZeroComputationConfig(1, 1, 0, (0,)))
    with pytest.raises(PassError, match="cannot have experts that compute nothing"):
        apply("deepseek_v3")
    with pytest.raises(CheckpointError, match="not as many mixtures"):
        apply("llama")
    write(tmp_path, ZeroComputationConfig(1, 1, 0, (0,)), width=32)
    with pytest.raises(CheckpointError, match=r"(?s)do not fit.*0\.router \[2, 64\].*0\.router \[2, 32\]"):
        apply("mixtral")
    (tmp_path / CONFIG).write_text(json.dumps(ALL.to_json() | {"zero": 0, "copy": 0, "constant": 0}))
    with pytest.raises(CheckpointError, match="description of zero-computation experts is not right"):
        apply("mixtral")
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match="this is no folder of zero-computation experts"):
        apply("mixtral")
