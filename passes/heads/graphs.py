"""The equations that heads of all families share, as graphs on flat rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, fx

from graft.compiler.building import Builder, add_parameters
from graft.compiler.canonical import aten, graft
from graft.compiler.errors import CheckpointError
from graft.compiler.nodes import Value, cat
from graft.compiler.passing import View
from graft.compiler.program import Function, Input, KVState
from graft.compiler.shapes import attribute
from graft.passes.heads.config import Described
from graft.passes.heads.dialects import read_heads

AnyConfig_co = TypeVar("AnyConfig_co", bound=Described, covariant=True)


@dataclass(frozen=True)
class Installed(Generic[AnyConfig_co]):
    """Heads whose parameters are in the program's weights, and what they share with the target."""

    config: AnyConfig_co
    at: str
    """Where the parameters are in the weights."""
    table: str
    """Path of the embedding table that they read."""
    unembedding: str
    """Path, without ".weight", of what makes logits; "" where every head has its own."""
    dtype: torch.dtype

    def hidden(self, width: int = 0) -> Input:
        """The row input for the target's hidden states, [N, width], of their own width if none is given."""
        return Input("hidden", ("N", width or self.config.target_width), self.dtype)

    def states(self, layers: int) -> list[KVState]:
        """The KV of the heads' decoder layers. One of the name of one of the target's would be the target's."""
        spec = self.config.decoder_layer
        assert spec is not None
        sizes = (layers, spec.kv_heads, spec.head_dim, spec.head_dim)
        return [KVState(f"{self.at}_kv", *sizes, self.dtype)]

    def path(self, name: str) -> str:
        """Path of one of the heads' tensors."""
        return f"{self.at}.{name}"

    def logits(self, builder: Builder, x: Value, head: int = 0) -> Value:
        """[R, v] of [R, width]."""
        return builder.linear(x, self.unembedding or self.path(f"{head}.unembedding"))

    def blocks(self, builder: Builder, x: Value, head: int, count: int) -> Value:
        """The residual blocks behind the first, up to `count`: x + SiLU(W x + b) each."""
        for block in range(1, count):
            x = x + builder.linear(x, self.path(f"{head}.blocks.{block}")).apply(aten.silu.default)
        return x

    def norm(self, builder: Builder, x: Value, name: str) -> Value:
        """A norm of the heads, with the epsilon of their decoder layers."""
        spec = self.config.decoder_layer
        assert spec is not None
        return rms_norm(builder, x, self.path(name), spec.eps)

    def finish(self, builder: Builder, logits: Value, hidden: Value, *states: Value) -> Function:
        """Add the function that was built to the program."""
        reduced = self.path("draft_vocabulary") if self.config.reduced else ""
        return builder.finish(builder.wide(logits), hidden, *states, draft_vocabulary=reduced)


