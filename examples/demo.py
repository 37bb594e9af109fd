"""Compile SmolLM2-135M, answer a prompt with it, and compare with transformers' own generate().

Both sides run in this process, in the same dtype, greedily, on the same prompt, streaming to the same terminal, each
after a warm-up on another prompt; one clock times both. Exits with 1 when the token ids differ, unless they part where
transformers' own two best logits tie to within the dtype's precision.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

import graft
from smollm2 import load

PROMPT = (
    "Write a Python class Stack with the methods push, pop, peek and is_empty, "
    "then show how to use each of them and explain what every line does."
)
WARM_UP = "Name three rivers."

# How far apart two logits may lie and still count as a tie: a few roundings of a logit near 20.
NEAR_TIE = {torch.float32: 2e-4, torch.bfloat16: 0.5}


class Clock(TextStreamer):
    """Prints the text as it comes, and notes when: the first put is the prompt, the second ends the prefill."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.arrivals: list[tuple[float, int]] = []

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        self.arrivals.append((time.perf_counter(), value.numel()))


@dataclass(frozen=True)
class Run:
    ids: list[int]
    prefill: float
    """Seconds from the call to the first new token."""
    decode: float
    """Seconds from the first new token to the return."""
    decoded: int
    """Tokens that came after the first arrival."""

    @property
    def decode_rate(self) -> float:
        return self.decoded / self.decode


def chat(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, torch.Tensor]:
    messages = [{"role": "user", "content": text}]
    return dict(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    )


def timed(
    generate: Callable[..., torch.Tensor], tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int
) -> Run:
    inputs = chat(tokenizer, prompt)
    prompt_length = inputs["input_ids"].shape[1]
    clock = Clock(tokenizer)
    start = time.perf_counter()
    ids = generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock)
    end = time.perf_counter()
    new = ids[0, prompt_length:].tolist()
    first, count = clock.arrivals[1]
    return Run(new, first - start, end - first, len(new) - count)


def tie_gap(model: PreTrainedModel, prompt_ids: torch.Tensor, ours: list[int], theirs: list[int]) -> tuple[int, float]:
    """Return where the ids part, and how far apart transformers' logits of the two tokens are there."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if at == min(len(ours), len(theirs)):
        return at, float("inf")
    with torch.no_grad():
        ids = torch.cat([prompt_ids, torch.tensor([theirs[:at]], dtype=prompt_ids.dtype)], dim=1)
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    return at, abs(float(logits[ours[at]] - logits[theirs[at]]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    console = Console(highlight=False)
    logging.disable_progress_bar()

    console.print(f"[bold]1. Loading SmolLM2-135M-Instruct in {arguments.dtype}[/bold]")
    start = time.perf_counter()
    model, tokenizer = load(dtype)
    console.print(f"   {time.perf_counter() - start:.1f} s")

    console.print("[bold]2. Compiling it, with prompt lookup and token recycling as drafters[/bold]")
    start = time.perf_counter()
    fast = graft.compile(model, graft.Plan(draft=[graft.Lookup(), graft.Recycle()]))
    console.print(f"   {time.perf_counter() - start:.1f} s")

    console.print("[bold]3. Warming both up[/bold]")
    for generate in (fast.generate, model.generate):
        generate(**chat(tokenizer, WARM_UP), max_new_tokens=16, do_sample=False)

    console.print("[bold]4. The prompt[/bold]")
    console.print(arguments.prompt, markup=False)
    console.print("[bold]5. The answer of graft[/bold]")
    ours = timed(fast.generate, tokenizer, arguments.prompt, arguments.max_new_tokens)
    stats = fast.stats
    console.print("[bold]6. The answer of transformers[/bold]")
    theirs = timed(model.generate, tokenizer, arguments.prompt, arguments.max_new_tokens)

    console.print("[bold]7. graft's report[/bold]")
    print(fast.report())

    table = Table(title=f"SmolLM2-135M, {arguments.dtype}, greedy, {torch.get_num_threads()} threads, one run of each")
    for heading in ("", "tokens", "prefill s", "decode s", "decode tok/s", "total tok/s"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, run in (("transformers", theirs), ("graft", ours)):
        rates = (f"{run.decode_rate:.1f}", f"{len(run.ids) / (run.prefill + run.decode):.1f}")
        table.add_row(name, str(len(run.ids)), f"{run.prefill:.3f}", f"{run.decode:.3f}", *rates)
    console.print(table)
    console.print(
        "prefill: from the call to the first token; decode: from there to the return; the same clock for both"
    )
    if theirs.decoded and ours.decoded:
        console.print(f"decode speed: {ours.decode_rate / theirs.decode_rate:.2f} times transformers'")
    console.print(f"accepted tokens per step, the model's own included: {stats['tokens_per_step']:.2f}")

    if ours.ids == theirs.ids:
        console.print(f"token ids: the same, all {len(ours.ids)}")
        return 0
    at, gap = tie_gap(model, chat(tokenizer, arguments.prompt)["input_ids"], ours.ids, theirs.ids)
    near = gap <= NEAR_TIE[dtype]
    console.print(
        f"token ids: differ from new token {at} on; there transformers' logits of the two tokens are {gap:.2g} apart, "
        + (f"a near tie in {arguments.dtype}" if near else "[bold red]which no rounding explains[/bold red]")
    )
    return 0 if near else 1


if __name__ == "__main__":
    sys.exit(main())
