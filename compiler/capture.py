"""From an unchanged Hugging Face causal LM to one torch.fx graph without a cache.

The captured function takes tokens and positions, int64 [batch, length], and returns logits [batch, length,
vocabulary] and the final hidden states [batch, length, width] that the unembedding reads. Attention goes through
transformers' AttentionInterface into one operator, `graft::attention`; the mask function only records what mask was
asked for, so that no mask is materialised and the operator's window is the one the model means even where the model
never passes it on.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from graft.compiler import ops  # noqa: F401  (defines graft::attention)
from graft.compiler.decompositions import decompositions
from graft.compiler.errors import CaptureError
from graft.compiler.nodes import Origin, call_nodes
from graft.compiler.rope import per_token_rope

INTERFACE = "graft"
"""Name under which attention and mask function are known to transformers during capture."""

KNOWN_MASKS = frozenset(
    {"and_masks", "causal_mask_function", "sliding_window_overlay", "packed_sequence_compatibility_function"}
    | {"packed_sequence_mask_function", "remap_positions_for_packed_sequence"}
)
"""Mask functions of transformers that mean causal attention, perhaps within a window. Positions of one captured
sequence count up by one, so the packed-sequence overlay is the identity there."""

KNOWN_ARGUMENTS = frozenset(
    {"scaling", "dropout", "sliding_window", "softcap", "s_aux", "is_causal", "layer_idx", "position_ids"}
    | {"cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict", "head_mask"}
    | {"output_router_logits", "router_logits", "past_key_values", "position_embeddings", "logits_to_keep"}
)
"""What attention may be called with; any other argument that is not None could change its meaning, so it is refused."""


@dataclass(frozen=True)
class MaskRequest:
    """What a model asked the mask function for; stands in for the mask during capture."""

    window: int
    """Sliding window in tokens; 0 where there is none."""

    def refuse(self, *_: Any) -> Any:
        """A model that computes with the mask does its attention itself."""
        raise CaptureError(
            "attention is computed by the model's own code",
            expected="attention through transformers' AttentionInterface",
            found="arithmetic on the attention mask",
            remedy="see the table of families in docs/families.md",
        )

    __getattr__ = __add__ = __radd__ = __mul__ = __getitem__ = __eq__ = refuse
    __hash__ = None  # type: ignore[assignment]


@dataclass
class Captured:
    """A captured model: the graph, and the module that holds the parameters its get_attr nodes name."""

    graph: fx.Graph
    weights: nn.Module


def capture(model: PreTrainedModel) -> Captured:
    """Capture `model` (eval mode, weights loaded, any floating dtype). The model is left as it was.

    Raises CaptureError naming the module and the reason where the model cannot be captured whole.
    """
    check_model(model)
    device = next(model.parameters()).device
    tokens = torch.arange(21, device=device).reshape(3, 7) % model.config.get_text_config().vocab_size
    positions = torch.arange(7, device=device).expand(3, 7).contiguous()
    auto = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    with capturing(model), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(
                CausalLM(model), (tokens, positions), dynamic_shapes=(auto, dict(auto)), strict=False
            )
            exported = exported.run_decompositions(decompositions())
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} cannot be captured by torch.export",
                found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
                where=user_line(error),
                remedy="graft needs control flow that does not depend on tensor values; see docs/limits.md",
            ) from error
        if exported.graph_signature.buffers_to_mutate:
            raise CaptureError(
                f"{type(model).__name__} changes its own buffers while it runs",
                expected="a forward that is a function of tokens and positions",
                found=", ".join(sorted(exported.graph_signature.buffers_to_mutate.values())),
            )
        module = exported.module(check_guards=False)
    weights = weights_of(module)
    captured = Captured(copy.deepcopy(module.graph), weights)  # a copy has no owning module to be checked against
    captured.graph.set_codegen(fx.graph.CodeGen())  # export's own would keep the captured signature
    annotate(captured.graph)
    check_captured(captured.graph, model)
    return captured


class CausalLM(nn.Module):
    """The signature that is exported: tokens and positions in, logits and the unembedding's input out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        hidden: list[Tensor] = []
        unembedding = self.model.get_output_embeddings()
        hook = unembedding.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        try:
            logits = self.model(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=True).logits
        finally:
            hook.remove()
        return logits, hidden[-1]