def install(
    view: View, folder: Path, kind: str, described: type[AnyConfig_co], at: str, *, embeds_outputs: bool = False
) -> Installed[AnyConfig_co]:
    """Read the heads in a folder, which are of a kind and of what describes it, and put their parameters into the
    program's weights under `at`. `embeds_outputs` takes embeddings from the target's unembedding.

    Raises CheckpointError where they are of another kind or for a model of another width or vocabulary.
    """
    config, tensors = read_heads(folder)
    trunk, weights = view.trunk, view.function.weights
    matrix = path_of(trunk.unembedding.args[1])
    table = matrix if embeds_outputs else path_of(trunk.embedding.args[0])
    hidden = trunk.hidden.meta["val"]
    tokens, width = int(attribute(weights, matrix).shape[0]), int(hidden.shape[-1])
    own = tensors.get("embedding.weight")
    embedded = int((attribute(weights, table) if own is None else own).shape[1])
    chosen = tensors.get("draft_vocabulary")
    fits = config.kind == kind and config.target_width == width and embedded == config.width
    fits &= own is None or own.shape[0] >= tokens
    if chosen is not None:
        fits &= chosen.dtype == torch.int64 and int(chosen.min()) >= 0 and int(chosen.max()) < tokens
    else:
        fits &= config.vocabulary == tokens
    if not fits or not isinstance(config, described):
        raise CheckpointError(
            "the draft heads are not for this model",
            expected=f"kind {kind}, width {width}, {tokens} tokens or a choice of them",
            found=f"kind {config.kind}, width {config.target_width}, {config.vocabulary} tokens",
            where=folder,
        )
    placed: dict[str, Tensor] = {
        name: tensor.to(view.function.device, hidden.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }
    if own is not None and not placed["embedding.weight"].equal(attribute(weights, table)):
        table = f"{at}.embedding.weight"
    else:
        placed.pop("embedding.weight", None)
    unembedding = f"{at}.unembedding" if config.unembedding == "shared" else ""
    if config.unembedding == "target":
        unembedding = matrix.removesuffix(".weight")
        if chosen is not None:
            unembedding = f"{at}.unembedding"
            held = getattr(weights.get_submodule(matrix.rpartition(".")[0]), "bias", None)
            for name, tensor in (("weight", attribute(weights, matrix)), ("bias", held)):
                if tensor is not None:
                    placed[f"unembedding.{name}"] = tensor.detach()[chosen.to(view.function.device)]
    if config.decoder_layer is not None:
        placed["inverse_frequencies"] = config.decoder_layer.frequencies().to(view.function.device)
    add_parameters(view, at, placed)
    return Installed(config, at, table, unembedding, hidden.dtype)


def path_of(node: fx.Node) -> str:
    """The path of a parameter that the target reads."""
    if node.op != "get_attr" or not str(node.target).endswith(".weight"):
        raise CheckpointError(
            "draft heads need the target's own table", expected="a parameter", found=node.format_node()
        )
    return str(node.target)


def rms_norm(builder: Builder, x: Value, path: str, eps: float) -> Value:
    """x / sqrt(mean(x^2) + eps) * weight, the division in float32 (float64 for float64), as in Llama."""
    exact = x.dtype in (torch.float32, torch.float64)
    wide = x if exact else x.apply(aten._to_copy.default, dtype=torch.float32)
    scale = ((wide * wide).apply(aten.mean.dim, [-1], True) + eps).apply(aten.rsqrt.default)
    normed = wide * scale
    return (normed if exact else normed.apply(aten._to_copy.default, dtype=x.dtype)) * (
        builder.parameter(f"{path}.weight")
    )


def rotated(x: Value, cos: Value, sin: Value) -> Value:
    """Rotary position embedding of [N, heads, dim] by cos and sin [N, 1, dim], halves side by side as in Llama."""
    size = int(x.shape[-1])
    first, second = x.apply(aten.slice.Tensor, -1, 0, size // 2), x.apply(aten.slice.Tensor, -1, size // 2, size)
    return x * cos + cat([-second, first]) * sin


def decoder_layer(
    builder: Builder,
    heads: Installed[Described],
    x: Value,
    at: str,
    state: Value,
    layer: int = 0,
    read: Value | None = None,
) -> tuple[Value, Value]:
    """One of the heads' decoder layers on rows [N, width]; the result and the next state, in whose layer `layer` its
    keys and values are kept. Attention reads `read` where that is given, else the layer's norm of x."""
    spec, path = heads.config.decoder_layer, heads.path(at)
    assert spec is not None
    rope = cosine_and_sine(builder, heads.path("inverse_frequencies"), x.dtype)
    if read is None:
        read = rms_norm(builder, x, f"{path}.input_norm", spec.eps)
    turned = []
    for name, number in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
        one = builder.linear(read, f"{path}.{name}_proj").apply(aten.reshape.default, [-1, number, spec.head_dim])
        if name != "v":
            one = rms_norm(builder, one, f"{path}.{name}_norm", spec.eps) if spec.head_norms else one
            one = rotated(one, *rope)
        turned.append(one.apply(aten.unsqueeze.default, 0).apply(aten.transpose.int, 1, 2))
    query, key, value = turned
    rows = [builder[name] for name in ("sequences", "positions", "parents", "lengths")]
    kv = state.apply(graft.kv_append.default, key, value, rows[0], rows[3], layer)
    scale = spec.head_dim**-0.5
    attended = kv.apply(graft.kv_attend.default, query, *rows, layer, scale, 0, 0.0, None)
    flat = attended.apply(aten.reshape.default, [-1, spec.heads * spec.head_dim])
    x = x + builder.linear(flat, f"{path}.o_proj")
    normed = rms_norm(builder, x, f"{path}.post_norm", spec.eps)
    gate = builder.linear(normed, f"{path}.gate_proj").apply(aten.silu.default)
    return x + builder.linear(gate * builder.linear(normed, f"{path}.up_proj"), f"{path}.down_proj"), kv


def cosine_and_sine(builder: Builder, path: str, dtype: torch.dtype) -> tuple[Value, Value]:
    """[N, 1, dim] of the rows' positions; angles in float32."""
    positions = builder["positions"].apply(aten._to_copy.default, dtype=torch.float32)
    angles = positions.apply(aten.unsqueeze.default, -1) * builder.parameter(path)
    both = cat([angles, angles]).apply(aten.unsqueeze.default, 1)
    found = [both.apply(function) for function in (aten.cos.default, aten.sin.default)]
    cos, sin = (one.apply(aten._to_copy.default, dtype=dtype) for one in found)
    return cos, sin
