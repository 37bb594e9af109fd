"""Attention over pages as Triton: of rows in pages or in place, and of integers. Nothing is selected yet."""

from __future__ import annotations

import torch

from graft.codegen.kernel_ir import AttendPagesKernel
from graft.codegen.triton.attention import LANES, LAYOUT, lanes, unaligned
from graft.codegen.triton.printed import TYPES, Grid, Printed, heads_at, literal, narrowed, supported
from graft.compiler.errors import LoweringError
from graft.compiler.kv.codecs import PAGE, Affine, DensePages


def print_attend_pages(kernel: AttendPagesKernel) -> Printed:
    """One program for a row and a head of keys, with all the heads of queries that share it."""
    supported(kernel.kv_dtype, "attention")
    queries, out, *sinks = kernel.arrays
    q, kind, key, value = kernel.queries, TYPES[kernel.kv_dtype], kernel.queries.width, kernel.value_dim
    group, codes = q.count // kernel.kv_heads, layout_of(kernel)
    block = lanes(group, LANES)
    lengths, starts, pages, table, counts = kernel.far
    lines = [
        "row, head = tl.program_id(0), tl.program_id(1)",
        "text = tl.load(slot + row)",
        f"at = text.to(tl.int64) * {kernel.kv_heads} + head",
        "base = tl.load(lengths + text) - tl.load(tail + text)",
        "cut = (base + tl.load(starts + text)).to(tl.int32)",
        f"found = paged_attention({heads_at(f'a0 + row.to(tl.int64) * {queries.width}', q, f'head * {group}')}, "
        f"kv + at * capacity * {kernel.width}, {f'sinks + head * {group}' if sinks else 'a0'}, row,",
        "    tl.load(position + row), tl.load(plain + row), place, above, rows, levels, base, cut, pages, scales, "
        "table + at * most, tl.load(counts + at),",
        f"    HEADS={group}, STRIDE={q.stride}, KEY={key}, VALUE={value}, WIDTH={kernel.width}, "
        f"SCALE={literal(kernel.scale)}, SOFTCAP={literal(kernel.softcap)}, SINKS={bool(sinks)}, CODES={codes},",
        f"    LANES={block}, KEY_LANES={lanes(key, LANES)}, VALUE_LANES={lanes(value, LANES)})",
        f"i, j = tl.arange(0, {block})[:, None], tl.arange(0, {lanes(value, LANES)})[None, :]",
        f"spot = (row.to(tl.int64) * {q.count} + head * {group} + i) * {value} + j",
        f"tl.store(a1 + spot, {'found' if TYPES[out.dtype] == 'fp32' else narrowed('found', out.dtype)}, "
        f"(i < {group}) & (j < {value}))",
    ]
    rows = kind if len(codes) == 1 else "u8"
    given = [("a0", f"*{kind}", queries.name), ("a1", f"*{TYPES[out.dtype]}", out.name)]
    given += [("kv", f"*{kind}", f"state {kernel.state} {kernel.layer}")]
    given += [*((name, dtype, f"layout {name}") for name, dtype in LAYOUT)]
    given += [("lengths", "*i64", "lengths"), ("tail", "*i64", lengths), ("starts", "*i64", starts)]
    given += [("pages", f"*{rows}", f"{pages} {rows}"), ("scales", "*fp16", f"{pages} fp16")]
    given += [("table", "*i32", f"{table} {kernel.layer}"), ("counts", "*i32", f"{counts} {kernel.layer}")]
    given += [("sinks", f"*{TYPES[sink.dtype]}", sink.name) for sink in sinks]
    given += [("capacity", "i32", f"capacity {kernel.state}"), ("most", "i32", f"pages {kernel.state}")]
    given += [("rows", "i32", "rows N"), ("levels", "i32", "levels")]
    odd = unaligned(kernel.width * kernel.kv_dtype.itemsize)
    return Printed(
        "attend",
        tuple((name, dtype) for name, dtype, _ in given),
        tuple(lines),
        tuple(argument for _, _, argument in given),
        Grid("N", 1, kernel.kv_heads),
        stages=1,
        unaligned=(*odd, "table", "counts"),
    )


def layout_of(kernel: AttendPagesKernel) -> tuple[int, ...]:
    """CODES of device_pages.paged_attention. Raises LoweringError for pages that there is no code for."""
    key, value, dtype = kernel.queries.width, kernel.value_dim, kernel.kv_dtype
    codec, why = kernel.codec, ""
    if kernel.selection is not None:
        why = f"{type(kernel.selection).__name__}: nothing is selected yet"
    elif codec.in_place:
        return (0,)
    elif isinstance(codec, DensePages):
        return (PAGE * (key + value),)
    elif isinstance(codec, Affine):
        return affine(codec, key, value, dtype)
    raise LoweringError(
        "there is no Triton kernel for these pages",
        expected="dense-pages or affine, without a selection",
        found=why or type(codec).__name__,
        where=kernel.nodes[0].format_node() if kernel.nodes else None,
        remedy='use backend="aten", or backend="cpp" on the CPU',
    )


def affine(codec: Affine, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """See device_pages.key_codes."""
    keys, values, key_scales, _, value_scales, _ = codec.sections(key_dim, value_dim)
    starts = [keys + values]
    for size in (key_scales, key_scales, value_scales):
        starts.append(starts[-1] + size)
    by_channel = codec.key_axis == "channel"
    group = (0, codec.key_group) if by_channel else (codec.key_group, 1)
    size = codec.page_bytes(key_dim, value_dim, dtype)
    halves = (start // 2 for start in starts)
    return size, codec.key_bits, *group, codec.value_bits, codec.value_group, keys, *halves


def views_of(name: str, pages: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A state's pages under the names that kernels read them by; where they are empty, as some memory that is there."""
    flat = pages.reshape(-1) if pages.numel() else pages.new_zeros(64)
    types = (torch.uint8, torch.float16, dtype)
    return {f"{name} {TYPES.get(one, 'u8')}": flat.view(one) for one in types}

