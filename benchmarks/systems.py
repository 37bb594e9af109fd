"""The systems that benchmarks put side by side, each behind the same face: token ids in, greedy ids and times out.

They run the same weights in the same dtype with the same number of threads, one sequence, and never stop at an end of
text. "Prefill" is everything until the first new token is known, "decode" everything from then on, as the system is
called from Python: graft tells a streamer of the first token, transformers a stopping criterion, llama.cpp is stepped
by a loop of its own (benchmarks.llama).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, StaticCache, StoppingCriteria

import graft
from benchmarks import llama
from benchmarks.llama import PeerError
from benchmarks.record import HERE
from graft.codegen.cpp.build import compiler

PAUSE = 0.05
"""Seconds before a run: threads of the system before spin for a while after their last work."""


@dataclass(frozen=True)
class Timed:
    """One text: the prompt's length, the new tokens, seconds until the first of them and from then on, and how often
    the target was run after the prompt. Of graft also rows drafted, and seconds of drafting and of the target's runs.
    """

    prompt: int
    ids: list[int]
    prefill: float
    decode: float
    steps: int
    drafted: int = 0
    drafting: float = 0.0
    verifying: float = 0.0


class System(Protocol):
    """What a benchmark times."""

    notes: dict[str, object]
    """Settings that were chosen here, and what else a reader of the record should know."""

    def run(self, ids: list[int], new_tokens: int) -> Timed:
        """Generate so many tokens."""

    def warm_up(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        """Do whatever is done once only: compile, calibrate, allocate."""


class Graft:
    """A compiled model of graft. Measuring step times for the controller, done once for each model, is not counted."""

    def __init__(self, fast: graft.CompiledModel) -> None:
        self.fast = fast
        # Folders in the checkout are named as seen from there.
        self.notes: dict[str, object] = {"plan": fast.plan.to_toml().replace(f"{HERE.parent}/", "")}

    def run(self, ids: list[int], new_tokens: int) -> Timed:
        first, text = FirstToken(), torch.tensor([ids])
        mask = torch.ones_like(text)
        start = time.perf_counter()
        found = self.fast.generate(
            text, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, streamer=first
        )
        end, stats = time.perf_counter(), self.fast.stats
        decode = end - first.seen[1] - stats["calibration_seconds"]
        phases = (stats["drafted"], stats["draft_seconds"], stats["model_seconds"])
        return Timed(len(ids), new_ids(found, ids, new_tokens), first.seen[1] - start, decode, stats["steps"], *phases)

    def warm_up(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        self.run(min(prompts, key=len), new_tokens)


class FirstToken:
    """A streamer that notes when it is told of the prompt and of every token."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        pass


