"""What printed kernels call on the device for attention over pages (compiler/kv/): far entries, then the tail."""

from __future__ import annotations

import triton
import triton.language as tl

from graft.codegen.triton.device import KEYS, divide, opened, over_places, to_bf16, with_block
from graft.codegen.triton.device_selection import best_units, chosen


@triton.jit
def paged_attention(
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
    base: tl.tensor,
    cut: tl.tensor,
    pages: tl.tensor,
    scales: tl.tensor,
    numbers: tl.tensor,
    table: tl.tensor,
    count: tl.tensor,
    labels: tl.tensor,
    channels: tl.tensor,
    scores: tl.tensor,
    HEADS: tl.constexpr,
    STRIDE: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    CODES: tl.constexpr,
    KEPT: tl.constexpr,
    NARROW: tl.constexpr,
    CHOICE: tl.constexpr,
    LANES: tl.constexpr,
    KEY_LANES: tl.constexpr,
    KEPT_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
) -> tl.tensor:
    """[LANES, VALUE_LANES] float32: attention of one row's queries over one kv head's far entries and tail.

    `kv` is where the head's tail starts, which holds the text from position `base` on and counts from `cut` on. `table`
    has the numbers of the pages with the `count` far entries. CODES is what `key_codes` knows of integers in pages;
    where pages hold rows it is the elements of a page alone, and 0 where the tail's first places are far entries. Keys
    in pages have KEPT channels; of NARROW ones every page has the `numbers` in front. With a CHOICE
    (device_selection.best_units) the entries are those of the units with the best `labels`.
    """
    q, top, total, gathered = opened(queries, sinks, HEADS, STRIDE, KEY, SINKS, LANES, KEY_LANES, VALUE_LANES)
    lane, inner, outer = tl.arange(0, LANES), tl.arange(0, KEPT_LANES), tl.arange(0, VALUE_LANES)
    HEAD: tl.constexpr = (KEPT + 63) // 64 * 64 if NARROW else 0
    bar, ties = count.to(tl.int64), count * 0
    if len(CHOICE) > 0:
        bar, ties = best_units(queries, labels, channels, table, count, scores, HEADS, STRIDE, KEY, CHOICE)
    for start in range(0, count, KEYS):
        entry = tl.arange(0, KEYS)
        seen = start + entry < count
        if len(CHOICE) > 0:
            seen, ties = chosen(scores, start + entry, count, bar, ties, CHOICE)
        if tl.max(seen.to(tl.int32), 0) > 0:
            real, valid = seen[:, None] & (inner < KEPT)[None, :], seen[:, None] & (outer < VALUE)[None, :]
            number = tl.load(table + start // KEYS).to(tl.int64)
            keys, values = page_entries(
                kv, pages, scales, number, start, entry, real, valid,
                WIDTH, HEAD, KEPT, VALUE, KEPT_LANES, VALUE_LANES, CODES, q.dtype,
            )  # fmt: skip
            own = q
            if NARROW:
                size: tl.constexpr = CODES[0] if len(CODES) > 1 else CODES[0] * q.dtype.primitive_bitwidth // 8
                channel = tl.load(numbers + number * size + inner, mask=inner < KEPT, other=0).to(tl.int32)
                some = (lane < HEADS)[:, None] & (inner < KEPT)[None, :]
                own = tl.load(queries + lane[:, None] * STRIDE + channel[None, :], mask=some, other=0.0)
            top, total, gathered = with_block(own, keys, values, seen, top, total, gathered, SCALE, SOFTCAP)
    top, total, gathered = over_places(
        q, kv - base * WIDTH, cut, row, position, plain, place, above, rows, levels, top, total, gathered,
        KEY, VALUE, WIDTH, SCALE, SOFTCAP, KEY_LANES, VALUE_LANES,
    )  # fmt: skip
    return divide(gathered, tl.broadcast_to(total[:, None], [LANES, VALUE_LANES]))


@triton.jit
def page_entries(
    kv: tl.tensor,
    pages: tl.tensor,
    scales: tl.tensor,
    number: tl.tensor,
    start: tl.tensor,
    entry: tl.tensor,
    real: tl.tensor,
    valid: tl.tensor,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    KEPT: tl.constexpr,
    VALUE: tl.constexpr,
    KEPT_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    CODES: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Keys [64, KEPT_LANES] and values [64, VALUE_LANES] of the page of that number, whose first entry is `start`; HEAD
    bytes of a page stand in front of them. Zero where they are not `real` and `valid`."""
    inner, outer = tl.arange(0, KEPT_LANES), tl.arange(0, VALUE_LANES)
    if len(CODES) > 1:
        page, halves = pages + number * CODES[0] + HEAD, scales + (number * CODES[0] + HEAD) // 2
        keys = key_codes(page, halves, entry[:, None], inner[None, :], real, KEPT, CODES)
        values = value_codes(page, halves, entry[:, None], outer[None, :], valid, VALUE, CODES)
        if dtype == tl.bfloat16:
            keys, values = to_bf16(keys), to_bf16(values)
        keys, values = keys.to(dtype), values.to(dtype)
    else:
        if CODES[0] == 0:
            token = kv + (start + entry).to(tl.int64)[:, None] * WIDTH
        else:
            rows_at = HEAD * 8 // dtype.primitive_bitwidth
            token = pages + number * CODES[0] + rows_at + entry[:, None] * (KEPT + VALUE)
        keys = tl.load(token + inner[None, :], mask=real, other=0.0)
        values = tl.load(token + KEPT + outer[None, :], mask=valid, other=0.0)
    return keys, values


@triton.jit
def key_codes(
    page: tl.tensor,
    halves: tl.tensor,
    entry: tl.tensor,
    channel: tl.tensor,
    real: tl.tensor,
    KEY: tl.constexpr,
    CODES: tl.constexpr,
) -> tl.tensor:
    """Keys of a page of integers in float32, zero where they are not `real`. CODES is the bytes of a page; of keys
    bits, channels of a group (0: one) and tokens of a group (of more channels: one); of values bits and channels of a
    group; then where the values' codes start, in bytes, and the four sections of scales, in numbers of two bytes."""
    BITS: tl.constexpr = CODES[1]
    at = ((entry // 16 * ((KEY + 1) // 2) + channel // 2) * 16 + entry % 16) * 2 + channel % 2
    code = tl.load(page + at * BITS // 8, mask=real, other=0).to(tl.int32)
    code = (code >> (at * BITS % 8)) & ((1 << BITS) - 1)
    group = entry // CODES[3] * KEY + channel if CODES[2] == 0 else channel // CODES[2] * 64 + entry
    scale = tl.load(halves + CODES[7] + group, mask=real, other=0.0).to(tl.float32)
    least = tl.load(halves + CODES[8] + group, mask=real, other=0.0).to(tl.float32)
    return code.to(tl.float32) * scale + least


@triton.jit
def value_codes(
    page: tl.tensor,
    halves: tl.tensor,
    entry: tl.tensor,
    channel: tl.tensor,
    real: tl.tensor,
    VALUE: tl.constexpr,
    CODES: tl.constexpr,
) -> tl.tensor:
    """The same of values."""
    BITS: tl.constexpr = CODES[4]
    at = ((entry // 2 * ((VALUE + 15) // 16) + channel // 16) * 16 + channel % 16) * 2 + entry % 2
    code = tl.load(page + CODES[6] + at * BITS // 8, mask=real, other=0).to(tl.int32)
    code = (code >> (at * BITS % 8)) & ((1 << BITS) - 1)
    group = entry * ((VALUE + CODES[5] - 1) // CODES[5]) + channel // CODES[5]
    scale = tl.load(halves + CODES[9] + group, mask=real, other=0.0).to(tl.float32)
    least = tl.load(halves + CODES[10] + group, mask=real, other=0.0).to(tl.float32)
    return code.to(tl.float32) * scale + least
