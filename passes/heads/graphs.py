"""The equations that heads of all families share, as graphs on flat rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from graft.compiler.building import Builder, add_parameters
from graft.compiler.canonical import aten, graft
from graft.compiler.errors import CheckpointError
from graft.compiler.nodes import Value, cat
from graft.compiler.passing import View
from graft.compiler.program import Function, Input, KVState
from graft.compiler.shapes import attribute
from graft.passes.heads.config import HeadsConfig, Kind, Prefix
from graft.passes.heads.dialects import read_heads


@dataclass(frozen=True)
class Installed:
    """Heads whose parameters are in the program's weights, and what they share with the target."""

    config: HeadsConfig
    at: str
    """Where the parameters are in the weights."""
    table: str
    """Path of the target's embedding table."""
    unembedding: str
    """Path, without ".weight", of what makes logits; "" where every head has its own."""
    dtype: torch.dtype

    @property
    def hidden(self) -> Input:
        """The row input for the target's hidden state, [N, width]."""
        return Input("hidden", ("N", self.config.width), self.dtype)

    def path(self, name: str) -> str:
        """Path of one of the heads' tensors."""
        return f"{self.at}.{name}"

    def logits(self, builder: Builder, x: Value, head: int) -> Value:
        """[R, v] of [R, width]."""
        return builder.linear(x, self.unembedding or self.path(f"{head}.unembedding"))

    def blocks(self, builder: Builder, x: Value, head: int) -> Value:
        """The residual blocks behind the first: x + SiLU(W x + b) each."""
        for block in range(1, self.config.layers):
            x = x + builder.linear(x, self.path(f"{head}.blocks.{block}")).apply(aten.silu.default)
        return x

    def finish(self, builder: Builder, logits: Value, hidden: Value, *states: Value) -> Function:
        """Add the function that was built to the program."""
        reduced = self.path("draft_vocabulary") if self.config.reduced else ""
        return builder.finish(builder.wide(logits), hidden, *states, draft_vocabulary=reduced)


def install(view: View, folder: Path, kind: Kind, at: str) -> Installed:
    """Read the heads in a folder and put their parameters into the program's weights under `at`.

    Raises CheckpointError where they are of another kind or for a model of another width or vocabulary.
    """
    config, tensors = read_heads(folder)
    trunk, weights = view.trunk, view.function.weights
    table, matrix = (path_of(node) for node in (trunk.embedding.args[0], trunk.unembedding.args[1]))
    hidden = trunk.hidden.meta["val"]
    tokens, width = int(attribute(weights, matrix).shape[0]), int(hidden.shape[-1])
    chosen = tensors.get("draft_vocabulary")
    fits = config.kind == kind and config.width == width and int(attribute(weights, table).shape[1]) == width
    if config.reduced:
        assert chosen is not None
        fits &= chosen.dtype == torch.int64 and int(chosen.min()) >= 0 and int(chosen.max()) < tokens
    else:
        fits &= config.vocabulary == tokens
    if not fits:
        raise CheckpointError(
            "the draft heads are not for this model",
            expected=f"kind {kind}, width {width}, {tokens} tokens or a choice of them",
            found=f"kind {config.kind}, width {config.width}, {config.vocabulary} tokens",
            where=folder,
        )
    placed: dict[str, Tensor] = {
        name: tensor.to(view.function.device, hidden.dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }
    unembedding = f"{at}.unembedding" if config.unembedding == "shared" else ""
    if config.unembedding == "target":
        unembedding = matrix.removesuffix(".weight")
        if chosen is not None:
            unembedding = f"{at}.unembedding"
            placed["unembedding.weight"] = attribute(weights, matrix).detach()[chosen.to(view.function.device)]
    if config.prefix is not None:
        frequencies = inverse_frequencies(config.prefix.head_dim, config.prefix.rope_theta)
        placed["prefix.inverse_frequencies"] = frequencies.to(view.function.device)
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
    wide = x if x.dtype == torch.float64 else x.apply(aten._to_copy.default, dtype=torch.float32)
    scale = ((wide * wide).apply(aten.mean.dim, [-1], True) + eps).apply(aten.rsqrt.default)
    normed = wide * scale
    return (normed if x.dtype == wide.dtype else normed.apply(aten._to_copy.default, dtype=x.dtype)) * (
        builder.parameter(f"{path}.weight")
    )


def rotated(x: Value, cos: Value, sin: Value) -> Value:
    """Rotary position embedding of [N, heads, dim] by cos and sin [N, 1, dim], halves side by side as in Llama."""
    size = int(x.shape[-1])
    first, second = x.apply(aten.slice.Tensor, -1, 0, size // 2), x.apply(aten.slice.Tensor, -1, size // 2, size)
    return x * cos + cat([-second, first]) * sin


def decoder_layer(builder: Builder, x: Value, at: str, spec: Prefix, state: KVState) -> tuple[Value, Value]:
    """One Llama decoder layer on rows [N, width] with a KV state of one layer; the result and the next state."""
    rope = cosine_and_sine(builder, f"{at}.inverse_frequencies", x.dtype)
    normed = rms_norm(builder, x, f"{at}.input_norm", spec.eps)
    heads = []
    for name, number in (("q_proj", spec.heads), ("k_proj", spec.kv_heads), ("v_proj", spec.kv_heads)):
        projected = builder.linear(normed, f"{at}.{name}").apply(aten.reshape.default, [-1, number, spec.head_dim])
        turned = projected if name == "v_proj" else rotated(projected, *rope)
        heads.append(turned.apply(aten.unsqueeze.default, 0).apply(aten.transpose.int, 1, 2))
    query, key, value = heads
    rows = [builder[name] for name in ("sequences", "positions", "parents", "lengths")]
    kv = builder[state.name].apply(graft.kv_append.default, key, value, rows[0], rows[3], 0)
    scale = spec.head_dim**-0.5
    attended = kv.apply(graft.kv_attend.default, query, *rows, 0, scale, 0, 0.0, None)
    flat = attended.apply(aten.reshape.default, [-1, spec.heads * spec.head_dim])
    x = x + builder.linear(flat, f"{at}.o_proj")
    normed = rms_norm(builder, x, f"{at}.post_norm", spec.eps)
    gate = builder.linear(normed, f"{at}.gate_proj").apply(aten.silu.default)
    return x + builder.linear(gate * builder.linear(normed, f"{at}.up_proj"), f"{at}.down_proj"), kv


def cosine_and_sine(builder: Builder, path: str, dtype: torch.dtype) -> tuple[Value, Value]:
    """[N, 1, dim] of the rows' positions; angles in float32."""
    positions = builder["positions"].apply(aten._to_copy.default, dtype=torch.float32)
    angles = positions.apply(aten.unsqueeze.default, -1) * builder.parameter(path)
    both = cat([angles, angles]).apply(aten.unsqueeze.default, 1)
    found = [both.apply(function) for function in (aten.cos.default, aten.sin.default)]
    cos, sin = (one.apply(aten._to_copy.default, dtype=dtype) for one in found)
    return cos, sin


def inverse_frequencies(size: int, theta: float) -> Tensor:
    """float32 [size / 2]: theta ** (-2 i / size)."""
    return theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
