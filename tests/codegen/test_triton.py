"""Triton: interpreted on the CPU against ATen, and compiled, not run, for GPUs.

Whether kernels are interpreted is settled when triton is imported, so what is interpreted runs in one process of its
own, this file as a program, which prints what it measured; the tests look at that.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graft.codegen.aten import AtenExecutable
from graft.codegen.kernel_ir import Array, Guard, MatmulKernel
from graft.codegen.regions import cut
from graft.codegen.scalar_ops import PRIMITIVES
from graft.codegen.triton.executable import TritonExecutable, bucket_size
from graft.codegen.triton.layout import lay_out
from graft.codegen.triton.library import GUARD_BLOCK, SOURCE, load, print_code, saved
from graft.codegen.triton.matmul import tiling
from graft.codegen.triton.printed import Printed
from graft.codegen.triton.rows import BLOCK, SPELLING, print_rows
from graft.compiler.canonical import aten
from graft.compiler.capture import capture
from graft.compiler.errors import LoweringError
from graft.compiler.kv.codecs import Affine, Codec, Content, DensePages, InPlace, KeyChannels
from graft.compiler.kv.selection import DoubleSparsity, PageBounds, PageMeans
from graft.compiler.ops import ancestry, row_places
from graft.compiler.passing import View
from graft.compiler.program import DENSE, Function, Program
from graft.passes.canonicalise import Canonicalise
from graft.passes.kv_cache import KVCache
from graft.passes.merge_linears import MergeLinears
from tests.codegen.experts import BIASED, OWN, SHARED, choice
from tests.codegen.experts import product as experts
from tests.codegen.functions import call_of
from tests.codegen.interpreted import interpret
from tests.codegen.pages import Case, Unread, random_rows, random_stored
from tests.codegen.rows import Rows
from tests.families import build

ONE = {"num_hidden_layers": 1}
WINDOW = ONE | {"layer_types": ("sliding_attention",)}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": ONE,
    "gemma2": WINDOW,
    "gpt_oss": WINDOW,
    "opt": ONE,
    "gpt_neox": ONE,
    "minimax_m2": ONE,
}
"""Softcap and windows; sinks, and experts with biases stored transposed; biases and learned positions; parallel blocks;
and a router of which ATen has to run a part."""
LEFT_OUT = {("gpt_oss", "bfloat16"), ("minimax_m2", "bfloat16")}
"""Slow to capture, and without a kernel that the others do not have in that dtype."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}
"""Of the largest value; ATen's own distance from float64 in bfloat16 is of that size."""
CASES = [(family, dtype) for family in FAMILIES for dtype in TOLERANCE if (family, dtype) not in LEFT_OUT]
SCALARS = {
    "exp": (torch.exp, -87.0, 88.0),
    "expm1": (torch.expm1, -20.0, 20.0),
    "softplus": (torch.nn.functional.softplus, -15.0, 30.0),
    "tanh": (torch.tanh, -12.0, 12.0),
    "erf": (torch.erf, -5.0, 5.0),
    "sigmoid": (torch.sigmoid, -80.0, 80.0),
    "rsqrt": (torch.rsqrt, 1e-6, 50.0),
}
TARGETS = {"sm_80": ("cuda", 80, 32, 166912), "sm_90": ("cuda", 90, 32, 232448), "gfx942": ("hip", "gfx942", 64, 65536)}
"""Name -> backend, architecture, lanes of a warp, and the bytes of shared memory that a block may have."""


@functools.cache
def function_of(family: str, dtype: str, **overrides: Any) -> Function:
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in overrides.items()}
    captured = capture(build(family, dtype=DTYPES[dtype], **lists))
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    for one in (Canonicalise(), KVCache(), MergeLinears()):
        one.run(View(program, one.pass_name()))
    return program["forward"]


