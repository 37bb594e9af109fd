"""Attention over pages as Triton: of rows in pages or in place, of integers, of some channels, and of chosen units."""

from __future__ import annotations

import torch

from graft.codegen.kernel_ir import AttendPagesKernel
from graft.codegen.triton.attention import LANES, LAYOUT, lanes, unaligned
from graft.codegen.triton.printed import TYPES, Grid, Printed, heads_at, literal, narrowed, supported
from graft.compiler.errors import LoweringError
from graft.compiler.kv.codecs import PAGE, Affine, Codec, DensePages, KeyChannels, rounded


def print_attend_pages(kernel: AttendPagesKernel) -> Printed:
    """One program for a row and a head of keys, with all the heads of queries that share it."""
    supported(kernel.kv_dtype, "attention")
    queries, out, *sinks = kernel.arrays
    q, kind, key, value = kernel.queries, TYPES[kernel.kv_dtype], kernel.queries.width, kernel.value_dim
    group, codes, choice = q.count // kernel.kv_heads, layout_of(kernel.codec, kernel), choice_of(kernel)
    narrow = isinstance(kernel.codec, KeyChannels)
    kept = kernel.codec.kept(key) if isinstance(kernel.codec, KeyChannels) else key
    block = lanes(group, LANES)
    lengths, starts, pages, table, counts, *selected = kernel.far
    lines = [
        "row, head = tl.program_id(0), tl.program_id(1)",
        "text = tl.load(slot + row)",
        f"at = text.to(tl.int64) * {kernel.kv_heads} + head",
        "base = tl.load(lengths + text) - tl.load(tail + text)",
        "cut = (base + tl.load(starts + text)).to(tl.int32)",
        *(choosing(kernel) if choice else ()),
        f"found = paged_attention({heads_at(f'a0 + row.to(tl.int64) * {queries.width}', q, f'head * {group}')}, "
        f"kv + at * capacity * {kernel.width}, {f'sinks + head * {group}' if sinks else 'a0'}, row,",
        "    tl.load(position + row), tl.load(plain + row), place, above, rows, levels, base, cut, pages, scales, "
        f"numbers, table + at * most, tl.load(counts + at), {'labels, picked, own' if choice else 'a0, a0, a0'},",
        f"    HEADS={group}, STRIDE={q.stride}, KEY={key}, VALUE={value}, WIDTH={kernel.width}, "
        f"SCALE={literal(kernel.scale)}, SOFTCAP={literal(kernel.softcap)}, SINKS={bool(sinks)}, CODES={codes},",
        f"    KEPT={kept}, NARROW={narrow}, CHOICE={choice}, LANES={block}, KEY_LANES={lanes(key, LANES)}, "
        f"KEPT_LANES={lanes(kept, LANES)}, VALUE_LANES={lanes(value, LANES)})",
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
    given += [("numbers", "*u8", f"{pages} u8")]
    if selected:
        labels, channels = selected
        given += [("labels", f"*{kind}", f"{labels} {kind}"), ("channels", "*i64", f"{channels} {kernel.layer}")]
        given += [("scores", "*i32", f"scores {kernel.state}")]
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
        barrier=bool(choice),
        unaligned=(*odd, "table", "counts", *(["channels"] if selected else [])),
    )


def choosing(kernel: AttendPagesKernel) -> list[str]:
    """Where the channels of a program's labels are, and its room for scores."""
    assert kernel.selection is not None
    width, units = kernel.selection.width(kernel.queries.width), PAGE // kernel.selection.size
    return [
        f"picked = channels + at * {width}",
        f"own = scores + (row.to(tl.int64) * {kernel.kv_heads} + head) * most * {units}",
    ]


def choice_of(kernel: AttendPagesKernel) -> tuple[int, ...]:
    """CHOICE of device_selection.best_units; nothing where all is read."""
    one = kernel.selection
    if one is None:
        return ()
    width, least = one.width(kernel.queries.width), -(-one.least // one.size)
    how = int(one.calibrates), int(one.bounds)
    return one.size, width, lanes(width), *how, least, int(one.ratio * 2**40), one.first


def layout_of(codec: Codec, kernel: AttendPagesKernel, key: int | None = None) -> tuple[int, ...]:
    """CODES of device_pages.paged_attention, for keys of so many channels. Raises LoweringError for pages that there is
    no code for."""
    key, value, dtype = kernel.queries.width if key is None else key, kernel.value_dim, kernel.kv_dtype
    if codec.in_place:
        return (0,)
    if isinstance(codec, DensePages):
        return (PAGE * (key + value),)
    if isinstance(codec, Affine):
        return affine(codec, key, value, dtype)
    if isinstance(codec, KeyChannels):
        # The channels' numbers in front count as part of the page.
        kept = codec.kept(key)
        size, *codes = layout_of(codec.inner, kernel, kept)
        return size + rounded(kept, 64) // (1 if codes else dtype.itemsize), *codes
    raise LoweringError(
        "there is no Triton kernel for these pages",
        expected="dense-pages, affine, key-channels with one of them, or entries in place",
        found=type(codec).__name__,
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
    """A state's pages, or their labels, under the names that kernels read them by; where they are empty, as some memory
    that is there."""
    flat = pages.reshape(-1) if pages.numel() else pages.new_zeros(64)
    types = (torch.uint8, torch.float16, dtype)
    return {f"{name} {TYPES.get(one, 'u8')}": flat.view(one) for one in types}

