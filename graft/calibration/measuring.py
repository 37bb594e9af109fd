"""What calibrations measure with: a model's function over some texts, changed copies of it, predicted times."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx

from graft.codegen.executable import Executable
from graft.codegen.lowering import lower
from graft.compiler.capture import capture, check_model
from graft.compiler.errors import LoweringError, PlanError
from graft.compiler.evaluate import Sequences, logits_of
from graft.compiler.passing import Pass, View
from graft.compiler.pipeline import run_passes
from graft.compiler.program import DENSE, Function, Program, StepSeconds
from graft.passes.canonicalise import Canonicalise
from graft.passes.common_subexpression import CommonSubexpression
from graft.passes.dead_code import DeadCode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str], None]


def tidy(model: PreTrainedModel) -> Function:
    """The model's function without a cache, in canonical form."""
    check_model(model)
    captured = capture(model)
    program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
    run_passes(program, (Canonicalise(), DeadCode(), CommonSubexpression()), sample=[[0, 1]])
    return program["forward"]


def given(texts: Iterable[Sequence[int]]) -> Sequences:
    """The texts as token ids."""
    sequences = tuple(tuple(map(int, text)) for text in texts)
    if not sequences or not all(sequences):
        raise PlanError("a calibration needs texts", expected="token ids of one text or several", found=sequences)
    return sequences


def changed(function: Function, changes: Sequence[Pass]) -> Function:
    """A copy of the function behind some passes."""
    program = Program({"forward": function.copy()})
    for one in changes:
        run_on(program, one)
    return program["forward"]


def run_on(program: Program, one: Pass) -> None:
    """Run a pass, in place."""
    one.run(View(program, one.pass_name()))


def predicted(
    function: Function, panels: dict[str, Tensor], keep: dict[str, Executable] | None = None
) -> StepSeconds:
    """How long calls of the function take here; `panels` are parameters packed so far, to which its own are added, and
    `keep` is where to put what runs it."""
    executable = lower(function, "auto", panels)
    panels |= executable.panels
    if keep is not None:
        keep[function.name] = executable
    if executable.prediction is None:
        raise LoweringError(
            "the time of a step cannot be predicted",
            expected="a function that generated C++ runs without ATen",
            found=f"backend {executable.backend}",
            where=f"function {function.name}",
        )
    return executable.prediction


def shown(function: Function, nodes: Sequence[fx.Node], sequences: Sequences) -> tuple[list[Tensor], list[Tensor]]:
    """The function's logits, and the values of some of its nodes [batch, length, ...] at the tokens of the texts, as
    [tokens, ...] for each. The function is changed."""
    output = function.output
    output.args = ((*output.args[0], *nodes),)
    module, held = fx.GraphModule(function.weights, function.graph), list[Tensor]()

    def run(tokens: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = module(tokens, positions)
        held.extend(results[-len(nodes) :])
        return results

    logits = logits_of(function, sequences, run)
    lengths = [len(tokens) for tokens in sequences]
    return logits, [torch.cat([one[row, :length] for row, length in enumerate(lengths)]).cpu() for one in held]


def next_token_loss(logits: Sequence[Tensor], sequences: Sequences) -> float:
    """Mean negative log-likelihood, in nats, of every token but the first of each text, from logits [length,
    vocabulary]; its exponential is the perplexity."""
    losses = [
        torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(tokens[1:], device=rows.device), reduction="none")
        for rows, tokens in zip(logits, sequences, strict=True)
    ]
    return torch.cat(losses).double().mean().item()


def table_text(table: Table) -> str:
    """A table as plain text without empty lines."""
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
