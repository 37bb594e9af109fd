"""What compile() returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.codegen.executable import Executable
from graft.compiler.acceptance import is_lossy
from graft.compiler.passing import spec_name
from graft.compiler.plan import Plan
from graft.compiler.program import Program
from graft.report import render_report
from graft.runtime.decoder import Decoder
from graft.runtime.generate import Generator

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    from graft.quality.losses import Losses


def lossy_note(plan: Plan) -> str:
    """A line that says so where the plan's acceptance rule changes the output, else nothing."""
    if plan.verifier is None or not is_lossy(plan.verifier):
        return ""
    return f"LOSSY: verifier {spec_name(type(plan.verifier).__name__)} does not keep the target's distribution\n"


class CompiledModel:
    """A compiled model: generate(), and everything there is to look at."""

    def __init__(self, program: Program, plan: Plan, generator: Generator) -> None:
        self.program, self.plan, self.generator = program, plan, generator
        self.released_bytes = 0
        """Bytes of the model's own parameters that were given up for packed ones."""

    def generate(self, inputs: Tensor | None = None, **arguments: Any) -> Tensor | GenerateDecoderOnlyOutput:
        """As transformers' generate(): input_ids int64 [batch, length] and attention_mask, a GenerationConfig, its
        options as keywords, logits processors, stopping criteria, a streamer; and `seed`, an int or one for each
        sequence. Returns int64 [batch, length + new tokens], or a GenerateDecoderOnlyOutput.

        Raises GenerationError, naming the option, for what is not supported (docs/limits.md).
        """
        for one in self.executables:
            one.forget_skips()
        return self.generator.generate(inputs, **arguments)

    @property
    def decoder(self) -> Decoder:
        """The target with its KV cache; what `DraftModel` drafts with."""
        return self.generator.decoder

    @property
    def executables(self) -> list[Executable]:
        """What runs each function of the program, the target's first."""
        return [self.decoder.executable, *(one.executable for one in self.decoder.functions.values())]

    @property
    def stats(self) -> Mapping[str, Any]:
        """Figures of the last generate(): tokens, steps, tokens per step, seconds by phase."""
        return self.generator.stats

    def report(self, losses: Losses | None = None) -> str:
        """Every pass with its contract, matches, cost and check, the kernels, memory, and the figures of the last
        generate(). With `losses` (graft.quality), what the compression of the KV cache is expected to cost, and what it
        was measured to, if it was.

        Raises PlanError for losses of another model, and where the target has no compression, or other passes than
        they were measured with.
        """
        decoders = [self.decoder, *self.decoder.functions.values()]
        # What several functions multiply with is packed once.
        packed = {id(one): one.nbytes for executable in self.executables for one in executable.panels.values()}
        memory = dict(self.decoder.executable.memory)
        for one in self.executables[1:]:
            memory = {name: size + one.memory.get(name, 0) for name, size in memory.items()}
        memory |= {"packed weights": sum(packed.values())} if packed else {}
        held = Counter[str]()
        for decoder in decoders:
            held.update(decoder.store.bytes)
        memory |= {f"KV cache, {kind}" if kind != "dense" else "KV cache": size for kind, size in held.items()}
        memory |= {"parameters released": self.released_bytes}
        return lossy_note(self.plan) + render_report(
            self.program.records,
            self.stats,
            function=self.program["forward"],
            drafting=[one.function for one in self.decoder.functions.values()],
            skips={one.function.name: one.skips for one in self.executables},
            invariant=self.decoder.executable.invariant,
            memory=memory,
            estimate=None if losses is None else losses.estimate(self.plan, self.generator.face.config),
        )

    def save(self, folder: str | Path) -> None:
        """Write everything that generate() needs to a folder, packed weights included, for `graft.load`: JSON and
        safetensors. The folder appears whole or not at all; one that was saved before is replaced.

        Raises SaveError where the folder holds anything else, and for a program that cannot be written down; PlanError
        for a plan that holds an object of this process, such as the compiled model of `DraftModel`.
        """
        from graft.saving import save

        save(self, folder)

    def __repr__(self) -> str:
        drafters = ", ".join(spec_name(type(drafter).__name__) for drafter in self.plan.draft)
        return f"CompiledModel({self.program.node_count} nodes, drafted by {drafters or 'nothing'})"