class Transformers:
    """transformers' generate(), uncompiled, with further options."""

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        self.model, self.options = model, options
        self.notes: dict[str, object] = {"options": {name: str(value) for name, value in options.items()}}

    def run(self, ids: list[int], new_tokens: int) -> Timed:
        text, steps = torch.tensor([ids]), StepEnds()
        options = {**self.options, **self.cache(len(ids) + new_tokens)}
        start = time.perf_counter()
        found = self.model.generate(
            text,
            attention_mask=torch.ones_like(text),
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=[steps],
            **options,
        )
        end, first = time.perf_counter(), steps.seen[0]
        return Timed(len(ids), new_ids(found, ids, new_tokens), first - start, end - first, len(steps.seen) - 1)

    def cache(self, length: int) -> dict[str, Any]:
        """Options for a text of so many tokens."""
        return {}

    def warm_up(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        self.run(min(prompts, key=len), new_tokens)


class StepEnds(StoppingCriteria):
    """Stops nothing and notes when it is asked, which is once for each run of the model."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **arguments: Any) -> Tensor:
        self.seen.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Compiled(Transformers):
    """transformers with a static cache and torch.compile.

    transformers compiles on the CPU only when told so by a field of CompileConfig that begins with an underscore. The
    cache has the next power of two of the text's length, because attention runs over all of it; every size is compiled
    for itself while warming up, with static shapes, which run faster than dynamic ones. Prompts run uncompiled, as in
    transformers by default.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # "reduce-overhead", the default, means CUDA graphs.
        config = CompileConfig(mode="default", dynamic=False)
        config._compile_all_devices = True
        super().__init__(model, compile_config=config)
        self.sizes: set[int] = set()

    def cache(self, length: int) -> dict[str, Any]:
        return {"past_key_values": StaticCache(config=self.model.config, max_cache_len=static_size(length))}

    def warm_up(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        start = time.perf_counter()
        by_size = {static_size(len(ids) + new_tokens): ids for ids in prompts}
        for ids in by_size.values():
            # The second step of a new cache is the first with the strides that all later ones have.
            for _ in range(2):
                self.run(ids, min(new_tokens, 4))
        self.notes |= {"cache_sizes": sorted(by_size), "compile_seconds": round(time.perf_counter() - start, 1)}


def static_size(length: int) -> int:
    """Tokens of a static cache for a text of so many tokens."""
    return max(256, 1 << (length - 1).bit_length())


class LlamaCpp:
    """llama.cpp, with or without flash attention, whichever decodes faster, or has run a prompt sooner."""

    def __init__(self, model: PreTrainedModel, context: int, by_prefill: bool = False) -> None:
        self.llama, flash = llama.faster(model, torch.get_num_threads(), context, by_prefill)
        system = self.llama.api.llama_print_system_info().decode().strip(" |\n")
        self.notes: dict[str, object] = {"flash_attention": flash, "system_info": system}

    def run(self, ids: list[int], new_tokens: int) -> Timed:
        new, prefill, decode = self.llama.generate(ids, new_tokens)
        return Timed(len(ids), new, prefill, decode, new_tokens - 1)

    def warm_up(self, prompts: Sequence[list[int]], new_tokens: int) -> None:
        self.run(min(prompts, key=len), new_tokens)


def new_ids(found: Tensor, ids: list[int], new_tokens: int) -> list[int]:
    """The new part of what generate() returned. Raises PeerError if its length is not what was asked for."""
    new: list[int] = found[0, len(ids) :].tolist()
    if len(new) != new_tokens:
        raise PeerError("a text ended early", expected=f"{new_tokens} tokens", found=len(new))
    return new


def speculative() -> graft.Plan:
    """The plan of "graft speculative": text lookup and token recycling, as many nodes as pay on this machine. When it
    is compiled, the model is asked about a third of its tokens alone and writes text by itself, about a minute that no
    figure contains; `save` keeps what it said."""
    return graft.Plan(draft=[graft.Lookup(), graft.Recycle(k=4, seed_vocabulary=16384, seed_text=49152)])


MAKERS: dict[str, Callable[[PreTrainedModel, int], System]] = {
    "graft": lambda model, context: Graft(graft.compile(model)),
    "graft speculative": lambda model, context: Graft(graft.compile(model, speculative())),
    "transformers": lambda model, context: Transformers(model),
    "transformers prompt lookup": lambda model, context: Transformers(model, prompt_lookup_num_tokens=10),
    "transformers compiled": lambda model, context: Compiled(model),
    "llama.cpp": LlamaCpp,
}
"""By name: from a model and the length of the longest text to a system."""


def make(
    names: Sequence[str], model: PreTrainedModel, context: int, say: Callable[[str], None]
) -> Iterator[tuple[str, System]]:
    """The systems of these names that can be had here; for the others `say` is told why not."""
    for name in names:
        if name == "transformers compiled" and compiler() is None:
            say(f"{name} is left out: torch.compile needs a C++ compiler")
            continue
        try:
            yield name, MAKERS[name](model, context)
        except ImportError:
            say(f"{name} is left out: llama-cpp-python is not installed (pip install -e '.[bench-peers]')")


def turn(system: System, ids: list[int], new_tokens: int) -> Timed:
    """One timed run, after a pause in which the threads of the system before go to sleep."""
    time.sleep(PAUSE)
    return system.run(ids, new_tokens)


def wide_console() -> Console:
    """A console that does not squeeze tables where its output goes to a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=140)
