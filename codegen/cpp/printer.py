"""Kernels as C++: one function for all kernels that are equal but for their arrays, over the headers in include/."""

from __future__ import annotations

from dataclasses import dataclass

from graft.codegen.cpp.rows import TYPES, indented, literal, row_kernel
from graft.codegen.kernel_ir import (
    AppendKernel,
    AttendKernel,
    AttendPagesKernel,
    ExpertKernel,
    GatherKernel,
    Heads,
    Kernel,
    MatmulKernel,
    RowKernel,
    TopKernel,
)
from graft.codegen.row_builder import computing
from graft.compiler.kv.codecs import Codec, KeyChannels


@dataclass(frozen=True)
class Printed:
    """A kernel's code and what it is to be called with."""

    kind: str
    body: str
    arguments: tuple[str | int, ...]
    """Names of arrays and other inputs, "weight NAME", "state INDEX", or whole numbers."""


def print_kernel(kernel: Kernel, packed: frozenset[str], counter: int = -1) -> Printed:
    """The code of one kernel; `packed` are the parameters that are stored as panels, `counter` is the number of its
    guard if this is the kernel that counts for it."""
    printed = print_unguarded(kernel, packed)
    if kernel.guard is None:
        return printed
    mask, counts = (f"argument[{len(printed.arguments) + more}]" for more in (0, 1))
    rows, wanted = kernel.guard.mask.rows, "true" if kernel.guard.wanted else "false"
    branch = f"    if (!step.any(step.array<float>({mask}), '{rows}', {wanted}, {counts}, part)) return;\n"
    return Printed(printed.kind, branch + printed.body, (*printed.arguments, kernel.guard.mask.name, counter))


def print_unguarded(kernel: Kernel, packed: frozenset[str]) -> Printed:
    """The code of what the kernel computes."""
    match kernel:
        case RowKernel():
            return Printed("rows", row_kernel(kernel), tuple(array.name for array in kernel.arrays))
        case MatmulKernel():
            return matmul(kernel)
        case ExpertKernel():
            return experts(kernel)
        case TopKernel():
            return top(kernel)
        case GatherKernel():
            return gather(kernel, packed)
        case AppendKernel():
            return append(kernel)
        case AttendKernel():
            return attend(kernel)
        case AttendPagesKernel():
            return attend_pages(kernel)
    raise AssertionError(f"no code for {type(kernel).__name__}")


def function(name: str, body: str, comment: str) -> str:
    """A kernel's code as a function."""
    return f"// {comment}\nvoid {name}(const Step& step, const int32_t* argument, int part) {{\n{body}}}\n"


def matmul(kernel: MatmulKernel) -> Printed:
    """A product with panels of one or several parameters."""
    x, out = kernel.arrays
    count, column, lines = len(kernel.weights), 0, ["const Piece pieces[] = {"]
    for index, (start, end) in enumerate(kernel.ranges):
        bias = f"step.array<void>(argument[{2 + count + index}])" if kernel.biases else "nullptr"
        place = f"{start}, {end}, {column}, {kernel.starts[index]}"
        lines.append(f"    {{step.array<void>(argument[{2 + index}]), {bias}, {place}}},")
        column += end - start
    kind = TYPES[kernel.weight_dtype]
    columns = "".join(f", {number}" for number in kernel.columns or ())
    lines += [
        "};",
        f"matmul<{kind}, {TYPES[out.dtype]}>(step, part, step.count('{out.rows}'), "
        f"step.array<{kind}>(argument[0]) + {kernel.offset}, {x.width},",
        f"    {kernel.depth}, step.array<{TYPES[out.dtype]}>(argument[1]), {out.width}, pieces, {count}{columns});",
    ]
    weights = (*(f"weight {name}" for name in kernel.weights), *(f"bias {name}" for name in kernel.biases))
    return Printed("matmul", indented(lines), (x.name, out.name, *weights))


