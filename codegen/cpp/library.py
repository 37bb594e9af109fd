"""From kernels to a loaded library: the source as one translation unit, and what it is called with."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from graft.codegen.cpp.build import build
from graft.codegen.cpp.isa import Isa
from graft.codegen.cpp.printer import function, print_kernel
from graft.codegen.kernel_ir import AtenKernel, AttendPagesKernel, ExpertKernel, Kernel, TopKernel

HEADERS = (
    *("vec.h", "math.h", "team.h", "step.h", "matmul.h", "tiles.h", "attention.h", "top.h"),
    "experts.h",
    *("codes.h", "affine.h", "selection.h", "pages.h"),
)

HEAD = """#include "{attention}"
#include "matmul.h"
#include "top.h"{experts}

using namespace graft;
namespace {{

"""

TAIL = """
const Kernel KERNELS[] = {{{names}}};

}}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API Team* graft_open(int threads) {{ return new Team(threads); }}
API void graft_close(Team* team) {{ delete team; }}
API int graft_here(const Team* team) {{ return team->here(); }}
API void graft_run(Team* team, const Call* call) {{ run(*team, *call, KERNELS); }}
API void graft_top(Team* team, const float* logits, int64_t rows, int64_t width, int size, int64_t* ids) {{
    best_of_rows(*team, logits, rows, width, size, ids);
}}
"""


class Call(ctypes.Structure):
    """struct Call of include/step.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "results", "slots")),
        *((name, ctypes.c_void_p) for name in ("sequences", "parents", "lengths", "wanted", "sizes")),
        *((name, ctypes.c_void_p) for name in ("addresses", "schedule", "arguments")),
        *((name, ctypes.c_int64) for name in ("first", "last")),
        ("seconds", ctypes.c_void_p),
        ("skips", ctypes.c_void_p),
    )


@dataclass
class Code:
    """Printed kernels, and how they are called in order."""

    source: str = ""
    schedule: list[int] = field(default_factory=list)
    """For every kernel that is not ATen's: the number of its function, where its arguments start."""
    arguments: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """For every kernel the name of its code; "aten" for those of ATen."""
    places: dict[str, int] = field(default_factory=dict)
    """What is named in arguments -> its number among the addresses."""

    def place(self, name: str) -> int:
        """The number of an address."""
        return self.places.setdefault(name, len(self.places))


def print_code(kernels: tuple[Kernel, ...], packed: frozenset[str], counters: Mapping[int, int]) -> Code:
    """All kernels as one source; kernels that are equal but for their arrays are one function. `counters` are the
    kernels that count for their guards, by their place, with the guards' numbers."""
    code, functions, texts = Code(), dict[str, int](), list[str]()
    names: list[str] = []
    for place, kernel in enumerate(kernels):
        if isinstance(kernel, AtenKernel):
            code.names.append("aten")
            continue
        printed = print_kernel(kernel, packed, counters.get(place, -1))
        if printed.body not in functions:
            functions[printed.body] = len(names)
            names.append(f"{printed.kind}_{len(names)}")
            comment = ", ".join(node.name for node in kernel.nodes)
            texts.append(function(names[-1], printed.body, comment))
        code.names.append(names[functions[printed.body]])
        code.schedule += [functions[printed.body], len(code.arguments)]
        code.arguments += [one if isinstance(one, int) else code.place(one) for one in printed.arguments]
    pages = any(isinstance(kernel, AttendPagesKernel) for kernel in kernels)
    chosen = any(isinstance(kernel, ExpertKernel | TopKernel) for kernel in kernels)
    head = HEAD.format(
        attention="pages.h" if pages else "attention.h", experts='\n#include "experts.h"' if chosen else ""
    )
    code.source = head + "\n".join(texts) + TAIL.format(names=", ".join(names) or "nullptr")
    return code


def headers() -> dict[str, str]:
    """The headers that a source may include, by name."""
    folder = resources.files("graft.codegen.cpp") / "include"
    return {name: (folder / name).read_text() for name in HEADERS}


def load(source: str, isa: Isa) -> tuple[Any, Path]:
    """The library of a source, built if it is not in the cache, and its path."""
    path = build(source, headers(), isa)
    library = ctypes.CDLL(str(path))
    library.graft_open.restype = ctypes.c_void_p
    library.graft_open.argtypes = [ctypes.c_int]
    library.graft_close.argtypes = library.graft_here.argtypes = [ctypes.c_void_p]
    library.graft_run.argtypes = [ctypes.c_void_p, ctypes.POINTER(Call)]
    library.graft_top.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p)
    ]
    library.graft_close.restype = library.graft_run.restype = library.graft_top.restype = None
    return library, path
