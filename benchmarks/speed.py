"""Tokens per second side by side: graft, transformers and llama.cpp on SmolLM2-135M-Instruct, batch 1, greedy.

For every prompt the systems take turns, in one order and its reverse round by round, each generating the same number of
tokens from the same token ids, whatever ends the text. Decode time counts from the first new token on; prefill is
reported apart. A prompt's figure is the median over rounds. "All" and the categories are total tokens by total seconds;
the spread is over prompts. See benchmarks/systems.py for how each system is set up.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from statistics import median, quantiles

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from benchmarks.record import Prompt, add_prompt_options, load_prompts, save, version
from benchmarks.systems import MAKERS, System, Timed, make, turn, wide_console
from examples.smollm2 import load

DTYPES = ("bfloat16", "float32")
REFERENCES = ("graft", "transformers")
"""Systems whose token ids the others' are compared with."""
Runs = dict[str, list[list[Timed]]]
"""By system, one list of rounds for each prompt."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_prompt_options(parser)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=list(DTYPES))
    parser.add_argument("--systems", type=systems_of, default=list(MAKERS), help=f"of: {','.join(MAKERS)}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every system with every prompt")
    parser.add_argument("--save", default="speed", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    console = wide_console()
    prompts = load_prompts(arguments.prompts, arguments.per_category)
    results = {}
    for dtype in arguments.dtype:
        console.print(f"loading and compiling SmolLM2-135M-Instruct in {dtype}, {torch.get_num_threads()} threads")
        runs, notes = measure(dtype, prompts, arguments, console)
        results[dtype] = {name: summary(prompts, runs, name) | notes[name] for name in runs}
        for table in tables(dtype, results[dtype]):
            console.print(table)
    settings = {"new_tokens": arguments.new_tokens, "rounds": arguments.rounds, "prompt_count": len(prompts)}
    peers = {"peers": {"llama-cpp-python": version("llama-cpp-python")}}
    path = save(arguments.save, {**settings, **peers, "results": results}, arguments.prompts)
    console.print(f"kept in benchmarks/results/{path.name}")


def systems_of(text: str) -> list[str]:
    """Names separated by commas."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in MAKERS]:
        raise argparse.ArgumentTypeError(f"no system {', '.join(unknown)}; there are {', '.join(MAKERS)}")
    return names


