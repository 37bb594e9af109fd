"""The KV state as Triton: writing keys and values, and attention of every row over its own path."""

from __future__ import annotations

from graft.codegen.kernel_ir import AppendKernel, AttendKernel
from graft.codegen.triton.printed import TYPES, Grid, Printed, heads_at, literal, narrowed, supported

LANES = 16
"""The least that the matrix unit takes of each dim."""


def lanes(size: int, least: int = 1) -> int:
    """The power of two that a block has for so many elements."""
    return max(least, 1 << (size - 1).bit_length())


def unaligned(bytes_per_token: int) -> tuple[str, ...]:
    """The state's address where that of a layer is not a multiple of 16 bytes for every capacity."""
    return ("kv",) if bytes_per_token % 16 else ()


def print_append(kernel: AppendKernel) -> Printed:
    """One program for a row and head; rows that are not there (position -1) are not written."""
    keys, values = kernel.arrays
    k, v, kind = kernel.keys, kernel.values, TYPES[kernel.kv_dtype]
    width = k.width + v.width
    lines = ["row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)", "real = tl.load(position + row) >= 0"]
    shift = " - (tl.load(lengths + text) - tl.load(tail + text))" if kernel.tail else ""
    lines += [
        "text = tl.load(slot + row).to(tl.int64)",
        f"token = (text * {k.count} + head) * capacity + tl.load(place + row){shift}",
        f"i, j = tl.arange(0, {lanes(k.width)}), tl.arange(0, {lanes(v.width)})",
        f"key = tl.load({heads_at(f'a0 + row * {keys.width}', k, 'head')} + i, i < {k.width})",
        f"tl.store(kv + token * {width} + i, key, real & (i < {k.width}))",
        f"value = tl.load({heads_at(f'a1 + row * {values.width}', v, 'head')} + j, j < {v.width})",
        f"tl.store(kv + token * {width} + {k.width} + j, value, real & (j < {v.width}))",
    ]
    state = f"state {kernel.state} {kernel.layer}"
    given = [("a0", f"*{kind}", keys.name), ("a1", f"*{kind}", values.name), ("kv", f"*{kind}", state)]
    given += [*((name, dtype, f"layout {name}") for name, dtype in LAYOUT[:3])]
    given += [("lengths", "*i64", "lengths"), ("tail", "*i64", kernel.tail)] if kernel.tail else []
    given += [("capacity", "i32", f"capacity {kernel.state}")]
    return Printed(
        "append",
        tuple((name, dtype) for name, dtype, _ in given),
        tuple(lines),
        tuple(argument for _, _, argument in given),
        Grid("N", 1, k.count),
        warps=1,
        unaligned=unaligned(width * kernel.kv_dtype.itemsize),
    )


LAYOUT = tuple((name, "*i32") for name in ("slot", "position", "place", "plain", "above"))
"""What layout.lay_out computes."""


def print_attend(kernel: AttendKernel) -> Printed:
    """One program for a row and a head of keys, with all the heads of queries that share it."""
    supported(kernel.kv_dtype, "attention")
    queries, out, *sinks = kernel.arrays
    q, kind, key, value = kernel.queries, TYPES[kernel.kv_dtype], kernel.queries.width, kernel.value_dim
    group = q.count // kernel.kv_heads
    block = lanes(group, LANES)
    # Bytes of a block of keys and values; more of them under way than one would not fit into 64 KiB of shared memory.
    tile = 64 * (lanes(key, LANES) + lanes(value, LANES)) * kernel.kv_dtype.itemsize
    lines = [
        "row, head = tl.program_id(0), tl.program_id(1)",
        f"start = (tl.load(slot + row).to(tl.int64) * {kernel.kv_heads} + head) * capacity * {key + value}",
        f"found = attention({heads_at(f'a0 + row.to(tl.int64) * {queries.width}', q, f'head * {group}')}, kv + start, "
        f"{f'sinks + head * {group}' if sinks else 'a0'}, row, tl.load(position + row), tl.load(plain + row), place, "
        "above, rows, levels,",
        f"    HEADS={group}, STRIDE={q.stride}, KEY={key}, VALUE={value}, SCALE={literal(kernel.scale)}, "
        f"WINDOW={kernel.window}, SOFTCAP={literal(kernel.softcap)}, SINKS={bool(sinks)},",
        f"    LANES={block}, KEY_LANES={lanes(key, LANES)}, VALUE_LANES={lanes(value, LANES)})",
        f"i, j = tl.arange(0, {block})[:, None], tl.arange(0, {lanes(value, LANES)})[None, :]",
        f"spot = (row.to(tl.int64) * {q.count} + head * {group} + i) * {value} + j",
        f"tl.store(a1 + spot, {'found' if TYPES[out.dtype] == 'fp32' else narrowed('found', out.dtype)}, "
        f"(i < {group}) & (j < {value}))",
    ]
    more = [("sinks", f"*{TYPES[sink.dtype]}", sink.name) for sink in sinks]
    numbers = [("capacity", "i32", f"capacity {kernel.state}"), ("rows", "i32", "rows N"), ("levels", "i32", "levels")]
    given = [("a0", f"*{kind}", queries.name), ("a1", f"*{TYPES[out.dtype]}", out.name)]
    given += [("kv", f"*{kind}", f"state {kernel.state} {kernel.layer}")]
    given += [*((name, dtype, f"layout {name}") for name, dtype in LAYOUT), *more, *numbers]
    return Printed(
        "attend",
        tuple((name, dtype) for name, dtype, _ in given),
        tuple(lines),
        tuple(argument for _, _, argument in given),
        Grid("N", 1, kernel.kv_heads),
        stages=2 if tile <= 32 * 1024 else 1,
        unaligned=unaligned((key + value) * kernel.kv_dtype.itemsize),
    )
