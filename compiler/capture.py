"""From an unchanged Hugging Face causal LM to one torch.fx graph without a cache.

The captured function takes tokens and positions, int64 [batch, length], and returns logits [batch, length,
vocabulary] and the final hidden states [batch, length, width] that the unembedding reads. Attention goes through
transformers' AttentionInterface into one operator, `graft::attention` (compiler/interface.py). What cannot be captured
whole is refused: before tracing where that is plain to see, while tracing where the model does what the interface does
not cover, and after it where the graph is narrower than the model (a fixed size, a condition on the length, shapes
that depend on data) or does not compute what the model does.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from graft.compiler.decompositions import functional, is_simple
from graft.compiler.errors import CaptureError
from graft.compiler.interface import INTERFACE, NotAlike, register
from graft.compiler.nodes import Origin
from graft.compiler.refusals import check_agreement, check_exported, check_model, located
from graft.compiler.repeats import Repeats, find_kinds
from graft.compiler.rope import per_token_rope

MODEL = "model"
"""Name of the model inside the module that is exported; what export's names start with."""


@dataclass
class Captured:
    """A captured model: the graph, and the module that holds the parameters its get_attr nodes name."""

    graph: fx.Graph
    weights: nn.Module


def capture(model: PreTrainedModel) -> Captured:
    """Capture `model` (eval mode, weights loaded, any floating dtype). The model is left as it was.

    Raises CaptureError naming the reason and the module where the model cannot be captured whole.
    """
    check_model(model)
    repeats = Repeats(model, find_kinds(model))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if repeats.kinds:
            # Whatever goes wrong here, the whole model's trace says what it is.
            with contextlib.suppress(Exception):
                return traced(model, repeats)
        return traced(model, Repeats(model, []))


def traced(model: PreTrainedModel, repeats: Repeats) -> Captured:
    """Capture the model, each kind of layers once. Raises CaptureError, also where layers turn out not to be alike."""
    with capturing(model), repeats.traced_once():
        exported = export(model, repeats)
    check_exported(exported, model)
    module = exported.module(check_guards=False)
    weights = weights_of(module)
    annotate(module.graph)
    graph = repeats.unrolled(module.graph)
    with per_token_rope(model):
        check_agreement(graph, weights, model)
    return Captured(graph, weights)


class CausalLM(nn.Module):
    """The signature that is exported: tokens and positions in, logits and the unembedding's input out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, positions int64 [batch, length]."""
        hidden: list[Tensor] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        try:
            logits = self.model(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True).logits
        finally:
            hook.remove()
        if len(hidden) != 1:
            raise CaptureError(
                "the logits are not made by one call of the unembedding", expected=1, found=f"{len(hidden)} calls"
            )
        return logits, hidden[0]


DEEP = 12
"""Layers up to which torch's cache of fake tensors costs an export with symbolic sizes more than it saves: a third of
the time of three layers, and it saves a quarter of that of thirty."""


def export(model: PreTrainedModel, repeats: Repeats) -> ExportedProgram:
    """torch.export's graph with batch and length dynamic, and with functional operators only."""
    device = next(model.parameters()).device
    tokens = torch.arange(21, device=device).reshape(3, 7) % model.config.get_text_config().vocab_size
    positions = torch.arange(7, device=device).expand(3, 7).contiguous()
    sizes = {0: Dim.AUTO, 1: Dim.AUTO}
    deep = not repeats.kinds and getattr(model.config.get_text_config(), "num_hidden_layers", 0) > DEEP
    try:
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=deep):
            exported = torch.export.export(
                CausalLM(model), (tokens, positions), dynamic_shapes=(sizes, dict(sizes)), strict=False
            )
        if repeats.kinds and not is_simple(exported.graph):
            raise NotAlike("a second trace of the whole graph would be needed, which knows no layers")
        return functional(exported)
    except CaptureError as error:
        raise located(error, model) from error
    except Exception as error:
        lines = str(error).strip().splitlines()
        refusal = CaptureError(
            f"{type(model).__name__} cannot be captured by torch.export",
            found=f"{type(error).__name__}: {lines[0] if lines else ''}",
            remedy="graft needs control flow that does not depend on tensor values; see docs/limits.md",
        )
        raise located(refusal.with_traceback(error.__traceback__), model) from error


@contextlib.contextmanager
def capturing(model: PreTrainedModel) -> Iterator[None]:
    """Point the model's attention, masks, experts and ropes at forms that can be captured, and put all back after."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs: dict[int, Any] = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    fields = ("_attn_implementation", "_experts_implementation")
    before = [(config, {f: getattr(config, f, None) for f in fields}) for config in configs.values()]
    register()
    try:
        for config in configs.values():
            config._attn_implementation = INTERFACE
            if getattr(config, "_experts_implementation", None) is not None:
                config._experts_implementation = "batched_mm"
        with per_token_rope(model):
            yield
    finally:
        for config, values in before:
            for field, value in values.items():
                if getattr(config, field, None) is not value:
                    setattr(config, field, value)


def weights_of(module: fx.GraphModule) -> nn.Module:
    """The module holding the parameters, under the model's own names; get_attr targets are rewritten to match."""
    weights = module.get_submodule(MODEL)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            if node.target.startswith(f"{MODEL}."):
                node.target = node.target.removeprefix(f"{MODEL}.")
            else:  # a constant that export lifted out of the code
                constant = module
                for part in node.target.split("."):
                    constant = getattr(constant, part)
                setattr(weights, node.target.replace(".", "_"), constant)
                node.target = node.target.replace(".", "_")
    return weights


def annotate(graph: fx.Graph) -> None:
    """Turn export's metadata into each node's Origin, and drop what only export needs."""
    for node in graph.nodes:
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        module = stack[-1].removeprefix(MODEL).removeprefix(".") if stack else ""
        node.meta = {"val": node.meta.get("val"), "origin": Origin(module, code_line(node.meta.get("stack_trace")))}


def code_line(trace: str | None) -> str:
    """The innermost frame of a recorded stack that is not torch's own, as file:line."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace or "")
    frames = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""
