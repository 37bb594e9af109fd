"""The instruction sets that C++ is generated for, and which of them this machine runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from graft.compiler.errors import LoweringError

CPUINFO = Path("/proc/cpuinfo")
# The kernel writes these unlike the compiler's option; all others are the option without -m.
KERNEL_NAMES: Mapping[str, str] = MappingProxyType({"avx512bf16": "avx512_bf16"})
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")


@dataclass(frozen=True)
class Isa:
    """An instruction set: what graft calls it, and the compiler's options for it."""

    name: str
    flags: tuple[str, ...]

    @property
    def features(self) -> frozenset[str]:
        """What /proc/cpuinfo must list for code built with `flags` to run."""
        options = (flag.removeprefix("-m") for flag in self.flags)
        return frozenset(KERNEL_NAMES.get(option, option) for option in options)


ISAS: Mapping[str, Isa] = MappingProxyType(
    {
        isa.name: isa
        for isa in (
            Isa("avx512_bf16", (*AVX512, "-mavx512bf16", *AVX2)),
            Isa("avx512", (*AVX512, *AVX2)),
            Isa("avx2", AVX2),
            Isa("portable", ()),
        )
    }
)
"""By name, the most capable first."""


def runnable() -> tuple[Isa, ...]:
    """The instruction sets that this machine runs, the most capable first; "portable" is always the last."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    # A thread may run on any processor, so a feature counts where every one of them has it.
    processors = [set(line.partition(":")[2].split()) for line in lines if line.partition(":")[0].strip() == "flags"]
    features = set.intersection(*processors) if processors else set()
    return tuple(isa for isa in ISAS.values() if isa.features <= features)


def detect() -> Isa:
    """The most capable instruction set that this machine runs; "portable" where Linux does not say."""
    return runnable()[0]


def choose(name: str | None) -> Isa:
    """The instruction set called `name`, else the one that the environment variable GRAFT_ISA names, else detect()'s.

    LoweringError where there is none of that name, or this machine cannot run it.
    """
    where = "the instruction set asked for"
    if name is None:
        name, where = os.environ.get("GRAFT_ISA") or None, "the environment variable GRAFT_ISA"
    if name is None:
        return detect()
    possible = runnable()
    if name in ISAS and ISAS[name] in possible:
        return ISAS[name]
    problem = f"this machine cannot run {name}" if name in ISAS else "there is no instruction set of this name"
    raise LoweringError(
        problem,
        expected="one of " + ", ".join(isa.name for isa in possible),
        found=repr(name)[:80],
        where=where,
        remedy="name one of these, or none to have the best of them chosen",
    )


def processor_name() -> str:
    """The processor's name as Linux gives it; "unknown processor" elsewhere."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")
