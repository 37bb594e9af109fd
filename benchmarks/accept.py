"""Tokens per verification step, by drafter and category of prompt: SmolLM2-135M-Instruct, greedy.

One verification is one run of the target over the root and the drafted tree of a sequence; plain decoding makes one
token of it. Sequences decode several at once, which changes nothing per sequence. Every drafter's token ids are
compared with plain decoding's, a difference is excused only where the two best logits tie to 1e-4.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from statistics import mean

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import graft
from benchmarks.record import HEADS, Prompt, add_prompt_options, load_prompts, save
from examples.smollm2 import load

DRAFTERS: dict[str, list[graft.Drafter]] = {
    "lookup": [graft.Lookup()],
    "recycle": [graft.Recycle()],
    "recycle, seeded": [graft.Recycle(seed_prompt=True)],
    "trie": [graft.Trie()],
    "lookup + recycle": [graft.Lookup(), graft.Recycle()],
    "lookup + recycle, seeded": [graft.Lookup(), graft.Recycle(seed_prompt=True)],
    "lookup + recycle + trie": [graft.Lookup(), graft.Recycle(), graft.Trie()],
    "hydra heads": [graft.Heads(HEADS)],
    "hydra heads + lookup + recycle": [graft.Heads(HEADS), graft.Lookup(), graft.Recycle()],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_prompt_options(parser)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=16, help="rows drafted per step, the root not counted")
    parser.add_argument("--batch", type=int, default=6, help="sequences decoded at once")
    parser.add_argument("--only", choices=list(DRAFTERS), nargs="*", default=list(DRAFTERS), help="these drafters")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--save", default="accept", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    console.print(f"loading and capturing SmolLM2-135M-Instruct in {arguments.dtype}")
    model, tokenizer = load(getattr(torch, arguments.dtype))
    prompts = load_prompts(arguments.prompts, arguments.per_category)
    prompts.sort(key=lambda prompt: len(prompt.text))
    results: dict[str, dict] = {}
    plain: list[list[int]] = []
    with Progress(console=console) as progress:
        for name, drafters in {"plain": [], **{name: DRAFTERS[name] for name in arguments.only}}.items():
            tree = graft.Tree(nodes=arguments.nodes)
            fast = graft.compile(model, graft.Plan(draft=drafters, tree=tree, controller=graft.FixedBudget()))
            task = progress.add_task(name, total=len(prompts))
            runs = []
            for start in range(0, len(prompts), arguments.batch):
                batch = prompts[start : start + arguments.batch]
                runs += run(fast, tokenizer, batch, arguments.new_tokens)
                progress.advance(task, len(batch))
            ids = [ids for ids, _, _ in runs]
            plain = plain or ids
            same = sum(a == b for a, b in zip(ids, plain, strict=True))
            results[name] = {**summary(prompts, runs), "prompts_with_the_same_ids_as_plain": f"{same} of {len(ids)}"}
            console.print(f"{name}: {results[name]['tokens_per_verification']['all']:.2f} tokens per verification")
    console.print(table(results))
    settings = {"new_tokens": arguments.new_tokens, "nodes": arguments.nodes, "dtype": arguments.dtype}
    path = save(arguments.save, {**settings, "prompt_count": len(prompts), "results": results}, arguments.prompts)
    console.print(f"kept in benchmarks/results/{path.name}")


def run(
    fast: graft.CompiledModel, tokenizer, prompts: list[Prompt], new_tokens: int
) -> list[tuple[list[int], int, int]]:
    """(new token ids, verification steps, nodes drafted) of each prompt."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p.text}], add_generation_prompt=True, tokenize=False)
        for p in prompts
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    width = inputs["input_ids"].shape[1]
    out = fast.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[:, width:].tolist()
    columns = (fast.stats[f"{name}_per_request"] for name in ("new_tokens", "steps", "drafted"))
    return [(ids[:count], steps, drafted) for ids, count, steps, drafted in zip(out, *columns, strict=True)]


def summary(prompts: list[Prompt], runs: list[tuple[list[int], int, int]]) -> dict[str, dict[str, float]]:
    """Tokens per verification and nodes per step: mean over prompts, by category and overall.

    The first token comes from the prefill, so it is not counted.
    """
    rates, nodes = defaultdict(list), defaultdict(list)
    for prompt, (ids, steps, drafted) in zip(prompts, runs, strict=True):
        for key in (prompt.category, "all"):
            if steps:
                rates[key].append((len(ids) - 1) / steps)
                nodes[key].append(drafted / steps)
    return {
        "tokens_per_verification": {key: round(mean(values), 3) for key, values in rates.items()},
        "nodes_per_step": {key: round(mean(values), 2) for key, values in nodes.items()},
    }


def table(results: dict[str, dict]) -> Table:
    """Drafters down, categories across."""
    categories = list(results["plain"]["tokens_per_verification"])
    found = Table(title="tokens per verification, mean over prompts")
    for heading in ("drafter", *categories, "nodes per step", "same ids as plain"):
        found.add_column(heading, justify="left" if heading == "drafter" else "right")
    for name, result in results.items():
        rates = [f"{result['tokens_per_verification'].get(category, float('nan')):.2f}" for category in categories]
        same = result["prompts_with_the_same_ids_as_plain"]
        found.add_row(name, *rates, f"{result['nodes_per_step']['all']:.1f}", same)
    return found


if __name__ == "__main__":
    main()
