"""SmolLM2-135M-Instruct under compressions of its KV cache: what they cost in quality, and what they give in bytes and
microseconds.

Quality is measured in float32, where rounding stays below every difference of interest: in bfloat16 the last bits of a
cache that is off by one unit somewhere come to a KL of their own. All arms compress at the end of the prompt, which is
run once for all of them, and then every 64 tokens; "streaming" compresses from the first token on. Times are in
bfloat16: a step of one row behind a context, which is rolled back, the arms taking turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import graft
from benchmarks.record import RESULTS, save
from benchmarks.steps import spread
from benchmarks.systems import wide_console
from examples.smollm2 import load
from graft import Affine, CompressKV, DensePages, DoubleSparsity, KeyChannels, PageBounds, PageMeans
from graft.codegen.cpp.executable import CppExecutable
from graft.quality import Candidate, Documents, Options, Quality, measured, own_documents, read_documents
from graft.quality.arms import Arm, Arms, Say, prefilled
from graft.runtime.decoder import Rows

AFFINE4 = Affine()
H2O50 = graft.H2O(ratio=0.5)
DS8 = DoubleSparsity(ratio=0.125)
ARMS: dict[str, CompressKV] = {
    "int8 per token": CompressKV(Affine(8, 8, "token", 32, 32)),
    "KIVI K4V4": CompressKV(AFFINE4),
    "int4 per token": CompressKV(Affine(4, 4, "token", 32, 32)),
    "KIVI K4V2": CompressKV(Affine(4, 2)),
    "KIVI K2V2": CompressKV(Affine(2, 2)),
    "ThinK 40%": CompressKV(KeyChannels(0.6)),
    "ThinK 50%": CompressKV(KeyChannels(0.5)),
    "StreamingLLM 50%": CompressKV(DensePages(), graft.StreamingLLM(ratio=0.5)),
    "StreamingLLM 25%": CompressKV(DensePages(), graft.StreamingLLM(ratio=0.25)),
    "H2O 50%": CompressKV(DensePages(), H2O50),
    "H2O 25%": CompressKV(DensePages(), graft.H2O(ratio=0.25)),
    "SnapKV 50%": CompressKV(DensePages(), graft.SnapKV(ratio=0.5), prompt="dense"),
    "SnapKV 25%": CompressKV(DensePages(), graft.SnapKV(ratio=0.25), prompt="dense"),
    "KeyNorm 50%": CompressKV(DensePages(), graft.KeyNorm(ratio=0.5)),
    "Random 50%": CompressKV(DensePages(), graft.RandomEviction(ratio=0.5)),
    "Double Sparsity 25%": CompressKV(DensePages(), selection=DoubleSparsity(ratio=0.25)),
    "Double Sparsity 12.5%": CompressKV(DensePages(), selection=DS8),
    "Double Sparsity 6.25%": CompressKV(DensePages(), selection=DoubleSparsity(ratio=0.0625)),
    "Quest pages of 16, 12.5%": CompressKV(DensePages(), selection=PageBounds(ratio=0.125, unit=16)),
    "page means of 8, 12.5%": CompressKV(DensePages(), selection=PageMeans(ratio=0.125, unit=8)),
    "H2O 50% + KIVI K4V4": CompressKV(AFFINE4, H2O50),
    "Double Sparsity 12.5% + KIVI K4V4": CompressKV(AFFINE4, selection=DS8),
}
"""By name; here all of them compress at the end of a prompt."""
TIMED = ("KIVI K4V4", "Double Sparsity 12.5%", "StreamingLLM 50%", "Double Sparsity 12.5% + KIVI K4V4")
"""Beside the full cache."""
GIVEN = ("context", "tokens", "streamed", "passkeys", "passkey_context", "references")
CONTEXTS = (1000, 4000, 8000)


def main() -> None:
    arguments = parser().parse_args()
    console = wide_console()
    arms = {name: replace(ARMS[name], prompt="dense") for name in arguments.arms or ARMS}
    given = {name: getattr(arguments, name) for name in GIVEN}
    options = Options(**given)
    start = time.perf_counter()

    def say(step: str) -> None:
        console.print(f"{time.perf_counter() - start:7.1f} s  {step}")

    before = earlier(arguments.save) if arguments.add else {}
    record = dict(before)
    path = None
    if arguments.part != "times":
        for found in quality(arms, options, arguments, say):
            # Whoever stops it keeps what there is.
            record |= with_quality(before, found[0])
            path = save(arguments.save, record | {"seconds": round(time.perf_counter() - start)})
        console.print(str(found[1]), soft_wrap=True)
    if arguments.part != "quality":
        record["times"] = times(arguments, say)
        path = save(arguments.save, record | {"seconds": round(time.perf_counter() - start)})
    assert path is not None
    console.print(f"kept in benchmarks/results/{path.name}")


def earlier(name: str) -> dict[str, Any]:
    """What a run before left, its command among `runs`; nothing where there was none."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    about = {key: record[key] for key in ("date", "command", "machine", "seconds")}
    kept = {key: record[key] for key in ("text", "quality", "times") if key in record}
    return {**kept, "runs": [*record.get("runs", []), about]}


