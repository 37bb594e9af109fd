"""What capture refuses, and why: each check is about one way in which a graph could be less than its model."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from transformers import PreTrainedModel

from graft.compiler.errors import CaptureError
from graft.compiler.nodes import call_nodes

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
TABLE = "see the table of families in docs/families.md"


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
            remedy=TABLE,
        )
    training = next((path or name for path, module in model.named_modules() if module.training), None)
    if training is not None:
        raise CaptureError(
            f"{name} is in training mode", expected="eval mode", where=training, remedy="call model.eval()"
        )
    check_parameters(model)


def check_parameters(model: PreTrainedModel) -> None:
    """Refuse weights that are not there, not plain floating point tensors, or spread over devices."""
    name, devices = type(model).__name__, set()
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CaptureError(
                f"{name} has weights without data", found="a meta tensor", where=path, remedy="load the weights"
            )
        devices.add(tensor.device)
    for path, parameter in model.named_parameters():
        if parameter.dtype not in FLOATING or type(parameter.data) is not Tensor:
            found = parameter.dtype if parameter.dtype not in FLOATING else type(parameter.data).__name__
            raise CaptureError(f"{name} is quantised", expected="floating point weights", found=found, where=path)
    if len(devices) > 1:
        raise CaptureError(
            f"{name} is spread over devices",
            expected="one device",
            found=", ".join(sorted(map(str, devices))),
            remedy="load it without device_map, or with everything on one device",
        )


def check_exported(exported: ExportedProgram, model: PreTrainedModel) -> None:
    """Refuse a graph that is narrower than the model: in its sizes, its state, or its attention."""
    name = type(model).__name__
    tokens = next(node for node in exported.graph.nodes if node.op == "placeholder" and node.name == "tokens")
    sizes = tokens.meta["val"].shape
    if any(isinstance(size, int) for size in sizes):
        raise CaptureError(
            f"{name} fixes the batch or the length to the example's",
            expected="[batch, length], both dynamic",
            found=list(sizes),
        )
    names = size_names(exported.graph)
    for guard in sizes[0].node.shape_env.guards:
        if not (isinstance(guard.expr, sympy.Eq) and all(side.is_Symbol for side in guard.expr.args)):
            raise CaptureError(
                f"{name} runs other code for other batches or lengths",
                expected="one graph for every batch and length",
                found=f"a condition on a size: {guard.expr.xreplace(names)}",
                where=guard.sloc,
                remedy=TABLE,
            )
    changed = exported.graph_signature.buffers_to_mutate
    if changed:
        raise CaptureError(
            f"{name} changes its own buffers while it runs",
            expected="a forward that is a function of tokens and positions",
            found=", ".join(sorted(changed.values())),
        )
    if not call_nodes(exported.graph, [torch.ops.graft.attention.default]):
        raise CaptureError(
            f"{name} computes its attention itself",
            expected="attention through transformers' AttentionInterface",
            found="no call of it",
            remedy=TABLE,
        )
    check_data_dependence(exported.graph, name)


def size_names(graph: fx.Graph) -> dict[sympy.Expr, sympy.Symbol]:
    """The symbols behind the inputs' sizes -> what they stand for."""
    names = {"tokens", "positions"}
    inputs = [node.meta["val"] for node in graph.nodes if node.op == "placeholder" and node.name in names]
    sizes = [(size, name) for value in inputs for size, name in zip(value.shape, ("batch", "length"), strict=True)]
    return {size.node.expr: sympy.Symbol(name, integer=True) for size, name in sizes if isinstance(size, torch.SymInt)}


def check_data_dependence(graph: fx.Graph, name: str) -> None:
    """Refuse results whose shapes depend on the values of tensors."""
    todo = list(graph.output_node().all_input_nodes)
    seen = set(todo)
    while todo:
        node = todo.pop()
        values = node.meta.get("val")
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is not None and free_unbacked_symbols(value):
                stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
                raise CaptureError(
                    f"{name} makes tensors whose shapes depend on data",
                    expected="shapes that follow from batch and length",
                    found=f"{node.target}",
                    where=stack[-1].removeprefix("model.") if stack else None,
                    remedy=TABLE,
                )
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        todo += new


def check_agreement(graph: fx.Graph, weights: nn.Module, model: PreTrainedModel) -> None:
    """Refuse a graph that does not compute what the model computes when it is called as users call it.

    One short sequence, without position_ids: a model that numbers its positions in a way of its own, or that treats
    a batch of one differently, shows here. The limits are far above rounding (and, at 16 bits, above what one
    expert routed differently makes of it) and far below what such a mistake does.
    """
    device = next(model.parameters()).device
    tokens = torch.arange(3, 6, device=device)[None] % model.config.get_text_config().vocab_size
    positions = torch.arange(3, device=device)[None]
    expected = model(input_ids=tokens, use_cache=False).logits.double()
    found = fx.GraphModule(weights, graph_copy(graph))(tokens, positions)[0].double()
    error = float((found - expected).norm() / expected.norm())
    limit = 1e-3 if model.get_output_embeddings().weight.dtype in (torch.float32, torch.float64) else 0.3
    if bool(expected.isfinite().all()) and not error <= limit:
        raise CaptureError(
            f"the graph of {type(model).__name__} does not compute the model's logits",
            expected=f"a relative error of at most {limit}",
            found=f"{error:.2g}, on tokens {tokens.tolist()[0]} at positions {positions.tolist()[0]}",
            remedy="the model may number its positions or build its mask in a way of its own: " + TABLE,
        )


def graph_copy(graph: fx.Graph) -> fx.Graph:
    """A copy that a GraphModule may own."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def located(error: CaptureError, model: PreTrainedModel) -> CaptureError:
    """The error with the innermost module, and the line of its code, that it passed through."""
    paths = {id(module): path for path, module in model.named_modules()}
    trace, module, line = error.__traceback__, None, None
    while trace is not None:
        frame = trace.tb_frame
        inside = frame.f_locals.get("self")
        if id(inside) in paths:
            module = f"{paths[id(inside)] or 'the model'} ({type(inside).__name__})"
        if "modeling_" in frame.f_code.co_filename:
            line = f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    where = error.where or ", ".join(part for part in (module, line) if part) or None
    return CaptureError(
        error.problem, expected=error.expected, found=error.found, where=where, remedy=error.remedy
    )
