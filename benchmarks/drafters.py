"""Every drafter, alone and merged, beside plain decoding and llama.cpp: SmolLM2-135M-Instruct, batch 1, greedy.

For every prompt the systems take turns, as in benchmarks/speed.py. A step is one verification: "draft" is what
proposing and learning took of it, "verify" the target's run with its argmax and top-k; what an early exit ran counts as
drafting. The controller is the default one, which stops drafting where that does not pay, but where a name says how
many rows are always drafted. What can share a compile does, so that most of the time is spent on the figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedModel

import graft
from benchmarks.record import HEADS, Prompt, add_prompt_options, load_prompts, save, version
from benchmarks.speed import Runs, new_tokens, order, rate, same, token_ids
from benchmarks.systems import Graft, System, make, turn, wide_console
from examples.smollm2 import load
from graft.compiler.host import plain_host
from graft.compiler.program import Program
from graft.compiling import assembled

ALWAYS = graft.FixedBudget(4)
HYDRA = graft.Heads(HEADS)
RECYCLE = graft.Recycle(seed_vocabulary=16384)
TABLES = (graft.Lookup(), RECYCLE)
SKIPPING = graft.SelfDraft(graft.DropBlock(tuple(range(8, 24, 2)), "feed-forward"), function="skipping")
GROUPED = graft.SelfDraft(graft.LayerParallel(2), function="grouped")
EXITS = graft.DEL((20, 26))


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    draft: tuple[graft.Drafter, ...]
    controller: graft.Controller | None = None
    """None: the default one."""


COMPILED: dict[tuple[graft.Drafter, ...], dict[str, Row]] = {
    (HYDRA, SKIPPING, GROUPED): {
        "plain": Row(()),
        "lookup": Row((graft.Lookup(),)),
        "recycle": Row((RECYCLE,)),
        "trie": Row((graft.Trie(),)),
        "lookup + recycle": Row(TABLES),
        "lookup + recycle + trie": Row((*TABLES, graft.Trie())),
        "hydra heads": Row((HYDRA,)),
        "hydra heads + lookup + recycle": Row((HYDRA, *TABLES)),
        "skipped layers": Row((SKIPPING,)),
        "skipped layers, always 4": Row((SKIPPING,), ALWAYS),
        "layers in parallel": Row((GROUPED,)),
        "layers in parallel, always 4": Row((GROUPED,), ALWAYS),
    },
    (EXITS,): {
        "layer-skip": Row((graft.LayerSkip(26),)),
        "layer-skip, always 4": Row((graft.LayerSkip(26),), ALWAYS),
        "del": Row((EXITS,)),
    },
}
"""The drafters that a program is compiled for, and what runs on it."""
PEER = "llama.cpp"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_prompt_options(parser)
    names = [name for rows in COMPILED.values() for name in rows] + [PEER]
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=1, help="turns of every system with every prompt")
    parser.add_argument("--only", choices=names, nargs="*", default=names, help="these, and plain decoding")
    parser.add_argument("--save", default="drafters", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    console = wide_console()
    prompts = load_prompts(arguments.prompts, arguments.per_category)
    runs, plans = measure(prompts, arguments, console)
    results = {name: summary(prompts, runs, name) | {"notes": plans[name]} for name in runs}
    console.print(table(results))
    settings = {name: getattr(arguments, name) for name in ("tokens", "dtype", "rounds")}
    peers = {"peers": {"llama-cpp-python": version("llama-cpp-python")}}
    record = {**settings, "prompt_count": len(prompts), **peers, "results": results}
    path = save(arguments.save, record, arguments.prompts)
    console.print(f"kept in benchmarks/results/{path.name}")
    wrong = [name for name, result in results.items() if differs(name, result)]
    if wrong:
        console.print(f"[bold red]WRONG: other token ids than plain decoding's: {', '.join(wrong)}[/]")
        sys.exit(1)


def measure(
    prompts: Sequence[Prompt], arguments: argparse.Namespace, console: Console
) -> tuple[Runs, dict[str, dict[str, object]]]:
    """All runs, and what the systems have to say of themselves."""
    console.print(f"loading SmolLM2-135M-Instruct in {arguments.dtype}, {torch.get_num_threads()} threads")
    model, tokenizer = load(getattr(torch, arguments.dtype))
    model.generation_config.eos_token_id = None
    texts = [token_ids(tokenizer, prompt) for prompt in prompts]
    systems = dict(compiled(model, {"plain", *arguments.only}, console))
    if PEER in arguments.only:
        systems |= make([PEER], model, max(map(len, texts)) + arguments.tokens, console.print)
    console.print("warming up")
    for system in systems.values():
        system.warm_up(texts, arguments.tokens)
    runs: Runs = {name: [[] for _ in prompts] for name in systems}
    with Progress(console=console) as progress:
        task = progress.add_task("prompts", total=arguments.rounds * len(texts))
        for number in range(arguments.rounds):
            for place, ids in enumerate(texts):
                for name in order(list(systems), number, place):
                    runs[name][place].append(turn(systems[name], ids, arguments.tokens))
                progress.advance(task)
    return runs, {name: system.notes for name, system in systems.items()}


def compiled(model: PreTrainedModel, names: set[str], console: Console) -> Iterator[tuple[str, System]]:
    """The systems of these names, each with a generator of its own on a program that it shares."""
    for drafters, rows in COMPILED.items():
        if not names & rows.keys():
            continue
        console.print(f"compiling for {', '.join(rows)}")
        whole = graft.compile(model, graft.Plan(draft=drafters))
        for name in [name for name in rows if name in names]:
            row, program = rows[name], whole.program
            if not row.draft:
                program = Program(dict(program.functions))
                program.host = plain_host()
            plan = graft.Plan(draft=row.draft, controller=row.controller)
            yield name, Graft(assembled(program, plan, whole.decoder, whole.generator.face))


def summary(prompts: Sequence[Prompt], runs: Runs, name: str) -> dict[str, object]:
    """Figures of one system. The first token, which the prefill makes, counts nowhere."""
    rounds = runs[name]
    groups = {"all": rounds}
    for prompt, turns in zip(prompts, rounds, strict=True):
        groups.setdefault(prompt.category, []).append(turns)
    speed = {key: rate(group, new_tokens, "decode") for key, group in groups.items()}
    steps = sum(turn.steps for turns in rounds for turn in turns)
    drafted, drafting, verifying = (
        sum(getattr(turn, what) for turns in rounds for turn in turns) / steps
        for what in ("drafted", "drafting", "verifying")
    )
    others = {other: rate(runs[other], new_tokens, "decode") for other in ("plain", PEER) if other in runs}
    return {
        "tokens_per_step": {key: rate(group, new_tokens, "steps") for key, group in groups.items()},
        "rows_per_step": round(1 + drafted, 2),
        "draft_ms_per_step": round(1e3 * drafting, 3),
        "verify_ms_per_step": round(1e3 * verifying, 3),
        "tokens_per_second": speed,
        "ratio_to": {other: round(speed["all"] / value, 3) for other, value in others.items()},
        "prompts_with_the_same_ids_as_plain": same(rounds, runs["plain"]),
    }


def table(results: dict[str, dict]) -> Table:
    """A line for each system."""
    found = Table(title="greedy decoding by drafter; tokens per step count the model's own")
    keys = ("rows_per_step", "draft_ms_per_step", "verify_ms_per_step")
    others = list(next(iter(results.values()))["ratio_to"])
    columns = ["tokens/step", "rows/step", "draft ms", "verify ms", "tokens/s", *(f"of {one}" for one in others)]
    for heading in ("drafter", *columns, "same ids as plain"):
        found.add_column(heading, justify="left" if heading == "drafter" else "right")
    for name, result in results.items():
        figures = [f"{result['tokens_per_step']['all']:.2f}", *(f"{result[key]:.2f}" for key in keys)]
        figures += [f"{result['tokens_per_second']['all']:.1f}", *(f"{result['ratio_to'][one]:.2f}" for one in others)]
        same_ids = result["prompts_with_the_same_ids_as_plain"]
        found.add_row(name, *figures, f"[bold red]{same_ids}[/]" if differs(name, result) else same_ids)
    return found


def differs(name: str, result: dict) -> bool:
    """Whether a drafter changed the output, which none may; llama.cpp's arithmetic is its own."""
    equal, _, prompts = result["prompts_with_the_same_ids_as_plain"].split()
    return name != PEER and equal != prompts


if __name__ == "__main__":
    main()