def experts(kernel: ExpertKernel) -> Printed:
    """Slots times the matrices that they chose."""
    x, index, out = kernel.arrays
    kind = TYPES[kernel.weight_dtype]
    bias = f"step.array<{kind}>(argument[4])" if kernel.bias else "nullptr"
    lines = [
        f"const Experts<{kind}> experts = {{step.array<{kind}>(argument[3]), {bias}, {kernel.experts}, "
        f"{kernel.outputs}, {kernel.depth}}};",
        f"const Chosen<{kind}> chosen = {{step.array<{kind}>(argument[0]) + {kernel.offsets[0]}, {x.width}, "
        f"{kernel.stride},",
        f"    step.array<int64_t>(argument[1]) + {kernel.offsets[1]}, {index.width}, {kernel.slots}}};",
        f"multiply_experts(step, part, step.count('{out.rows}'), experts, chosen, "
        f"step.array<{TYPES[out.dtype]}>(argument[2]));",
    ]
    weights = (f"weight {kernel.weight}", *([f"bias {kernel.bias}"] if kernel.bias else []))
    return Printed("experts", indented(lines), (x.name, index.name, out.name, *weights))


def top(kernel: TopKernel) -> Printed:
    """The largest few elements."""
    x = kernel.arrays[0]
    kind, place = TYPES[x.dtype], {result: at for at, result in enumerate(kernel.results)}
    values = f"step.array<{kind}>(argument[{1 + place[0]}])" if 0 in place else "nullptr"
    ids = f"step.array<int64_t>(argument[{1 + place[1]}])" if 1 in place else "nullptr"
    lines = [
        f"largest<{kind}>(step, part, step.count('{x.rows}'), step.array<{kind}>(argument[0]) + {kernel.offset}, "
        f"{x.width},",
        f"    {kernel.groups}, {kernel.width}, {kernel.count}, {values}, {ids});",
    ]
    return Printed("top", indented(lines), tuple(array.name for array in kernel.arrays))


def gather(kernel: GatherKernel, packed: frozenset[str]) -> Printed:
    """Rows of a parameter, from its panels where it has been packed."""
    index, out = kernel.arrays
    name = "gather_packed" if kernel.weight in packed else "gather"
    kind = TYPES[kernel.weight_dtype]
    lines = [
        f"{name}<{kind}>(step, part, step.count('{out.rows}'), "
        f"step.array<int64_t>(argument[0]) + {kernel.offset}, {index.width},",
        f"    step.array<{kind}>(argument[2]), {out.width}, step.array<{kind}>(argument[1]));",
    ]
    place = f"weight {kernel.weight}" if kernel.weight in packed else f"table {kernel.weight}"
    return Printed("gather", indented(lines), (index.name, out.name, place))


def cache(kernel: AppendKernel | AttendKernel | AttendPagesKernel, heads: int, width: int, at: int) -> str:
    """The part of the KV state that belongs to the kernel's layer; arguments from `at` on: state, layer, its number."""
    kind = TYPES[kernel.kv_dtype]
    size = f"step.call.slots * {heads} * step.capacity(argument[{at + 2}]) * {width}"
    return f"step.array<{kind}>(argument[{at}]) + argument[{at + 1}] * ({size})"


def cache_arguments(kernel: AppendKernel | AttendKernel | AttendPagesKernel) -> tuple[str | int, ...]:
    """What `cache` reads."""
    return f"state {kernel.state}", kernel.layer, kernel.state


def print_heads(width: int, heads: Heads) -> str:
    """Heads in the width of their array."""
    return f"Heads{{{width}, {heads.offset}, {heads.stride}}}"


def append(kernel: AppendKernel) -> Printed:
    """Writing keys and values."""
    keys, values = kernel.arrays
    kind, k, v = TYPES[kernel.kv_dtype], kernel.keys, kernel.values
    tail = "step.array<int64_t>(argument[5])" if kernel.tail else "nullptr"
    lines = [
        f"append<{kind}, {k.width}, {v.width}>(step, part, {k.count},",
        f"    step.array<{kind}>(argument[0]), {print_heads(keys.width, k)},",
        f"    step.array<{kind}>(argument[1]), {print_heads(values.width, v)},",
        f"    {cache(kernel, k.count, k.width + v.width, 2)},",
        f"    step.capacity(argument[4]), {tail});",
    ]
    given = (keys.name, values.name, *cache_arguments(kernel), *([kernel.tail] if kernel.tail else []))
    return Printed("append", indented(lines), given)


def scoring(kernel: AttendKernel | AttendPagesKernel) -> str:
    """What is done with scores."""
    inside = TYPES[computing(kernel.kv_dtype)]
    return f"Scoring<{inside}>{{{literal(kernel.scale, inside)}, {literal(kernel.softcap, inside)}}}"


