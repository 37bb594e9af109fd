"""What printed kernels call, on the device: scalar operators, products of tiles, attention of one row.

Nothing here may be contracted or reordered by the compiler: kernels are launched with enable_fp_fusion=False, and a
multiply-add is fused only where it says fma. Under TRITON_INTERPRET=1 the same functions run on NumPy, which has no
bfloat16; the two places where that shows are marked by INTERPRETED.
"""

# ruff: noqa: PLR0124 (NaN is what differs from itself)

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

KEYS = tl.constexpr(64)
"""Positions of a block of attention; blocks are cut at multiples of it."""

# Scalar operators, float32 or float64.


@triton.jit
def to_bf16(x: tl.tensor) -> tl.tensor:
    """Rounded to the nearest bfloat16, ties to even."""
    if INTERPRETED:  # its conversion cuts off
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(tl.float32).to(tl.bfloat16)


@triton.jit
def divide(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a / b, correctly rounded."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def square_root(x: tl.tensor) -> tl.tensor:
    """The square root, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.math.sqrt_rn(x)


@triton.jit
def smaller(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The smaller, NaN if either is."""
    return tl.where(a != a, a, tl.where(b != b, b, tl.where(a < b, a, b)))


@triton.jit
def larger(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """The larger, NaN if either is."""
    return tl.where(a != a, a, tl.where(b != b, b, tl.where(a > b, a, b)))


@triton.jit
def power_of_two(exponent: tl.tensor) -> tl.tensor:
    """2**exponent, float32, for whole numbers from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x: tl.tensor) -> tl.tensor:
    """e**x; float32 within 2 units in the last place, by the polynomial of cpp/include/math.h."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # Beyond these all results are infinite or zero; NaN passes.
        within = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))
        # Adding 3 * 2**22 leaves a whole number in the last bits.
        whole = (within * 1.44269504 + 12582912.0) - 12582912.0
        # ln(2) in two parts, the first of few digits.
        rest = tl.fma(whole, -0.693359375, within)
        rest = tl.fma(whole, 2.12194440e-4, rest)
        value = tl.fma(rest, 0.000199037109, 0.0013928347)
        value = tl.fma(value, rest, 0.00833329372)
        value = tl.fma(value, rest, 0.0416665412)
        value = tl.fma(value, rest, 0.166666672)
        value = tl.fma(value, rest, 0.5)
        value = tl.fma(value, rest * rest, rest) + 1.0
        # In two steps, so that a subnormal result is rounded once.
        exponent = tl.where(whole == whole, whole, 0.0).to(tl.int32)
        half = exponent >> 1
        return value * power_of_two(half) * power_of_two(exponent - half)


@triton.jit
def expm1(x: tl.tensor) -> tl.tensor:
    """e**x - 1 without cancellation (Kahan): what exp rounds away is divided out again."""
    power = exp(x)
    log = tl.log(tl.where((power > 0.0) & (power != 1.0), power, 2.0))
    close = divide((power - 1.0) * x, log)
    # Where e**x is infinite or zero, x itself would spoil the quotient.
    far = (x > 80.0) | (x < -80.0)
    return tl.where(power == 1.0, x, tl.where(far | (x != x), power - 1.0, close))