def measure(
    dtype: str, prompts: Sequence[Prompt], arguments: argparse.Namespace, console: Console
) -> tuple[Runs, dict[str, dict[str, object]]]:
    """All runs in one dtype, and what the systems have to say of themselves."""
    model, tokenizer = load(getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    texts = [token_ids(tokenizer, prompt) for prompt in prompts]
    context = max(map(len, texts)) + arguments.new_tokens
    systems: dict[str, System] = {}
    for name, system in make(arguments.systems, model, context, console.print):
        console.print(f"warming up {name}")
        system.warm_up(texts, arguments.new_tokens)
        systems[name] = system
    runs: Runs = {name: [[] for _ in prompts] for name in systems}
    with Progress(console=console) as progress:
        task = progress.add_task(f"{dtype}", total=arguments.rounds * len(texts))
        for number in range(arguments.rounds):
            for place, ids in enumerate(texts):
                for name in order(list(systems), number, place):
                    runs[name][place].append(turn(systems[name], ids, arguments.new_tokens))
                progress.advance(task)
    return runs, {name: {"notes": system.notes} for name, system in systems.items()}


def order(names: list[str], number: int, place: int) -> list[str]:
    """Each prompt begins with another system, and every second round runs backwards, so that no system is always the
    first or always after the same one."""
    start = place % len(names)
    turned = names[start:] + names[:start]
    return turned[::-1] if number % 2 else turned


def token_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The prompt in the model's chat format."""
    chat = [{"role": "user", "content": prompt.text}]
    ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def summary(prompts: Sequence[Prompt], runs: Runs, name: str) -> dict[str, object]:
    """Figures of one system. Tokens per second and per step leave out the first token, which the prefill makes."""
    groups: dict[str, list[list[Timed]]] = {}
    for prompt, rounds in zip(prompts, runs[name], strict=True):
        groups.setdefault(prompt.category, []).append(rounds)
    everything = groups["all"] = runs[name]
    made = sum(new_tokens(rounds) for rounds in everything)
    by_round = [made / sum(run.decode for run in turns) for turns in zip(*everything, strict=True)]
    return {
        "tokens_per_second": {key: rate(group, new_tokens, "decode") for key, group in groups.items()},
        "spread_over_prompts": {key: spread(rates(group)) for key, group in groups.items()},
        "tokens_per_second_by_round": [round(value, 2) for value in by_round],
        "prefill_tokens_per_second": {key: rate(group, prompt_tokens, "prefill") for key, group in groups.items()},
        "tokens_per_step": {key: rate(group, new_tokens, "steps") for key, group in groups.items()},
        "prompts_with_the_same_ids_as": {o: same(everything, runs[o]) for o in REFERENCES if o in runs},
        "tokens_per_second_by_prompt": [round(value, 2) for value in rates(everything)],
    }


def new_tokens(rounds: list[Timed]) -> int:
    """New tokens of a prompt that decoding made."""
    return len(rounds[0].ids) - 1


def prompt_tokens(rounds: list[Timed]) -> int:
    """Tokens of a prompt."""
    return rounds[0].prompt


def middle(rounds: list[Timed], what: str) -> float:
    """A prompt's median over rounds."""
    return float(median(getattr(run, what) for run in rounds))


def rate(group: list[list[Timed]], tokens: Callable[[list[Timed]], int], by: str) -> float:
    """Total tokens by total seconds, or steps, of some prompts."""
    return round(sum(map(tokens, group)) / sum(middle(rounds, by) for rounds in group), 3)


def rates(group: list[list[Timed]]) -> list[float]:
    """Decoded tokens per second of each prompt."""
    return [new_tokens(rounds) / middle(rounds, "decode") for rounds in group]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, quartiles and greatest."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    found = {"least": min(values), "low": low, "median": middle, "high": high, "greatest": max(values)}
    return {key: round(value, 2) for key, value in found.items()}


def same(one: list[list[Timed]], other: list[list[Timed]]) -> str:
    """On how many prompts two systems made the same tokens in all rounds."""
    count = sum(len({tuple(run.ids) for run in (*a, *b)}) == 1 for a, b in zip(one, other, strict=True))
    return f"{count} of {len(one)}"


def tables(dtype: str, results: dict[str, dict]) -> list[Table]:
    """One by category, one with the rest."""
    categories = list(next(iter(results.values()))["tokens_per_second"])
    speeds = Table(title=f"decoded tokens per second, {dtype}")
    rest = Table(title=f"spread over prompts, prefill, acceptance and token ids, {dtype}")
    others = list(next(iter(results.values()))["prompts_with_the_same_ids_as"])
    headings = ["median", "quartiles", "prefill tokens/s", "tokens per step", *(f"same ids as {o}" for o in others)]
    for table, columns in ((speeds, categories), (rest, headings)):
        table.add_column("system")
        for column in columns:
            table.add_column(column, justify="right")
    for name, result in results.items():
        speeds.add_row(name, *(f"{result['tokens_per_second'][category]:.1f}" for category in categories))
        over = result["spread_over_prompts"]["all"]
        figures = [f"{over['median']:.1f}", f"{over['low']:.1f} to {over['high']:.1f}"]
        figures += [f"{result['prefill_tokens_per_second']['all']:.0f}", f"{result['tokens_per_step']['all']:.2f}"]
        rest.add_row(name, *figures, *(result["prompts_with_the_same_ids_as"][other] for other in others))
    return [speeds, rest]


if __name__ == "__main__":
    main()
