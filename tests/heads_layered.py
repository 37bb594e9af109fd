"""Heads with a decoder layer of their own, EAGLE-3 and Clover-2: descriptions for tests, and their published equations
in plain torch, over a whole text and without a cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, embedding, linear, scaled_dot_product_attention, silu

from graft.passes.heads.clover import CloverConfig
from graft.passes.heads.eagle import EagleConfig
from graft.passes.heads.layer import DecoderLayer
from tests.families import VOCABULARY

LAYER = DecoderLayer(heads=4, kv_heads=2, head_dim=16, intermediate=96)
EAGLE = EagleConfig("eagle-3", 64, 64, 40, LAYER, taps=(1, 2, 3), reduced=True)
WIDE = replace(
    EAGLE, width=32, vocabulary=VOCABULARY, layer=replace(LAYER, head_dim=8, head_norms=True, attention_bias=True),
    layers=2, taps=(0, 2), reduced=False, embedding=VOCABULARY, stream_norms="each", normed_residual=True,
    normed_feature=True,
)  # fmt: skip
"""Every option of the layouts: a width and an embedding of its own, two layers, norms wherever there may be one."""
CLOVER = CloverConfig("clover-2", 3, 64, VOCABULARY, LAYER)
SMALL_CLOVER = replace(CLOVER, vocabulary=40, reduced=True, embedding=VOCABULARY, layers=1)
Tensors = Mapping[str, Tensor]


def norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm."""
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary position embedding of [L, heads, dim], as a complex rotation."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x))[:, None] / theta ** (torch.arange(half) / half)
    pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


def reference_layer(spec: DecoderLayer, tensors: Tensors, at: str, x: Tensor, read: Tensor) -> Tensor:
    """A decoder layer over the rows [L, width] of one path; its attention reads `read`."""

    def project(name: str) -> Tensor:
        made = linear(read, tensors[f"{at}.{name}_proj.weight"], tensors.get(f"{at}.{name}_proj.bias"))
        made = made.view(len(read), -1, spec.head_dim)
        return norm(made, tensors[f"{at}.{name}_norm.weight"]) if spec.head_norms and name != "v" else made

    q, k, v = project("q"), project("k"), project("v")
    q, k = turned(q, spec.rope_theta), turned(k, spec.rope_theta)
    k, v = (one.repeat_interleave(spec.heads // spec.kv_heads, dim=1) for one in (k, v))
    attended = scaled_dot_product_attention(*(one.transpose(0, 1) for one in (q, k, v)), is_causal=True)
    flat = attended.transpose(0, 1).reshape(len(x), -1)
    x = x + linear(flat, tensors[f"{at}.o_proj.weight"], tensors.get(f"{at}.o_proj.bias"))
    y = norm(x, tensors[f"{at}.post_norm.weight"])
    gated = silu(linear(y, tensors[f"{at}.gate_proj.weight"])) * linear(y, tensors[f"{at}.up_proj.weight"])
    return x + linear(gated, tensors[f"{at}.down_proj.weight"])


def eagle_logits(
    config: EagleConfig, tensors: Tensors, streams: Sequence[Tensor], tokens: Sequence[int], drafted: int, table: Tensor
) -> Tensor:
    """[L - 1, v] over a text of L tokens of which the last `drafted` are drafted: EAGLE-3's equations. `streams` are
    the target's, [L - drafted - 1, width] each. Rows of drafted tokens are added one by one, since each reads the
    feature that the row before has left."""
    table = tensors.get("embedding.weight", table)
    if config.stream_norms == "each":
        streams = [norm(one, tensors[f"fc_norms.{index}.weight"]) for index, one in enumerate(streams)]
    together = torch.cat(list(streams), -1)
    if config.stream_norms == "all":
        together = norm(together, tensors["fc_norm.weight"])
    features = linear(together, tensors["fc.weight"])
    for _ in range(drafted + 1):
        embedded = embedding(torch.tensor(tokens[1 : 1 + len(features)]), table)
        normed = norm(features, tensors["layers.0.input_norm.weight"])
        read = torch.cat([norm(embedded, tensors["layers.0.embedding_norm.weight"]), normed], -1)
        x = normed if config.normed_residual else features
        for layer in range(config.layers):
            read = norm(x, tensors[f"layers.{layer}.input_norm.weight"]) if layer else read
            x = reference_layer(config.layer, tensors, f"layers.{layer}", x, read)
        last = norm(x, tensors["norm.weight"])
        features = torch.cat([features, (last if config.normed_feature else x)[-1:]])
    return linear(last, tensors["unembedding.weight"])


def clover_logits(
    config: CloverConfig, tensors: Tensors, stream: Tensor, tokens: Sequence[int], drafted: int, unembedding: Tensor
) -> Tensor:
    """[v] behind a text of L tokens of which the last `drafted` are drafted: Clover-2's equations. `stream` is the
    target's in front of its last norm, [L - drafted - 1, width]."""
    table, heads = tensors.get("embedding.weight", unembedding), config.layer.heads

    def decode(at: str, x: Tensor, y: Tensor) -> Tensor:
        q = linear(norm(x, tensors[f"{at}.norm.weight"]), tensors[f"{at}.q.weight"], tensors[f"{at}.q.bias"])
        k, v = (linear(y, tensors[f"{at}.{one}.weight"], tensors[f"{at}.{one}.bias"]) for one in "kv")
        q, k, v = (one.view(len(x), heads, -1) for one in (q, k, v))
        return x + (cosine_similarity(q, k, dim=-1, eps=1e-6)[..., None] * v).reshape(x.shape)

    known = len(stream)
    x = decode("first", stream, embedding(torch.tensor(tokens[1 : 1 + known]), table))
    for layer in range(config.layers):
        read = norm(x, tensors[f"layers.{layer}.input_norm.weight"])
        x = reference_layer(config.layer, tensors, f"layers.{layer}", x, read)
    state = norm(x, tensors["norm.weight"])[-1:]
    said = linear(state, tensors["head.weight"], tensors["head.bias"])
    for token in tokens[1 + known :]:
        embedded = embedding(torch.tensor([token]), table)
        state = decode("next", state, embedded)
        said = linear(torch.cat([state, embedded], -1), tensors["next_head.weight"], tensors["next_head.bias"])
    matrix = unembedding[tensors["draft_vocabulary"]] if config.reduced else unembedding
    return linear(norm(said, tensors["head_norm.weight"]), matrix)[0]
