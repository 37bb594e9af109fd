"""From kernels to a loaded module: the source as one file of Python, and the launches of a step in order.

The file lies in the cache of compiled code (codegen/cache.py), in an entry named after the SHA-256 of the source;
Triton keeps what it compiles from it in a cache of its own.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

from graft.codegen.cache import LOCK_WAIT, cache_folder, lock, private_folder, publish, tidy, write
from graft.codegen.kernel_ir import (
    AppendKernel,
    AtenKernel,
    AttendKernel,
    AttendPagesKernel,
    ExpertKernel,
    GatherKernel,
    Guard,
    Kernel,
    MatmulKernel,
    RowKernel,
    TopKernel,
)
from graft.codegen.triton.attention import print_append, print_attend
from graft.codegen.triton.experts import print_experts, print_top
from graft.codegen.triton.matmul import print_gather, print_matmul
from graft.codegen.triton.pages import print_attend_pages
from graft.codegen.triton.printed import Printed
from graft.codegen.triton.rows import print_rows

SOURCE = "kernels.py"
GUARD_BLOCK = 64
"""Rows whose masks a program looks at in one go."""

HEAD = """import triton
import triton.language as tl
from graft.codegen.triton.device import (
    attention, divide, exp, expm1, larger, largest, log1p, multiply, power, smaller, smallest, square_root, tanh,
    to_bf16,
)
from graft.codegen.triton.device_experts import CHOSEN, before, expert_of, largest_few, together
from graft.codegen.triton.device_pages import paged_attention
"""


@dataclass(frozen=True)
class Launch:
    """One function of a step: its name, how it is launched, and the kernel that it computes, or the last part of."""

    function: str
    printed: Printed
    kernel: Kernel


@dataclass
class Code:
    """Printed kernels, and the steps of the function in order: launches, and what ATen runs."""

    source: str = ""
    names: list[str] = field(default_factory=list)
    """For each kernel the function that computes it, "aten" for what ATen runs."""
    steps: list[Launch | AtenKernel] = field(default_factory=list)

    @property
    def launches(self) -> list[Launch]:
        """The steps that are ours."""
        return [step for step in self.steps if isinstance(step, Launch)]


def print_kernel(kernel: Kernel) -> tuple[Printed, ...]:
    """The code of one kernel: more than one function where one has to wait for all of another."""
    match kernel:
        case RowKernel():
            return (print_rows(kernel),)
        case MatmulKernel():
            return print_matmul(kernel)
        case ExpertKernel():
            return (print_experts(kernel),)
        case TopKernel():
            return (print_top(kernel),)
        case GatherKernel():
            return (print_gather(kernel),)
        case AppendKernel():
            return (print_append(kernel),)
        case AttendKernel():
            return (print_attend(kernel),)
        case AttendPagesKernel():
            return (print_attend_pages(kernel),)
    raise AssertionError(f"no code for {type(kernel).__name__}")


def guarded(printed: Printed, guard: Guard) -> Printed:
    """The kernel, whose programs return at once where no row's mask is as it has to be. The mask is read on the device,
    so that a CUDA graph holds the choice. Rows that only fill up a bucket belong to no sequence and need nothing."""
    kept, real = "!= 0" if guard.wanted else "== 0", guard.mask.rows == "N"
    read = "slot = tl.load(guard_slots + guard_at, mask=guard_at < guard_rows, other=-1)"
    branch = (
        "needed = 0",
        f"for first in range(0, guard_rows, {GUARD_BLOCK}):",
        f"    guard_at = first + tl.arange(0, {GUARD_BLOCK})",
        f"    mask = tl.load(guard + guard_at, mask=guard_at < guard_rows, other={0.0 if guard.wanted else 1.0})",
        *([f"    {read}"] if real else []),
        f"    needs = (mask {kept}){' & (slot >= 0)' if real else ''}",
        "    needed = tl.maximum(needed, tl.max(needs.to(tl.int32), 0))",
        "if needed == 0:",
        "    return",
    )
    slots = [("guard_slots", "*i64")] if real else []
    return replace(
        printed,
        parameters=(*printed.parameters, ("guard", "*fp32"), ("guard_rows", "i32"), *slots),
        body=(*branch, *printed.body),
        arguments=(
            *printed.arguments, guard.mask.name, f"rows {guard.mask.rows}", *(["sequences"] if real else [])
        ),
    )


def print_code(kernels: tuple[Kernel, ...]) -> Code:
    """All kernels as one source; kernels that are equal but for what they are given are one function."""
    code, names, texts = Code(), dict[object, str](), [HEAD]
    for kernel in kernels:
        if isinstance(kernel, AtenKernel):
            code.steps.append(kernel)
            code.names.append("aten")
            continue
        launches = []
        for printed in print_kernel(kernel):
            printed = printed if kernel.guard is None else guarded(printed, kernel.guard)
            same = printed.kind, printed.parameters, printed.body
            if same not in names:
                names[same] = f"{printed.kind}_{len(names)}"
                texts.append(printed.text(names[same], ", ".join(node.name for node in kernel.nodes)))
            launches.append(Launch(names[same], printed, kernel))
        code.steps += launches
        code.names.append(launches[0].function)
    code.source = "\n\n".join(texts)
    return code


def load(source: str, cache: Path | None = None) -> ModuleType:
    """The module of a source. Its file is kept in the cache, where it can be read and where Triton looks for it; in a
    temporary folder, and with a RuntimeWarning, where the cache cannot be used. `cache` as in cpp.build.build."""
    path = saved(source, cache_folder(cache))
    module = ModuleType(f"graft_triton_{path.parent.name[:16]}")
    module.__file__ = str(path)
    # Not imported, so that the cache holds no bytecode and the interpreter's list of modules no kernels.
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def saved(source: str, folder: Path) -> Path:
    """The file that holds the source, written if it is not there."""
    key = hashlib.sha256(source.encode()).hexdigest()
    entry = folder / key
    try:
        if not folder.is_absolute():
            raise FileNotFoundError(f"there is no home folder: {folder}")
        with lock(folder, key, LOCK_WAIT):
            if intact(entry / SOURCE, source):
                os.utime(entry)
                return entry / SOURCE
            publish(folder, lambda staging: write_source(staging, source, key))
        tidy(folder)
        return entry / SOURCE
    except OSError as reason:
        if intact(entry / SOURCE, source):
            return entry / SOURCE
        warnings.warn(
            f"generated code cannot be kept in {folder} ({reason.strerror or reason}): it lies in a temporary folder; "
            "make the folder writable, or set GRAFT_CACHE to one that is",
            RuntimeWarning,
            stacklevel=4,
        )
        private = private_folder() / key
        write(private / SOURCE, source)
        return private / SOURCE


def intact(path: Path, source: str) -> bool:
    """Whether the file is there and holds the source."""
    try:
        return path.read_text(encoding="utf-8") == source
    except (OSError, UnicodeDecodeError):
        return False


def write_source(folder: Path, source: str, key: str) -> str:
    """Write the source into a folder that is to become an entry; returns the entry's name."""
    write(folder / SOURCE, source)
    return key