def with_quality(record: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Arms beside those of runs before. Raises PlanError where those were of other text or other sizes."""
    if "quality" not in record:
        return found
    same = [{**one, "quality": {**one["quality"], "arms": {}}} for one in (record, found)]
    if any(same[0][key] != same[1][key] for key in ("text", "quality")):
        raise graft.PlanError("the record holds figures of other text or other sizes", remedy="leave out --add")
    arms = record["quality"]["arms"] | found["quality"]["arms"]
    return {**found, "quality": {**found["quality"], "arms": arms}}


def parser() -> argparse.ArgumentParser:
    """The options: sizes."""
    found, usual = argparse.ArgumentParser(description=__doc__.splitlines()[0]), Options()
    found.add_argument("--text", nargs="+", default=[], metavar="FILE", help="none: Python's documentation")
    found.add_argument("--documents", type=int, default=4)
    found.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="these arms alone")
    found.add_argument("--part", choices=("both", "quality", "times"), default="both")
    found.add_argument("--context", type=int, default=usual.context)
    found.add_argument("--tokens", type=int, default=usual.tokens)
    found.add_argument("--streamed", type=int, default=1024, help="tokens of a text compressed on the way")
    found.add_argument("--passkeys", type=int, default=usual.passkeys)
    found.add_argument("--passkey-context", type=int, default=usual.passkey_context)
    found.add_argument("--references", choices=("all", "continuation", "none"), default="continuation")
    found.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS), help="of timed steps")
    found.add_argument("--repeats", type=int, default=30, help="timed steps of an arm at a context")
    found.add_argument("--add", action="store_true", help="to the record, which holds other arms of the same sizes")
    found.add_argument("--save", default="kv", help="name of the record under benchmarks/results")
    return found


def quality(
    arms: Mapping[str, CompressKV], options: Options, arguments: argparse.Namespace, say: Say
) -> Iterator[tuple[dict, Quality]]:
    """Everything that is measured of logits, and bytes, as far as it is known."""
    say("loading SmolLM2-135M-Instruct in float32")
    model, tokenizer = load(torch.float32)
    texts = held_text(arguments.text, tokenizer, options.length, arguments.documents)
    about = {"source": texts.source, "sha256": texts.digest}
    for found in measured(model, arms, texts.ids, options, tokenizer=tokenizer, progress=say):
        text = {**about, "documents": found["full"].kl.shape[0]}
        yield {"text": text, "quality": {"dtype": "float32", **asdict(options), "arms": found.to_json()}}, found


def held_text(files: Sequence[str | Path], tokenizer: object, length: int, count: int) -> Documents:
    """The files that were given, or Python's documentation."""
    if files:
        return read_documents(files, tokenizer, length, count)
    return own_documents(tokenizer, length, count)


def times(arguments: argparse.Namespace, say: Say) -> dict:
    """Microseconds of a step of one row, and the bytes that it reads, by context and arm."""
    say("loading SmolLM2-135M-Instruct in bfloat16")
    model, tokenizer = load(torch.bfloat16)
    text = list(held_text(arguments.text, tokenizer, max(arguments.contexts), 1).ids[0])
    maker = Arms(model, say=say)
    wanted = [Candidate("full", None), *(Candidate(name, replace(ARMS[name], prompt="dense")) for name in TIMED)]
    arms = {one.name: maker.make(one) for one in wanted}
    say(f"a prompt of {len(text)} tokens for all arms")
    snapshot = prefilled(arms.values(), text)
    found: dict[str, dict] = {}
    for context in arguments.contexts:
        say(f"steps behind {context} tokens")
        slots = {name: snapshot.first(context).put(arm)[0] for name, arm in arms.items()}
        taken = turns(arms, slots, text[context - 1], context, arguments.repeats)
        found[str(context)] = {
            name: {"us": spread(values, 1e-6), "allocated": arms[name].decoder.store.nbytes}
            for name, values in taken.items()
        }
        for arm in arms.values():
            arm.clear()
    executable = arms["full"].decoder.executable
    backend = executable.isa.name if isinstance(executable, CppExecutable) else executable.backend
    return {"dtype": "bfloat16", "backend": backend, "repeats": arguments.repeats, "contexts": found}


def turns(
    arms: Mapping[str, Arm], slots: Mapping[str, int], token: int, context: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of steps, by arm."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(repeats):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            # The executable's threads fell asleep meanwhile; between the steps of a text they stay awake.
            step(arms[name], slots[name], token, context)
            found[name].append(median(step(arms[name], slots[name], token, context) for _ in range(3)))
    return found


def step(arm: Arm, slot: int, token: int, context: int) -> float:
    """Seconds of one step, which is rolled back."""
    rows = Rows()
    rows.add_chain(slot, [token], context)
    start = time.perf_counter()
    arm.decoder.forward(rows)
    seconds = time.perf_counter() - start
    arm.decoder.rollback(slot)
    return seconds


if __name__ == "__main__":
    main()
