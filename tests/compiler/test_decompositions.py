"""Functional operators, by rewriting nodes where that is possible and by tracing again where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graft.compiler import decompositions
from graft.compiler.decompositions import functional, is_plain, is_write

NORM = nn.LayerNorm(8, eps=1e-3)


def chained_writes(x: Tensor) -> Tensor:
    y = x * 2
    y.clamp_(min=-1.0).add_(3.0)
    return y * 5


def write_after_reading(x: Tensor) -> Tensor:
    y = x * 2
    before = y + 1
    y.mul_(3.0)
    return before + y


def write_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    y[..., :4].mul_(3.0)
    return y + 1


def write_seen_by_a_view(x: Tensor) -> Tensor:
    y = x * 2
    view = y.transpose(0, 1)
    y.mul_(3.0)
    return view + 1


def write_to_the_input(x: Tensor) -> Tensor:
    y = x.clone()
    y.copy_(x * 3)
    return y


def norms(x: Tensor) -> Tensor:
    return NORM(NORM(x)) + torch.rms_norm(x, [8])


def casts(x: Tensor) -> Tensor:
    return x.float().to(torch.float64).to(torch.float64).to(x.device).float().to(x)


def views(x: Tensor) -> Tensor:
    left, right = x.reshape(x.shape[0], -1, 2, 4).flatten(-2).chunk(2, dim=-1)
    return torch.cat([right, left], dim=-1).contiguous().flatten(0, 1)


CASES: list[tuple[Callable, bool]] = [
    (chained_writes, True),
    (write_after_reading, True),
    (write_through_a_view, False),
    (write_seen_by_a_view, False),
    (norms, True),
    (casts, True),
    (views, True),
]


def exported(function: Callable, x: Tensor) -> torch.export.ExportedProgram:
    """The function as export leaves it, first two sizes dynamic."""

    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with torch.no_grad():
        return torch.export.export(Module(), (x,), dynamic_shapes=(auto,), strict=False)


@pytest.mark.parametrize(("function", "by_node"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_the_result_is_functional_and_means_the_same(
    function: Callable, by_node: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    program = exported(function, x)
    again: list[int] = []
    trace = torch.export.ExportedProgram.run_decompositions
    monkeypatch.setattr(
        torch.export.ExportedProgram, "run_decompositions", lambda *args: again.append(1) or trace(*args)
    )
    result = functional(program)
    assert bool(again) != by_node
    assert not any(is_write(node) for node in result.graph.nodes)
    assert not {node.target for node in result.graph.nodes} & set(decompositions.decompositions())
    assert all("val" in node.meta for node in result.graph.nodes if node.op == "call_function")
    other = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(1))
    for sample in (x, other):
        torch.testing.assert_close(result.module(check_guards=False)(sample), function(sample), rtol=1e-5, atol=1e-5)


def test_a_write_to_an_input_is_not_rewritten_by_node() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2.0) + 1

    program = torch.export.export(Module(), (torch.ones(3),), strict=False)
    assert not all(is_plain(node) for node in program.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_come_apart_into_what_aten_computes(dtype: torch.dtype, affine: bool) -> None:
    x = (torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1).to(dtype)
    weight, bias = (torch.linspace(0.5, 2, 8).to(dtype), torch.linspace(-1, 1, 8).to(dtype)) if affine else (None, None)
    limit = 4 * torch.finfo(dtype).eps
    found, expected = decompositions.layer_norm(x, [8], weight, bias), torch.layer_norm(x, [8], weight, bias)
    assert ((found - expected).abs() <= limit * expected.abs().clamp(min=1)).all()
    for eps in (None, 1e-3):
        found, expected = decompositions.rms_norm(x, [8], weight, eps), torch.rms_norm(x, [8], weight, eps)
        assert found.dtype == dtype
        assert ((found - expected).abs() <= limit * expected.abs().clamp(min=1)).all()