@triton.jit
def log1p(x: tl.tensor) -> tl.tensor:
    """log(1 + x) without cancellation (Kahan)."""
    one_more = 1.0 + x
    rest = one_more - 1.0
    close = divide(tl.log(one_more) * x, tl.where(rest == 0.0, 1.0, rest))
    return tl.where(rest == 0.0, x, tl.where(x > 1e30, tl.log(one_more), close))


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """The hyperbolic tangent; float32 within 2 units in the last place, by the polynomial of cpp/include/math.h."""
    size = tl.abs(x)
    if x.dtype == tl.float64:
        square = tl.exp(-2.0 * size)
        far = (1.0 - square) / (1.0 + square)
        near = size - size * size * size / 3.0  # below 1e-4 the next term is beyond float64
        return tl.where(x < 0, -1.0, 1.0) * tl.where(size < 1e-4, near, far)
    else:
        square = x * x
        value = tl.fma(square, -0.00611317903, 0.021010071)
        value = tl.fma(value, square, -0.0538540669)
        value = tl.fma(value, square, 0.133327946)
        value = tl.fma(value, square, -0.333333284)
        near = x + x * (square * value)
        far = 1.0 - divide(tl.full([], 2.0, tl.float32), exp(size + size) + 1.0)
        return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def power(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """a**b, computed in float64 and rounded."""
    base, exponent = a.to(tl.float64), b.to(tl.float64)
    size = tl.exp(exponent * tl.log(tl.abs(base)))
    whole, half = tl.floor(exponent) == exponent, exponent * 0.5
    odd = whole & (tl.floor(half) != half)
    negative = tl.where(whole, tl.where(odd, -size, size), float("nan"))
    value = tl.where(base < 0.0, negative, size)
    return tl.where((exponent == 0.0) | (base == 1.0), 1.0, value).to(a.dtype)


@triton.jit
def largest(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The maximum along an axis, NaN if there is one."""
    spoilt = tl.sum((x != x).to(tl.int32), axis)
    return tl.where(spoilt > 0, float("nan"), tl.max(x, axis))


@triton.jit
def smallest(x: tl.tensor, axis: tl.constexpr) -> tl.tensor:
    """The minimum along an axis, NaN if there is one."""
    spoilt = tl.sum((x != x).to(tl.int32), axis)
    return tl.where(spoilt > 0, float("nan"), tl.min(x, axis))


# Products.


@triton.jit
def product(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """Matrix product of two tiles of the same dtype, summed in float32."""
    if INTERPRETED:  # it would multiply bfloat16 as whole numbers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def multiply(
    x: tl.tensor,
    real: tl.tensor,
    weight: tl.tensor,
    output: tl.tensor,
    outputs: tl.tensor,
    part: tl.tensor,
    DEPTH: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMN: tl.constexpr,
    STORED: tl.constexpr,
    NEXT: tl.constexpr = 1,
) -> tl.tensor:
    """[block of rows, block of outputs] float32: one part of the products' inner dim, in steps from first to last.

    x is where the DEPTH inputs of each row of the tile start, of those rows that are `real`; `output` are the numbers
    of the tile's outputs, those from `outputs` on beyond the end. The weights of an output lie STORED elements behind
    those of the one before it, NEXT apart, and the DEPTH from COLUMN on count. A part is STEPS steps of STEP.
    """
    sums = tl.zeros([x.shape[0], output.shape[0]], tl.float32)
    inner = tl.arange(0, STEP)
    last = tl.minimum((part + 1) * STEPS, tl.cdiv(DEPTH, STEP))
    for step in range(part * STEPS, last):
        at = step * STEP + inner
        real_x, real_w = real[:, None], output[:, None] < outputs
        if DEPTH % STEP:
            real_x, real_w = real_x & (at < DEPTH)[None, :], real_w & (at < DEPTH)[None, :]
        x_tile = tl.load(x[:, None] + at[None, :], mask=real_x, other=0.0)
        place = output.to(tl.int64)[:, None] * STORED + (COLUMN + at)[None, :] * NEXT
        w_tile = tl.load(weight + place, mask=real_w, other=0.0)
        sums += product(x_tile, tl.trans(w_tile))
    return sums


# Attention.


@triton.jit
def places(
    spot: tl.tensor,
    row: tl.tensor,
    position: tl.tensor,
    plain: tl.tensor,
    place: tl.tensor,
    above: tl.tensor,
    rows: tl.tensor,
    levels: tl.tensor,
) -> tl.tensor:
    """Where in its slot the row's text stands at the positions `spot`.

    The first `plain` tokens stand at their positions. Of the others, the one at a position is the row itself or the
    ancestor that many generations above: above [levels, rows] names, for 2**level generations, the row that is so far
    above.
    """
    far = tl.where(spot >= plain, tl.maximum(position - spot, 0), 0)
    at = far * 0 + row
    for level in range(levels):
        at = tl.where((far >> level) & 1 != 0, tl.load(above + level * rows + at), at)
    return tl.where(spot < plain, spot, tl.load(place + at))


@triton.jit
def attention(
    queries: tl.tensor,
    kv: tl.tensor,
    sinks: tl.tensor,
    row: tl.tensor,
    position: tl.tensor,
    plain: tl.tensor,
    place: tl.tensor,
    above: tl.tensor,
    rows: tl.tensor,
    levels: tl.tensor,
    HEADS: tl.constexpr,
    STRIDE: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    LANES: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
) -> tl.tensor:
    """[LANES, VALUE_LANES] float32: attention of one row's HEADS queries, STRIDE apart, over one head's state.

    `kv` is where the slot's keys and values of that head start. Blocks of KEYS positions are visited in order whatever
    the places of their tokens, so the arithmetic depends on the row's position and text alone. Lanes beyond a size hold
    zeros.
    """
    q, top, total, gathered = opened(queries, sinks, HEADS, STRIDE, KEY, SINKS, LANES, KEY_LANES, VALUE_LANES)
    first = position * 0
    if WINDOW:
        first = tl.maximum(position + 1 - WINDOW, 0)
    top, total, gathered = over_places(
        q, kv, first, row, position, plain, place, above, rows, levels, top, total, gathered,
        KEY, VALUE, KEY + VALUE, SCALE, SOFTCAP, KEY_LANES, VALUE_LANES,
    )
    return divide(gathered, tl.broadcast_to(total[:, None], [LANES, VALUE_LANES]))


@triton.jit
def opened(
    queries: tl.tensor,
    sinks: tl.tensor,
    HEADS: tl.constexpr,
    STRIDE: tl.constexpr,
    KEY: tl.constexpr,
    SINKS: tl.constexpr,
    LANES: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
) -> tl.tensor:
    """Queries, and the largest score, the sum of weights and the weighted values of nothing yet."""
    lane, inner = tl.arange(0, LANES), tl.arange(0, KEY_LANES)
    real = (lane < HEADS)[:, None] & (inner < KEY)[None, :]
    q = tl.load(queries + lane[:, None] * STRIDE + inner[None, :], mask=real, other=0.0)
    top, total = tl.full([LANES], float("-inf"), tl.float32), tl.zeros([LANES], tl.float32)
    if SINKS:
        top, total = tl.load(sinks + lane, mask=lane < HEADS, other=0.0).to(tl.float32), total + 1.0
    return q, top, total, tl.zeros([LANES, VALUE_LANES], tl.float32)


@triton.jit
def over_places(
    q: tl.tensor,
    kv: tl.tensor,
    first: tl.tensor,
    row: tl.tensor,
    position: tl.tensor,
    plain: tl.tensor,
    place: tl.tensor,
    above: tl.tensor,
    rows: tl.tensor,
    levels: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    gathered: tl.tensor,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    KEY_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
) -> tl.tensor:
    """A running softmax with the row's text from position `first` on; a token takes WIDTH elements of the state."""
    inner, outer = tl.arange(0, KEY_LANES), tl.arange(0, VALUE_LANES)
    for start in range(first // KEYS * KEYS, position + 1, KEYS):
        spot = start + tl.arange(0, KEYS)
        seen = (spot >= first) & (spot <= position)
        at = spot
        if start + KEYS > plain:
            at = places(spot, row, position, plain, place, above, rows, levels)
        token = kv + at.to(tl.int64)[:, None] * WIDTH
        keys = tl.load(token + inner[None, :], mask=seen[:, None] & (inner < KEY)[None, :], other=0.0)
        values = tl.load(token + KEY + outer[None, :], mask=seen[:, None] & (outer < VALUE)[None, :], other=0.0)
        top, total, gathered = with_block(q, keys, values, seen, top, total, gathered, SCALE, SOFTCAP)
    return top, total, gathered


@triton.jit
def with_block(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    seen: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    gathered: tl.tensor,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> tl.tensor:
    """A running softmax with one more block of keys, of which those that are `seen` count."""
    scores = product(q, tl.trans(keys)) * SCALE
    if SOFTCAP != 0.0:
        scores = tanh(divide(scores, tl.full([], SOFTCAP, tl.float32))) * SOFTCAP
    scores = tl.where(seen[None, :], scores, float("-inf"))
    limit = tl.maximum(tl.max(scores, 1), top)
    weights = exp(scores - limit[:, None])
    faded = exp(top - limit)
    total = total * faded + tl.sum(weights, 1)
    gathered = gathered * faded[:, None] + weighted(weights, values)
    return limit, total, gathered


@triton.jit
def weighted(weights: tl.tensor, values: tl.tensor) -> tl.tensor:
    """The sum of values by float32 weights. Narrow values are multiplied by the weights in two parts, which together
    have twice the digits, because the matrix unit takes no float32 beside them."""
    if values.dtype == tl.float32:
        return product(weights, values)
    elif values.dtype == tl.float16:
        high = weights.to(tl.float16)
        return product(high, values) + product((weights - high.to(tl.float32)).to(tl.float16), values)
    else:
        high = to_bf16(weights)
        return product(high, values) + product(to_bf16(weights - high.to(tl.float32)), values)