def states_of(function: Function, capacity: int, slots: int = 3) -> list[Tensor]:
    """Filled at random, the same tokens at the same places whatever the capacity."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for s in function.states:
        whole = torch.randn(s.layers, slots, s.heads, 160, s.key_dim + s.value_dim, generator=generator)
        found.append(whole[:, :, :, :capacity].to(s.dtype).contiguous())
    return found


def rows_of(*columns: list[int]) -> list[Tensor]:
    return [torch.tensor(column) for column in columns]


# Slot 1: a tree over the edge of a block of 64 positions. Slot 0: the first token of a sequence.
CALL = ([5, 6, 7, 9], [63, 64, 64, 0], [1, 1, 1, 0], [-1, 0, 0, -1], [0, 63, 2], [0, 2, 2, 3])

# What runs interpreted.


def measure_family(family: str, dtype: str) -> dict[str, float]:
    """How far apart Triton and ATen are, in parts of the largest value; whether the states' third slot stays as it was,
    and whether parameters are read where the model holds them."""
    function = function_of(family, dtype, **FAMILIES[family])
    ours, theirs = states_of(function, 80), states_of(function, 80)
    with torch.no_grad():
        expected = (*AtenExecutable(function)(*rows_of(*CALL), *theirs), *theirs)
    executable = TritonExecutable(function)
    found = (*executable(*rows_of(*CALL), *ours), *ours)
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True)]
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    untouched = all(torch.equal(a[:, 2], b[:, 2]) for a, b in zip(ours, theirs, strict=True))
    in_place = {held.data_ptr() for held in executable.parameters.values()} <= executable.read_plain()
    errors = {"logits": apart[0], "hidden": apart[1], "states": max(apart[2:])}
    return errors | {"untouched": float(untouched), "in place": float(in_place)}


def measure_company() -> dict[str, bool]:
    """Whether the row behind tokens 5, 6, 7 at positions 63 to 65 has the same bits in every company."""
    function = function_of("llama", "bfloat16", **ONE, num_key_value_heads=1)
    executable = TritonExecutable(function)

    def last_logits(call: tuple[list[int], ...], states: list[Tensor]) -> Tensor:
        return executable(*rows_of(*call), *states)[0][-1]

    chain = ([5, 6, 7], [63, 64, 65], [1, 1, 1], [-1, 0, 1], [0, 63, 2], [2])
    expected = last_logits(chain, states_of(function, 80))
    states = states_of(function, 70)
    for token, length in ((5, 63), (6, 64), (7, 65)):
        alone = last_logits(([token], [length], [1], [-1], [0, length, 2], [0]), states)
    tree = ([5, 9, 6, 8, 7], [63, 64, 64, 65, 65], [1] * 5, [-1, 0, 0, 1, 2], [0, 63, 2], [4])
    behind = ([3, 4, *tree[0]], [0, 1, *tree[1]], [0, 0, *tree[2]], [-1, 0, -1, 2, 2, 3, 4], [0, 63, 2], [0, 6])
    crowd = 30  # over 32 rows, so that there are two blocks of them
    many = ([*tree[0], *[4] * crowd], [*tree[1], *range(2, 2 + crowd)], [*tree[2], *[2] * crowd],
            [*tree[3], -1, *range(5, 4 + crowd)], [0, 63, 2], [4])  # fmt: skip
    return {
        "alone": torch.equal(expected, alone),
        "in a tree": torch.equal(expected, last_logits(tree, states_of(function, 90))),
        "behind others": torch.equal(expected, last_logits(behind, states_of(function, 80))),
        "in a crowd": torch.equal(expected, last_logits(many, states_of(function, 80))),
    }


def run_rows_kernel(rows: Rows, results: list[Any]) -> list[Tensor]:
    """A row kernel made by hand, on the inputs it was made from."""
    kernel = rows.kernel(results)
    code = print_code((kernel,))
    count = next(iter(rows.values.values())).shape[0]
    tensors = {node.name: rows.values[node].reshape(count, -1).contiguous() for node in rows.inputs}
    tensors |= {one.name: torch.zeros(count, one.width, dtype=one.dtype) for one in map(rows.array, results)}
    printed = code.launches[0].printed
    tensors["scratch"] = torch.full((count * max(printed.scratch, 1),), math.nan)
    function = getattr(load(code.source), code.launches[0].function)
    function[printed.grid.programs(count)](*(tensors[name] for name in printed.arguments))
    return [tensors[node.name].reshape(rows.values[node].shape) for node in results]


def measure_guards() -> dict[str, bool]:
    """Whether kernels run only where some row's mask is as wanted, over more rows than are looked at in one go."""
    found, count = {}, GUARD_BLOCK + 3
    for wanted in (True, False):
        for odd in (None, 0, count - 1, -2):  # -2: the one before the last, which only fills up a bucket
            rows = Rows()
            x = rows.input(torch.arange(1.0, 2 * count + 1).reshape(count, 2))
            kernel = replace(
                rows.kernel([result := rows.call(aten.mul.Tensor, x, 3.0)]),
                guard=Guard(Array("mask", torch.float32, 1, "N"), wanted),
            )
            code = print_code((kernel,))
            mask = torch.full((count, 1), 0.0 if wanted else 1.0)
            if odd is not None:
                mask[odd] = 1 - mask[odd]
            out = torch.zeros(count, 2)
            sequences = torch.zeros(count, dtype=torch.int64)
            sequences[-2] = -1
            named = {"mask": mask, "rows N": count, "sequences": sequences, x.name: rows.values[x], result.name: out}
            printed = code.launches[0].printed
            function = getattr(load(code.source), code.launches[0].function)
            function[printed.grid.programs(count)](*(named[name] for name in printed.arguments))
            expected = torch.zeros_like(out) if odd in (None, -2) else rows.values[result]
            found[f"{wanted} {odd}"] = torch.equal(out, expected)
    return found


