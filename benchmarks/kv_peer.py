"""kvpress and graft side by side: the same model, text and share kept, by one method and another.

kvpress wants a transformers of its own, so it runs in an interpreter of its own (--python), which has torch, gguf,
transformers below 5.3, and kvpress. There `compress` says what its cache holds, how long a step takes, and how far its
output is from that of its own full cache; graft's figures come from graft.quality and benchmarks.kv. Both in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import graft
from benchmarks.kv import held_text, turns
from benchmarks.record import save
from benchmarks.steps import spread
from benchmarks.systems import wide_console
from examples.smollm2 import load, weights
from graft import CompressKV, DensePages
from graft.quality import Candidate, Options, measure
from graft.quality.arms import Arms, prefilled

WORKER = Path(__file__).with_name("kv_peer_worker.py")
KEPT = 0.5
PAIRS: dict[str, tuple[str, CompressKV]] = {
    "recency": ("StreamingLLMPress", CompressKV(DensePages(), graft.StreamingLLM(ratio=KEPT))),
    "SnapKV": ("SnapKVPress", CompressKV(DensePages(), graft.SnapKV(ratio=KEPT), prompt="dense")),
    "key norm": ("KnormPress", CompressKV(DensePages(), graft.KeyNorm(ratio=KEPT))),
    "random": ("RandomPress", CompressKV(DensePages(), graft.RandomEviction(ratio=KEPT))),
    "AdaKV over SnapKV": (
        "AdaKVPress", CompressKV(DensePages(), graft.SnapKV(ratio=KEPT, heads="adaptive"), prompt="dense"),
    ),
    "ThinK": ("ThinKPress", CompressKV(graft.KeyChannels(KEPT))),
}  # fmt: skip
"""By method: kvpress' press and ours, half of the tokens, or of the keys' channels, being kept."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="interpreter of an environment with kvpress")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="none: Python's documentation")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--save", default="kv_peer")
    arguments = parser.parse_args()
    console = wide_console()
    options = Options(arguments.context, arguments.tokens, streamed=0, passkeys=0, references="none")
    model, tokenizer = load(torch.float32)
    texts = held_text(arguments.text, tokenizer, options.length, arguments.documents)
    console.print(f"kvpress, by {arguments.python.name}")
    peer = asked(arguments, [list(one) for one in texts.ids], console)
    if peer is None:
        return
    console.print("graft")
    record = {
        "kept": KEPT, "dtype": "float32", "context": arguments.context, "tokens": arguments.tokens,
        "text": {"source": texts.source, "sha256": texts.digest, "documents": arguments.documents},
        "peer": peer, "graft": own(model, texts.ids, options, arguments.repeats, console),
    }  # fmt: skip
    console.print(table(record))
    path = save(arguments.save, record)
    console.print(f"kept in benchmarks/results/{path.name}")


def asked(arguments: argparse.Namespace, texts: list[list[int]], console: Console) -> dict | None:
    """What kvpress does; None, and why, where it cannot be had."""
    presses = {name: {"press": press, "ratio": 1 - KEPT} for name, (press, _) in PAIRS.items()}
    work = {
        "weights": str(weights()), "texts": texts, "context": arguments.context, "tokens": arguments.tokens,
        "threads": torch.get_num_threads(), "repeats": arguments.repeats, "presses": presses,
    }  # fmt: skip
    command = [str(arguments.python), str(WORKER)]
    try:
        done = subprocess.run(command, input=json.dumps(work), capture_output=True, text=True, check=False)
    except OSError as error:
        console.print(f"kvpress is left out: {arguments.python} does not run ({error.strerror})")
        return None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        console.print(f"kvpress is left out: {lines[-1] if lines else f'exit code {done.returncode}'}")
        return None
    found: dict = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def own(
    model: object, texts: tuple[tuple[int, ...], ...], options: Options, repeats: int, console: Console
) -> dict[str, dict]:
    """The same of graft."""
    arms = {name: replace(change, prompt="dense") for name, (_, change) in PAIRS.items()}
    found = measure(model, arms, texts, options, progress=console.print)  # type: ignore[arg-type]
    maker = Arms(model)  # type: ignore[arg-type]
    made = {name: maker.make(Candidate(name, change)) for name, change in {"full": None, **arms}.items()}
    prompt = list(texts[0][: options.context])
    shared = prefilled(made.values(), prompt)
    slots = {name: shared.put(arm)[0] for name, arm in made.items()}
    taken = turns(made, slots, prompt[-1], options.context, repeats)
    return {
        name: {
            "cache_bytes": found[name].allocated,
            "kl": found.kl(name).to_json(),
            "step_us": spread(taken[name], 1e-6),
        }
        for name in made
    }


def table(record: dict) -> Table:
    """One line for each method."""
    shown = Table(title=f"{record['context']} tokens, {record['kept']:.0%} kept: kvpress, and graft")
    for heading in ("method", "MB", "of its full", "KL", "ms a step", "MB", "of its full", "KL", "ms a step"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for name in record["graft"]:
        cells = []
        for side in ("peer", "graft"):
            arms = record[side] if side == "graft" else record[side]["arms"]
            one, full = arms[name], arms["full"]
            share = one["cache_bytes"] / full["cache_bytes"]
            cells += [f"{one['cache_bytes'] / 1e6:.1f}", f"{share:.3f}", f"{one['kl']['mean']:.3g}",
                      f"{one['step_us']['median'] / 1e3:.1f}"]  # fmt: skip
        shown.add_row(name, *cells)
    return shown


if __name__ == "__main__":
    main()