def check_model(model: Any) -> None:
    """Refuse what is certain not to work, before any time is spent on it."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise CaptureError("graft compiles transformers models", expected="a PreTrainedModel", found=name)
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise CaptureError(
            f"{name} is not a causal language model",
            expected="a decoder with an unembedding",
            remedy="load it with AutoModelForCausalLM",
        )
    if getattr(model, "_is_stateful", False):
        raise CaptureError(
            f"{name} keeps a recurrent state",
            expected="attention as the only operation across positions",
            found="layers whose state is not a KV cache",
            remedy="see the table of families in docs/families.md",
        )
    if model.training:
        raise CaptureError(f"{name} is in training mode", expected="eval mode", remedy="call model.eval()")
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CaptureError(
                f"{name} has parameters without data", found="a meta tensor", where=path, remedy="load the weights"
            )
    dtype = model.get_output_embeddings().weight.dtype
    if not dtype.is_floating_point:
        raise CaptureError(f"{name} is quantised", expected="floating point weights", found=dtype)


@contextlib.contextmanager
def capturing(model: PreTrainedModel) -> Iterator[None]:
    """Point the model's attention, masks, experts and ropes at forms that can be captured, and put all back after."""
    found = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    fields = ("_attn_implementation", "_experts_implementation")
    before = [(config, {f: getattr(config, f, None) for f in fields}) for config in configs.values()]
    AttentionInterface.register(INTERFACE, attention_function)
    AttentionMaskInterface.register(INTERFACE, mask_function)
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


def mask_function(*, mask_function: Callable, local_size: int | None = None, **_: Any) -> MaskRequest:
    """transformers' mask interface: records the window, makes no mask."""
    unknown = sorted(mask_parts(mask_function) - KNOWN_MASKS)
    if unknown:
        raise CaptureError(
            "the model asks for a mask that graft does not know",
            expected="causal attention, perhaps within a sliding window",
            found=", ".join(unknown),
        )
    return MaskRequest(local_size or 0)


def mask_parts(function: Callable) -> set[str]:
    """Names of the mask functions that `function` is composed of, found through its closure."""
    parts = {function.__qualname__.split(".")[0]}
    for cell in function.__closure__ or ():
        content = cell.cell_contents
        for inner in content if isinstance(content, (tuple, list)) else (content,):
            if callable(inner) and hasattr(inner, "__qualname__") and not isinstance(inner, Tensor):
                parts |= mask_parts(inner)
    return parts


def attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: one `graft::attention` node."""
    where = f"{type(module).__name__}, layer {getattr(module, 'layer_idx', '?')}"
    if not isinstance(attention_mask, MaskRequest):
        raise CaptureError(
            "attention was given a mask that its model made itself",
            expected="a mask from transformers.masking_utils",
            found=type(attention_mask).__name__,
            where=where,
        )
    surplus = [name for name, given in arguments.items() if given is not None and name not in KNOWN_ARGUMENTS]
    if surplus or arguments.get("is_causal") is False:
        raise CaptureError(
            "attention was called with arguments that graft does not know",
            found=", ".join(surplus) or "is_causal=False",
            where=where,
        )
    scale = arguments.get("scaling")
    output = torch.ops.graft.attention(
        query,
        key,
        value,
        float(query.shape[-1] ** -0.5 if scale is None else scale),
        attention_mask.window,
        float(arguments.get("softcap") or 0.0),
        arguments.get("s_aux"),
        int(getattr(module, "layer_idx", 0) or 0),
    )
    return output, None


def weights_of(module: fx.GraphModule) -> nn.Module:
    """The module holding the parameters, under the model's own names; get_attr targets are rewritten to match."""
    weights = module.get_submodule("model")
    for node in module.graph.nodes:
        if node.op == "get_attr":
            if node.target.startswith("model."):
                node.target = node.target.removeprefix("model.")
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
        module = stack[-1].removeprefix("model").removeprefix(".") if stack else ""
        node.meta = {"val": node.meta.get("val"), "origin": Origin(module, code_line(node.meta.get("stack_trace")))}


def code_line(trace: str | None) -> str:
    """The innermost frame of a recorded stack, as file:line."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace or "")
    return f"{frames[-1][0].rsplit('/', 1)[-1]}:{frames[-1][1]}" if frames else ""


def user_line(error: BaseException) -> str | None:
    """The innermost modelling line that an export error passed through."""
    trace, found = error.__traceback__, None
    while trace is not None:
        code = trace.tb_frame.f_code
        if "modeling_" in code.co_filename or trace.tb_frame.f_globals.get("__name__", "").endswith("__main__"):
            found = f"{code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}, in {code.co_qualname}"
        trace = trace.tb_next
    return found


def check_captured(graph: fx.Graph, model: PreTrainedModel) -> None:
    """Refuse a graph that lost a dynamic dimension or bypassed the attention interface."""
    name = type(model).__name__
    tokens = next(node for node in graph.nodes if node.op == "placeholder")
    if any(isinstance(size, int) for size in tokens.meta["val"].shape):
        raise CaptureError(
            f"{name} fixes the batch or the length to the example's",
            expected="[batch, length], both dynamic",
            found=list(tokens.meta["val"].shape),
        )
    if not call_nodes(graph, [torch.ops.graft.attention.default]):
        raise CaptureError(
            f"{name} computes its attention itself",
            expected="attention through transformers' AttentionInterface",
            found="no call of it",
            remedy="see the table of families in docs/families.md",
        )
