"""What every benchmark needs: prompts by category, the machine it ran on, and results kept as data."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
OWN_PROMPTS = HERE / "prompts.jsonl"
HEADS = HERE.parent / "examples" / "hydra-smollm2"
"""Draft heads that were trained on none of the prompts whose question_id % 4 is 1."""
SINGLE_TURN = ("translation", "summarization", "qa", "math_reasoning", "rag")
"""Spec-Bench's categories of one turn; its eight MT-Bench categories count as one, "multi_turn"."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: the first turn of a Spec-Bench record."""

    question_id: int
    category: str
    text: str


def add_prompt_options(parser) -> None:  # type: ignore[no-untyped-def]
    """--prompts and --per-category."""
    parser.add_argument("--prompts", type=Path, default=Path(os.environ.get("GRAFT_PROMPTS") or OWN_PROMPTS))
    parser.add_argument("--per-category", type=int, default=4, help="prompts of each category, spread over the file")


def load_prompts(path: Path, per_category: int) -> list[Prompt]:
    """Up to `per_category` prompts of each of the six categories, evenly spread over the file's order."""
    by_category: dict[str, list[Prompt]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        category = row["category"] if row["category"] in SINGLE_TURN else "multi_turn"
        by_category.setdefault(category, []).append(Prompt(row["question_id"], category, row["turns"][0]))
    chosen = []
    for prompts in by_category.values():
        count = min(per_category, len(prompts))
        chosen += [prompts[index * len(prompts) // count] for index in range(count)]
    return chosen


def machine() -> dict[str, object]:
    """Processor, cores, memory and versions."""
    names = ("graft-lm", "torch", "transformers", "triton", "numpy")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


def processor() -> str:
    """The processor's name as the system gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def version(name: str) -> str:
    """The installed version, or "-"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


def save(name: str, results: Mapping[str, object], prompts: Path | None = None) -> Path:
    """Write results/NAME.json with machine, versions, command and date. Paths are cut to the file's name."""
    RESULTS.mkdir(exist_ok=True)
    arguments = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", f"benchmarks.{name.split('-', maxsplit=1)[0]}", *arguments]),
        "prompts": prompts.name if prompts else None,
        "machine": machine(),
        **results,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
