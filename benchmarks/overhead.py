"""graft's own time per step at 16 nodes: drafting, tree building, acceptance, commit, bookkeeping.

The model, its argmax and its top-k are not in it, and neither are the functions that draft, such as heads.

Real text of SmolLM2-135M-Instruct, greedy, one sequence, every step with a full tree. The spread is over prompts.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

import graft
from benchmarks.accept import DRAFTERS
from benchmarks.record import HERE, add_prompt_options, load_prompts, save
from examples.smollm2 import load

TABLED = ("lookup", "recycle", "trie", "lookup + recycle", "lookup + recycle + trie")
HEADS = graft.Heads(HERE.parent / "examples" / "hydra-smollm2")
CASES = {name: DRAFTERS[name] for name in TABLED}
CASES["hydra heads + lookup + recycle"] = [HEADS, *DRAFTERS["lookup + recycle"]]


class Timed:
    """The code of a function that drafts, with the seconds spent in it."""

    def __init__(self, executable: Any) -> None:
        self.executable, self.seconds = executable, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executable, name)

    def __call__(self, *inputs: Any) -> Any:
        return self.timed(self.executable, *inputs)

    def top(self, *arguments: Any) -> Any:
        return self.timed(self.executable.top, *arguments)

    def timed(self, work: Any, *arguments: Any) -> Any:
        start = time.perf_counter()
        try:
            return work(*arguments)
        finally:
            self.seconds += time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_prompt_options(parser)
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--save", default="overhead", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    console.print("loading and capturing SmolLM2-135M-Instruct")
    model, tokenizer = load()
    prompts = load_prompts(arguments.prompts, arguments.per_category)
    results = {}
    for name, drafters in CASES.items():
        policy = graft.BestFirst(floor=0.0)  # so that trees are as large as they may be
        tree = graft.Tree(nodes=arguments.nodes, policy=policy)
        fast = graft.compile(model, graft.Plan(draft=drafters, tree=tree, controller=graft.FixedBudget()))
        functions = []
        for decoder in fast.decoder.functions.values():
            functions.append(Timed(decoder.executable))
            decoder.executable = functions[-1]
        runs = []
        for prompt in prompts:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt.text}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
            for one in functions:
                one.seconds = 0.0
            fast.generate(**inputs, max_new_tokens=arguments.new_tokens, do_sample=False)
            stats = fast.stats
            if stats["steps"]:
                modelled = sum(one.seconds for one in functions)
                drafting, own, model_seconds = (stats[f"{phase}_seconds"] for phase in ("draft", "overhead", "model"))
                phases = (drafting - modelled, own, model_seconds + modelled)
                per_step = [1e3 * seconds / stats["steps"] for seconds in phases]
                runs.append((*per_step, stats["drafted"] / stats["steps"]))
        drafting, rest, model_ms, nodes = (list(column) for column in zip(*runs, strict=True))
        total = [a + b for a, b in zip(drafting, rest, strict=True)]
        results[name] = {
            "own_ms_per_step": round(median(total), 3),
            "own_ms_per_step_range": [round(min(total), 3), round(max(total), 3)],
            "drafting_ms_per_step": round(median(drafting), 3),
            "rest_ms_per_step": round(median(rest), 3),
            "nodes_per_step": round(median(nodes), 1),
            "model_ms_per_step": round(median(model_ms), 1),
        }
        console.print(f"{name}: {results[name]['own_ms_per_step']} ms")
    console.print(table(results))
    path = save(arguments.save, {"nodes": arguments.nodes, "results": results}, arguments.prompts)
    console.print(f"kept in benchmarks/results/{path.name}")


def table(results: dict[str, dict]) -> Table:
    """One line for each drafter."""
    found = Table(title="graft's own time per step, ms, median over prompts")
    for heading in ("drafter", "own", "of it drafting", "of it the rest", "nodes per step", "model"):
        found.add_column(heading, justify="left" if heading == "drafter" else "right")
    keys = ("own_ms_per_step", "drafting_ms_per_step", "rest_ms_per_step", "nodes_per_step", "model_ms_per_step")
    for name, result in results.items():
        found.add_row(name, *(str(result[key]) for key in keys))
    return found


if __name__ == "__main__":
    main()
