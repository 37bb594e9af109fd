"""Every scalar operator and reduction as generated C++, against torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from graft.codegen.cpp.isa import Isa, runnable
from graft.codegen.scalar_ops import REDUCERS, TREES
from graft.compiler.canonical import aten
from tests.codegen.rows import Library, Rows

WIDTHS = (1, 7, 16, 37)
ROWS = 9
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EXTREME = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 3e38, -3e38, 1e-40, 88.8, -104.2, 0.625, 20.0, 65504.0)

# Arguments besides x; "y", "c" (a mask) and "p" (positive numbers) stand for other inputs.
ARGUMENTS: dict[Any, list[tuple[Any, ...]]] = {
    **{target: [("x",)] for target in TREES},
    aten.add.Tensor: [("x", "y"), ("x", 0.3)], aten.sub.Tensor: [("x", "y"), ("x", 0.3)],
    aten.rsub.Scalar: [("x", 1.5)], aten.mul.Tensor: [("x", "y"), ("x", -0.7)], aten.div.Tensor: [("x", "y")],
    aten.pow.Tensor_Scalar: [("x", one) for one in (2, 3.0, -1, -2)] + [("p", one) for one in (0.5, -0.5, 1.7)],
    aten.pow.Tensor_Tensor: [("p", "y")], aten.pow.Scalar: [(2.5, "x")],
    aten.softplus.default: [("x",), ("x", 2.0, 3.0)],
    aten.clamp.default: [("x", -0.5, 0.75), ("x", -0.5), ("x", None, 0.75)],
    aten.clamp_min.default: [("x", 0.25)],
    **{one: [("x", "y")] for one in (aten.minimum.default, aten.maximum.default, aten.min.other, aten.max.other)},
    aten.where.self: [("c", "x", "y")], aten.masked_fill.Scalar: [("x", "c", -math.inf), ("x", "c", 2)],
    **{one: [("x", 0.0)] for one in (aten.eq.Scalar, aten.ne.Scalar)},
    **{one: [("x", 0.5)] for one in (aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar)},
    **{one: [("x", "y")] for one in (aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor)},
    aten.logical_not.default: [("x",), ("c",)],
}
KEYWORDS: dict[Any, list[dict[str, Any]]] = {
    aten.gelu.default: [{}, {"approximate": "tanh"}],
    aten._to_copy.default: [{"dtype": dtype} for dtype in DTYPES],
    aten.add.Tensor: [{}, {"alpha": 2}],
    aten.sub.Tensor: [{}, {"alpha": 0.5}],
}

# Operations that IEEE defines to the last bit, and those that only choose.
EXACT = frozenset(
    {aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.mul.Tensor, aten.div.Tensor, aten.neg.default}
    | {aten.abs.default, aten.floor.default, aten.relu.default, aten.reciprocal.default}
    | {aten.clamp.default, aten.clamp_min.default, aten.minimum.default, aten.maximum.default, aten.min.other}
    | {aten.max.other, aten.where.self, aten.masked_fill.Scalar, aten.logical_not.default, aten._to_copy.default}
    | {aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar, aten.gt.Tensor, aten.ge.Scalar, aten.ge.Tensor}
    | {aten.lt.Scalar, aten.lt.Tensor, aten.le.Scalar, aten.le.Tensor}
)
ULPS = {torch.float32: 8, torch.float64: 16, torch.bfloat16: 1, torch.float16: 1}
"""Units in the last place between two good implementations: of one function in float32 and float64 (several for the
composed ones), of one rounding in the narrow dtypes."""


def values(rows: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random numbers of many sizes, with the extreme ones among them."""
    generator = torch.Generator().manual_seed(width)

    def numbers() -> Tensor:
        spread = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        spread *= 10.0 ** torch.randint(-3, 2, (rows, width), generator=generator)
        places = torch.randperm(rows * width, generator=generator)[: min(len(EXTREME), rows * width // 3)]
        spread.view(-1)[places] = torch.tensor(EXTREME, dtype=torch.float64)[: len(places)]
        return spread.to(dtype)

    x, y = numbers(), numbers()
    return {"x": x, "y": y, "c": torch.rand(rows, width, generator=generator) < 0.5, "p": numbers().abs()}


def part(width: int, dtype: torch.dtype) -> tuple[Rows, list[fx.Node]]:
    """Every operator over rows of `width` elements."""
    rows = Rows()
    given = {name: rows.input(value) for name, value in values(ROWS, width, dtype).items()}
    nodes = []
    for target, choices in ARGUMENTS.items():
        for chosen in choices:
            args = [given[one] if isinstance(one, str) else one for one in chosen]
            nodes += [rows.call(target, *args, **options) for options in KEYWORDS.get(target, [{}])]
    for target in REDUCERS:
        nodes += [rows.call(target, given["x"], [-1]), rows.call(target, given["y"], [-1], True)]
        nodes.append(rows.call(target, rows.call(aten.mul.Tensor, given["x"], 2), [1], True))
    for source in (given["x"], nodes[0]):
        nodes.append(rows.call(aten.softmax.int, source, -1))
        nodes.append(rows.call(aten._softmax.default, source, 1, False))
    return rows, nodes


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def library(request: pytest.FixtureRequest) -> Library:
    return Library([part(width, request.param) for width in WIDTHS])


def described(node: fx.Node) -> str:
    return f"{node.target} of {node.args} {node.kwargs}"


def ulps(found: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """The largest difference in units in the last place of the expected value, or of `size`; NaN and infinite values
    have to be the same."""
    same = (found == expected) | (found.isnan() & expected.isnan())
    info = torch.finfo(expected.dtype)
    unit = torch.clamp((expected if size is None else size).double().abs(), min=info.smallest_normal) * info.eps
    unit = torch.where(unit.isfinite(), unit, 0.0)
    gap = torch.where(same, 0.0, (found.double() - expected.double()).abs() / unit)
    return gap.nan_to_num(nan=math.inf).max().item()


@pytest.mark.parametrize("at", range(len(WIDTHS)), ids=[f"width {width}" for width in WIDTHS])
def test_every_operator_is_that_of_torch(library: Library, at: int) -> None:
    rows, nodes = library.parts[at]
    found = library.run(at, [rows.values[node] for node in rows.inputs])
    wrong = []
    for node, result in zip(nodes, found, strict=True):
        expected = rows.values[node]
        assert result.dtype == expected.dtype
        if node.target in EXACT:
            good = torch.equal(result.nan_to_num(123.0), expected.nan_to_num(123.0))
        elif node.target in REDUCERS or "softmax" in str(node.target):
            good = reduction_is_close(rows, node, result)
        else:
            expected, size = better(rows, node)
            good = ulps(result, expected, size) <= ULPS[expected.dtype]
        if not good:
            wrong.append(f"{described(node)}: {worst(result, expected, rows, node)}")
    assert not wrong, "\n".join(wrong)


def reduction_is_close(rows: Rows, node: fx.Node, result: Tensor) -> bool:
    """Sums differ by their order: the rounding is that of the largest terms, not of the result."""
    expected, source = rows.values[node], rows.values[node.args[0]]
    if REDUCERS.get(node.target) in ("max", "min"):
        return torch.equal(result.nan_to_num(123.0), expected.nan_to_num(123.0))
    size = source.double().abs().sum(-1, keepdim=True).expand(source.shape) if node.target in REDUCERS else None
    size = None if size is None else size[:, :1].reshape(expected.shape)
    return ulps(result, expected, size) <= ULPS[expected.dtype]


def better(rows: Rows, node: fx.Node) -> tuple[Tensor, Tensor]:
    """The expected values, and what errors are measured by.

    torch's float32 erf is wrong in small numbers, so erf and gelu are computed in float64. And gelu multiplies x by
    what it got by subtraction.
    """
    expected = rows.values[node]
    if node.target not in (aten.erf.default, aten.gelu.default):
        return expected, expected
    x = rows.values[node.args[0]]
    expected = node.target(x.double(), **node.kwargs).to(x.dtype)
    return expected, x if node.target is aten.gelu.default else expected


def worst(found: Tensor, expected: Tensor, rows: Rows, node: fx.Node) -> str:
    same = (found == expected) | (found.isnan() & expected.isnan())
    gap = torch.where(same, 0.0, (found.double() / expected.double() - 1).abs().nan_to_num(nan=math.inf))
    index = tuple(int(one) for one in np.unravel_index(int(gap.argmax()), gap.shape))
    sources = [rows.values[one] for one in node.all_input_nodes]
    seen = [one[index].item() if one.shape == expected.shape else one[index[0]].tolist() for one in sources]
    return f"{found[index].item()!r} for {expected[index].item()!r} at {index}, from {seen}"


def test_an_element_is_the_same_at_any_place_of_a_row(library: Library) -> None:
    at = WIDTHS.index(37)
    rows, nodes = library.parts[at]
    inputs = [rows.values[node] for node in rows.inputs]
    element_wise = [place for place, node in enumerate(nodes) if node.target in TREES]
    straight = library.run(at, inputs)
    for shift in (1, 5, 16, 30):
        rolled = library.run(at, [value.roll(shift, 1) for value in inputs])
        for place in element_wise:
            expected, found = (one.nan_to_num(123.0) for one in (straight[place].roll(shift, 1), rolled[place]))
            assert torch.equal(found, expected), described(nodes[place])


def test_a_row_is_the_same_in_any_company(library: Library) -> None:
    for at in range(len(WIDTHS)):
        rows, nodes = library.parts[at]
        inputs = [rows.values[node] for node in rows.inputs]
        together = library.run(at, inputs)
        alone = library.run(at, [value[3:4] for value in inputs])
        for node, one, all_rows in zip(nodes, alone, together, strict=True):
            assert torch.equal(one[0].nan_to_num(123.0), all_rows[3].nan_to_num(123.0)), described(node)


def rearranged(dtype: torch.dtype) -> tuple[Rows, list[fx.Node]]:
    """Loops over several dims, values needed in another order than they are made in, whole numbers, masks."""
    rows = Rows()
    generator = torch.Generator().manual_seed(0)
    x = rows.input(torch.randn(ROWS, 3, 10, generator=generator, dtype=torch.float64).to(dtype))
    y = rows.input(torch.randn(ROWS, 10, generator=generator, dtype=torch.float64).to(dtype))
    positions = rows.input(torch.randint(0, 10**6, (ROWS, 1), generator=generator))
    flipped = rows.call(aten.transpose.int, x, 1, 2)
    doubled = rows.call(aten.mul.Tensor, flipped, 2)
    back = rows.call(aten.transpose.int, doubled, 1, 2)
    few = rows.input(torch.randn(ROWS, 3, 37, generator=generator, dtype=torch.float64).to(dtype))
    wide = rows.call(aten.unsqueeze.default, y, 1)
    left, right = rows.call(aten.slice.Tensor, x, 2, 0, 5), rows.call(aten.slice.Tensor, x, 2, 5, 10)
    odd = rows.call(aten.slice.Tensor, x, 2, 1, 10, 2)
    negated = rows.call(aten.neg.default, right)
    reshaped = rows.call(aten.reshape.default, rows.call(aten.exp.default, x), [ROWS, 5, 6])
    mean = rows.call(aten.mean.dim, x, [1, 2], True)
    mask = rows.call(aten.gt.Tensor, x, wide)
    below = rows.call(aten.lt.Scalar, positions, 500_000)
    nodes = [
        rows.call(aten.add.Tensor, back, wide),
        rows.call(aten.cat.default, [negated, left], -1),
        rows.call(aten.cat.default, [y, rows.call(aten.reshape.default, odd, [ROWS, 15]), y], 1),
        rows.call(aten.stack.default, [left, negated, odd], 1),
        rows.call(aten.stack.default, [left, right], 3),
        rows.call(aten.sub.Tensor, x, mean),
        rows.call(aten.sum.dim_IntList, flipped, [1]),
        rows.call(aten.amax.default, x, [1], False),
        rows.call(aten.amin.default, doubled, [-1, -2]),
        rows.call(aten.sum.dim_IntList, few, [1]),
        rows.call(aten.sum.dim_IntList, rows.call(aten.mul.Tensor, few, 0.5), [1], True),
        rows.call(aten.amax.default, few, [-2]),
        rows.call(aten.softmax.int, x, 1),
        rows.call(aten.softmax.int, back, -1),
        rows.call(aten.add.Tensor, reshaped, 1),
        rows.call(aten.sum.dim_IntList, rows.call(aten._to_copy.default, mask, dtype=dtype), [2]),
        rows.call(aten.where.self, mask, x, wide),
        rows.call(aten.where.self, rows.call(aten.unsqueeze.default, below, 1), wide, x),
        rows.call(aten.add.Tensor, positions, 2),
        rows.call(aten.mul.Tensor, positions, positions),
        rows.call(aten._to_copy.default, positions, dtype=dtype),
        rows.call(aten.clone.default, flipped),
        mask,
        below,
        doubled,
    ]
    return rows, nodes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_values_reach_loops_of_other_shapes(dtype: torch.dtype) -> None:
    library = Library([rearranged(dtype)])
    rows, nodes = library.parts[0]
    for node, found in zip(nodes, library.run(0, [rows.values[one] for one in rows.inputs]), strict=True):
        expected = rows.values[node]
        if expected.dtype.is_floating_point:
            assert ulps(found, expected, expected.abs().max().expand(expected.shape)) <= 8, described(node)
        else:
            assert torch.equal(found, expected), described(node)


OURS: dict[Any, tuple[Callable[..., Any], float, float]] = {
    aten.exp.default: (np.exp, -110.0, 95.0),
    aten.tanh.default: (np.tanh, -12.0, 12.0),
    aten.erf.default: (np.vectorize(math.erf, otypes=[np.float64]), -5.0, 5.0),
}


@pytest.mark.parametrize("isa", runnable(), ids=lambda isa: isa.name)
def test_exp_tanh_and_erf_are_within_three_units_in_the_last_place(isa: Isa) -> None:
    width = 1024
    rows = Rows()
    x = rows.input(torch.zeros(1, width))
    library = Library([(rows, [rows.call(target, x) for target in OURS])], isa)
    for place, (target, (exact, low, high)) in enumerate(OURS.items()):
        tiny = np.geomspace(1e-42, 1.0, 10 * width)
        points = np.concatenate([np.linspace(low, high, 44 * width), tiny, -tiny]).astype(np.float32)
        (*found,) = library.run(0, [torch.from_numpy(points).reshape(-1, width)])
        with np.errstate(over="ignore"):
            expected = torch.from_numpy(exact(points.astype(np.float64)))
        # Subnormal results have the spacing of the smallest normal ones; what rounds to infinity has to be it.
        rounded = expected.float()
        assert ulps(found[place].reshape(-1), rounded) <= 3, target