def measure_wide() -> dict[str, float]:
    """Row kernels over more elements than one block has: a reduction, several at once, a softmax, and plain ones."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, shape in (("long", (2, 2 * BLOCK + 17)), ("many", (2, 40, 300)), ("both", (2, 3, BLOCK + 5))):
        rows = Rows()
        x = rows.input(torch.randn(shape, generator=generator))
        results = [
            rows.call(aten.mean.dim, x, [-1], True),
            rows.call(aten.amax.default, x, [-1]),
            rows.call(aten.softmax.int, x, -1),
            rows.call(aten.cat.default, [x, rows.call(aten.slice.Tensor, x, -1, 0, 0), x], -1),
        ]
        results.append(rows.call(aten.sub.Tensor, x, results[0]))
        for at, (ours, node) in enumerate(zip(run_rows_kernel(rows, results), results, strict=True)):
            found[f"{name} {at}"] = float((ours - rows.values[node]).abs().max() / rows.values[node].abs().max())
    rows = Rows()
    split = rows.call(aten.mul.Tensor, rows.input(torch.randn(2, 3 * BLOCK + 1, generator=generator)), 3.0)
    assert print_rows(rows.kernel([split])).grid.tiles == 4
    found["split"] = float((run_rows_kernel(rows, [split])[0] - rows.values[split]).abs().max())
    return found


def measure_scalars() -> dict[str, float]:
    """The largest error of each scalar operator in units of the last place."""
    found = {}
    for name, (_, low, high) in SCALARS.items():
        rows = Rows()
        node = rows.call(getattr(aten, name).default, rows.input(torch.linspace(low, high, 4000)[None]))
        exact = SCALARS[name][0](torch.linspace(low, high, 4000)[None].double())
        unit = torch.finfo(torch.float32).eps / 2 * exact.abs().clamp(min=1e-30)
        found[name] = float(((run_rows_kernel(rows, [node])[0].double() - exact).abs() / unit).max())
    edges = torch.tensor([[math.inf, -math.inf, math.nan, 0.0, 1e-45, 88.8, -103.9]])
    for name in ("exp", "expm1", "tanh", "sigmoid"):
        rows = Rows()
        node = rows.call(getattr(aten, name).default, rows.input(edges))
        ours = run_rows_kernel(rows, [node])[0]
        same = torch.allclose(ours, rows.values[node], rtol=1e-5, atol=1e-44, equal_nan=True)
        found[f"{name} at edges"] = 0.0 if same else math.inf
    rows = Rows()
    a, b = (rows.input(torch.tensor([value])) for value in ([2.0, -2.0, -2.0, 0.0, 0.0], [0.3, 3.0, 0.5, 2.0, 0.0]))
    node = rows.call(aten.pow.Tensor_Tensor, a, b)
    same = torch.allclose(run_rows_kernel(rows, [node])[0], rows.values[node], rtol=1e-6, equal_nan=True)
    return found | {"pow": 0.0 if same else math.inf}


PAGED = (
    Case(DensePages(), dtype=torch.bfloat16, group=4, key_dim=32, value_dim=16),
    Case(Affine(), key_dim=32, value_dim=32, group=1, softcap=20.0),
    Case(Affine(2, 8, "token", 16, 16), dtype=torch.bfloat16, key_dim=32, value_dim=48),
    Case(InPlace(), DoubleSparsity(0.5, dense_layers=3), key_dim=32, value_dim=32),
    Case(KeyChannels(0.4), DoubleSparsity(0.3, least=16), dtype=torch.bfloat16, key_dim=48, value_dim=32),
    Case(KeyChannels(0.5, Affine()), PageMeans(0.3, least=16), key_dim=32, value_dim=32),
    Case(Affine(), PageBounds(0.3, least=16, unit=4), key_dim=16, value_dim=16, group=4),
    Case(Unread(), key_dim=32, value_dim=32),
)


EXPERT_KERNELS = (
    experts(torch.bfloat16, SHARED, depth=2048, outputs=16384),
    experts(torch.bfloat16, BIASED, depth=2048, outputs=4096, transposed=True),
    experts(torch.float32, BIASED, depth=2048, outputs=16384, transposed=True),
    experts(torch.float16, OWN),
    choice(torch.bfloat16),
    choice(torch.float32),
)
"""Some as large as those of models, so that steps take all the memory that they may."""


@dataclass(frozen=True)
class Foreign(Codec):
    """A codec with a loader for generated C++ alone."""

    loader: ClassVar[str] = "Foreign"

    def page_bytes(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> int:
        return DensePages().page_bytes(key_dim, value_dim, dtype)

    def encode(self, content: Content) -> Tensor:
        return DensePages().encode(content)

    def decode(self, pages: Tensor, key_dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return DensePages().decode(pages, key_dim, value_dim, dtype)


def measure_pages() -> dict[str, float]:
    """How far attention over pages is from its reference, in parts of the largest value; and what a row's result is
    away from that of the same row alone."""
    found = {}
    for number, case in enumerate(PAGED):
        stored = random_stored(case, (150, 0, 64), (37, 20, 5))
        inputs, _ = call_of([(2, (-1, 0, 0, 1)), (0, (-1, 0)), (1, (-1,))], stored.lengths.tolist())
        rows, executable = random_rows(case, len(inputs[0])), TritonExecutable(case.function())
        states = [[one.clone() for one in stored.tensors] for _ in range(3)]
        expected = AtenExecutable(case.function())(*inputs, *rows, *states[0])[1].double()
        ours = executable(*inputs, *rows, *states[1])[1].double()
        found[f"{number}"] = float((expected - ours).abs().max() / expected.abs().max())
        found[f"{number} written"] = float((states[0][0].double() - states[1][0].double()).abs().max())
        alone, _ = call_of([(0, (-1,))], stored.lengths.tolist())
        own = executable(*alone, *(one[4:5] for one in rows), *states[2])[1].double()
        found[f"{number} alone"] = float((own - ours[4:5]).abs().max())
    return found


def main() -> None:
    found: dict[str, Any] = {f"{family} {dtype}": measure_family(family, dtype) for family, dtype in CASES}
    found |= {"company": measure_company(), "guards": measure_guards()}
    found |= {"wide": measure_wide(), "scalars": measure_scalars(), "pages": measure_pages()}
    print(json.dumps(found))


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `main` measures."""
    return interpret("tests.codegen.test_triton", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_it_computes_what_aten_computes(interpreted: dict[str, Any], family: str, dtype: str) -> None:
    found = interpreted[f"{family} {dtype}"]
    assert found.pop("untouched") and found.pop("in place")
    assert max(found.values()) < TOLERANCE[dtype], found


def test_a_rows_bits_do_not_depend_on_its_company(interpreted: dict[str, Any]) -> None:
    assert interpreted["company"] == dict.fromkeys(interpreted["company"], True)


def test_what_no_row_needs_is_not_run(interpreted: dict[str, Any]) -> None:
    assert interpreted["guards"] == dict.fromkeys(interpreted["guards"], True)


def test_rows_wider_than_a_block_are_computed_piece_by_piece(interpreted: dict[str, Any]) -> None:
    assert max(interpreted["wide"].values()) < 1e-5, interpreted["wide"]


def test_attention_over_pages_is_that_of_the_reference(interpreted: dict[str, Any]) -> None:
    found = interpreted["pages"]
    assert len(found) == 3 * len(PAGED)
    for name, apart in found.items():
        exact = "written" in name or "alone" in name
        dtype = str(PAGED[int(name[0])].dtype).removeprefix("torch.")
        assert apart == 0 if exact else apart < TOLERANCE[dtype], found


def test_scalar_operators_are_accurate(interpreted: dict[str, Any]) -> None:
    assert max(interpreted["scalars"].values()) < 8, interpreted["scalars"]


# What is compiled.


@pytest.fixture(scope="module")
def compile_for(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles one function of a module for a target, with Triton's cache in a folder of its own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        pytest.skip("kernels are interpreted in this process")
    folder = tmp_path_factory.mktemp("triton")

    def compiled(function: Any, printed: Printed, target: str, *, fusion: bool = False) -> Any:
        aligned = [
            at
            for at, (name, kind) in enumerate(printed.parameters)
            if kind.startswith("*") and name not in printed.unaligned
        ]
        attributes = {(at,): [["tt.divisibility", 16]] for at in aligned}
        source = ASTSource(function, dict(printed.parameters), attrs=attributes)
        options = {"num_warps": printed.warps, "num_stages": printed.stages, "enable_fp_fusion": fusion}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(folder))
            return triton.compile(source, target=GPUTarget(*TARGETS[target][:3]), options=options)

    return compiled


@pytest.fixture(scope="module")
def printed_kernels() -> dict[str, Any]:
    """The distinct kernels of llama and gemma2 in bfloat16, of pages and of experts, and their source under no name."""
    with torch.no_grad():
        cuts = [cut(function_of(family, "bfloat16", **FAMILIES[family])) for family in ("llama", "gemma2")]
        cuts += [cut(case.function()) for case in PAGED]
    kernels = [kernel for one in cuts for kernel in one.kernels]
    kernels += EXPERT_KERNELS
    product = next(kernel for kernel in kernels if isinstance(kernel, MatmulKernel))
    guard = Guard(Array("mask", torch.float32, 1, "N"), True)
    guarded = [replace(one, guard=guard) for one in (product, EXPERT_KERNELS[0])]
    code = print_code((*kernels, *guarded))
    return {"": code.source} | {one.function: one.printed for one in code.launches}


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_fits_into_shared_memory(
    compile_for: Any, printed_kernels: dict[str, Any], target: str, tmp_path: Path, record_property: Any
) -> None:
    module = load(printed_kernels[""], tmp_path)
    shared = {}
    for name, printed in printed_kernels.items():
        if name:
            compiled = compile_for(getattr(module, name), printed, target)
            assert compiled.metadata.enable_fp_fusion is False
            shared[name] = compiled.metadata.shared
    record_property("shared", shared)
    assert 0 < max(shared.values()) <= TARGETS[target][3], shared


def test_multiply_and_add_are_fused_only_where_that_is_allowed(
    compile_for: Any, tmp_path: Path
) -> None:
    rows = Rows()
    x = rows.input(torch.ones(1, 64))
    code = print_code((rows.kernel([rows.call(aten.add.Tensor, rows.call(aten.mul.Tensor, x, x), 1.0)]),))
    launch = code.launches[0]
    function = getattr(load(code.source, tmp_path), launch.function)
    kept, fused = (compile_for(function, launch.printed, "sm_80", fusion=fusion) for fusion in (False, True))
    assert b"FFMA" not in kept.asm["cubin"] and "fma." not in kept.asm["ptx"]
    assert kept.asm["ptx"] != fused.asm["ptx"] or kept.asm["cubin"] != fused.asm["cubin"]


# What needs no Triton.


def test_kernels_that_differ_in_nothing_but_their_arrays_are_one_function() -> None:
    with torch.no_grad():
        code = print_code(cut(function_of("llama", "float32", num_hidden_layers=2)).kernels)
    layers = [one.function for one in code.launches if one.function.startswith("attend")]
    assert len(layers) == 2 and len(set(layers)) == 1
    assert code.source.count("@triton.jit") == len({one.function for one in code.launches})


def test_every_primitive_is_spelt() -> None:
    assert set(SPELLING) == set(PRIMITIVES)


def test_tiling_leaves_no_step_out_and_no_part_empty() -> None:
    for out in (64, 576, 1536, 4096, 49152):
        for depth in (64, 96, 576, 1536, 4096, 14336):
            cut = tiling(((0, out),), depth, 2)
            every = -(-depth // cut.step)
            assert cut.steps * cut.parts >= every > cut.steps * (cut.parts - 1)


def test_buckets_hold_their_rows() -> None:
    assert [bucket_size(count) for count in (0, 1, 2, 3, 33, 64, 65, 4096)] == [0, 1, 2, 4, 64, 64, 65, 4096]


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Sequences and parents of rows, and the slots' lengths."""
    slots = draw(st.permutations(range(3)))[: draw(st.integers(1, 3))]
    sequences, parents = [], []
    for slot in slots:
        first = len(parents)
        for row in range(draw(st.integers(1, 9))):
            parent = draw(st.integers(-1, row - 1)) if row else -1
            parents.append(first + parent if parent >= 0 else -1)
            sequences.append(slot)
    return sequences, parents, draw(st.lists(st.integers(0, 9), min_size=3, max_size=3))


@settings(max_examples=60, deadline=None)
@given(tree=trees(), absent=st.integers(0, 3))
def test_the_layout_finds_the_place_of_every_token_of_a_rows_text(
    tree: tuple[list[int], list[int], list[int]], absent: int
) -> None:
    sequences, parents, lengths = (torch.tensor(column) for column in tree)
    fill = torch.full((absent,), -1)
    found = lay_out(torch.cat([sequences, fill]), torch.cat([parents, fill]), lengths)
    count = len(sequences)
    assert torch.equal(found["place"][:count].long(), row_places(sequences, lengths))
    assert found["position"][count:].tolist() == [-1] * absent
    for row, above in enumerate(ancestry(parents)):
        path = [*range(int(lengths[sequences[row]])), *found["place"][:count][above].tolist()]
        assert found["position"][row] == len(path) - 1
        for position, place in enumerate(path):
            at, far = row, len(path) - 1 - position
            for level, up in enumerate(found["above"]):
                at = int(up[at]) if far >> level & 1 else at
            plain = position < found["plain"][row]
            assert place == (position if plain else found["place"][at])


def test_the_source_is_kept_by_content_and_mended(tmp_path: Path) -> None:
    first = saved("x = 1\n", tmp_path)
    assert first.name == SOURCE and saved("x = 1\n", tmp_path) == first != saved("x = 2\n", tmp_path)
    first.write_text("y")
    assert saved("x = 1\n", tmp_path).read_text() == "x = 1\n"


def test_a_model_on_the_cpu_is_refused() -> None:
    with pytest.raises(LoweringError, match="Triton runs on a GPU"):
        TritonExecutable(function_of("llama", "float32", num_hidden_layers=2))


def test_pages_without_a_kernel_are_refused() -> None:
    for codec in (Foreign(), KeyChannels(0.5, Foreign())):
        with pytest.raises(LoweringError, match="no Triton kernel for these pages"):
            print_code(cut(Case(codec).function()).kernels)


def test_float64_is_refused() -> None:
    with torch.no_grad(), pytest.raises(LoweringError, match="no Triton kernel for this dtype"):
        print_code(cut(function_of("llama", "float64", **ONE)).kernels)


if __name__ == "__main__":
    main()