def attend(kernel: AttendKernel) -> Printed:
    """Attention over the cache."""
    queries, out, *sinks = kernel.arrays
    q, kind = kernel.queries, TYPES[kernel.kv_dtype]
    inside = TYPES[computing(kernel.kv_dtype)]
    width = q.width + kernel.value_dim
    lines = [
        f"attend<{kind}, {TYPES[out.dtype]}, {q.width}, {kernel.value_dim}>(step, part, {q.count}, "
        f"{kernel.kv_heads},",
        f"    step.array<{kind}>(argument[0]), {print_heads(queries.width, q)},",
        f"    {cache(kernel, kernel.kv_heads, width, 2)},",
        f"    step.capacity(argument[4]), step.array<{TYPES[out.dtype]}>(argument[1]), "
        + (f"step.array<{inside}>(argument[5])" if sinks else "nullptr")
        + f", {kernel.window}, {scoring(kernel)});",
    ]
    wide = (f"wide {one.name}" for one in sinks)
    return Printed("attend", indented(lines), (queries.name, out.name, *cache_arguments(kernel), *wide))


def attend_pages(kernel: AttendPagesKernel) -> Printed:
    """Attention over far entries and the tail."""
    queries, out, *sinks = kernel.arrays
    q, kind, heads = kernel.queries, TYPES[kernel.kv_dtype], kernel.kv_heads
    inside = TYPES[computing(kernel.kv_dtype)]
    page_bytes = kernel.codec.page_bytes(q.width, kernel.value_dim, kernel.kv_dtype)
    lengths, starts, pages, table, counts, *chosen = (f"argument[{5 + index}]" for index in range(len(kernel.far)))
    layer = f"argument[3] * step.call.slots * {heads}"
    label_bytes, choice, limits, labels, channels = 0, "Everything", "{}", "nullptr", "nullptr"
    if kernel.selection is not None:
        one = kernel.selection
        label_bytes, width = one.label_bytes(q.width, kernel.kv_dtype), one.width(q.width)
        flags = f"{str(one.calibrates).lower()}, {str(one.bounds).lower()}"
        choice = f"Selection<{kind}, {q.width}, {one.size}, {width}, {flags}>"
        limits = f"{{{one.ratio!r}, {one.least}, {one.first}}}"
        labels = f"step.array<uint8_t>({chosen[0]})"
        channels = f"step.array<int64_t>({chosen[1]}) + {layer} * {width}"
    loader = loader_type(kernel.codec, kind, q.width, kernel.value_dim)
    types = f"{kind}, {TYPES[out.dtype]}, {q.width}, {kernel.value_dim}, {kernel.width}"
    lines = [
        f"const Paged paged = {{step.capacity(argument[4]), {page_bytes}, {label_bytes}, step.pages(argument[4]),",
        f"    step.array<int64_t>({lengths}), step.array<int64_t>({starts}), step.array<uint8_t>({pages}),",
        f"    step.array<int32_t>({table}) + {layer} * step.pages(argument[4]),",
        f"    step.array<int32_t>({counts}) + {layer},",
        f"    {labels}, {channels}}};",
        f"typedef {loader} Loader;",
        f"attend_pages<{types}, Loader>(step, part, {q.count}, {heads},",
        f"    step.array<{kind}>(argument[0]), {print_heads(queries.width, q)},",
        f"    {cache(kernel, heads, kernel.width, 2)}, paged,",
        f"    step.array<{TYPES[out.dtype]}>(argument[1]), "
        + (f"step.array<{inside}>(argument[{5 + len(kernel.far)}])" if sinks else "nullptr")
        + f", {scoring(kernel)}, {choice}{limits});",
    ]
    given = (*cache_arguments(kernel), *kernel.far, *(f"wide {one.name}" for one in sinks))
    return Printed("attend", indented(lines), (queries.name, out.name, *given))


def loader_type(codec: Codec, kind: str, key_dim: int, value_dim: int) -> str:
    """The C++ type that reads the codec's pages."""
    arguments = [kind, key_dim, value_dim, *codec.loader_arguments(key_dim, value_dim)]
    if isinstance(codec, KeyChannels):
        arguments.append(loader_type(codec.inner, kind, codec.kept(key_dim), value_dim))
    return f"{codec.loader}<{', '.join(map(str, arguments))}>"
