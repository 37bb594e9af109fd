"""Draft heads as torch modules: the equations of passes/heads, over whole sequences and with gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from graft.passes.heads.config import HeadsConfig


class HeadsNetwork(nn.Module):
    """The heads that `config` describes, their parameters called as in a folder of heads, dots as slashes."""

    def __init__(self, config: HeadsConfig, unembedding: Tensor, seed: int) -> None:
        """`unembedding` [v, width] makes the logits of all heads; it is trained where it is the heads' own."""
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.tensors = nn.ParameterDict()
        for name, shape in config.shapes().items():
            if name == "unembedding.weight":
                value = unembedding.detach().cpu().float().clone()
            elif name == "draft_vocabulary":
                continue
            else:
                value = initial(name, shape, generator)
            self.tensors[name.replace(".", "/")] = nn.Parameter(value)
        self.frozen: Tensor
        self.register_buffer("frozen", unembedding.detach().float(), persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        """A parameter by its name in a folder."""
        return self.tensors[name.replace(".", "/")]

    def named(self) -> dict[str, Tensor]:
        """Parameters by their names in a folder."""
        return {name.replace("/", "."): parameter.detach() for name, parameter in self.tensors.items()}

    def read(self, hidden: Sequence[Tensor]) -> Tensor:
        """What the heads read, [tokens, width], from the hidden states [length, width] of sequences."""
        return torch.cat([self.prefixed(one) if self.config.prefix else one for one in hidden])

    def logits(self, head: int, states: Tensor, embedded: Sequence[Tensor]) -> Tensor:
        """[rows, v] of a head on what it reads, [rows, width], and the embeddings of the tokens behind it."""
        at = f"{head}.input"
        if self.config.kind == "hydra":
            read = torch.cat([states, *embedded], -1)
            x = linear(read, self[f"{head}.residual.weight"], self[f"{head}.residual.bias"])
        else:
            read = x = states
        x = x + silu(linear(read, self[f"{at}.weight"], self[f"{at}.bias"]))
        for block in range(1, self.config.layers):
            at = f"{head}.blocks.{block}"
            x = x + silu(linear(x, self[f"{at}.weight"], self[f"{at}.bias"]))
        return linear(x, self["unembedding.weight"] if self.config.unembedding == "shared" else self.frozen)

    def prefixed(self, hidden: Tensor) -> Tensor:
        """The prefix layer over one sequence [length, width]: a Llama decoder layer and a norm."""
        spec = self.config.prefix
        assert spec is not None
        half, positions = spec.head_dim // 2, torch.arange(len(hidden), device=hidden.device)
        powers = -torch.arange(half, device=hidden.device) / half
        angles = (positions[:, None] * spec.rope_theta**powers)[:, None]
        cos, sin = (torch.cat([one, one], -1) for one in (angles.cos(), angles.sin()))

        def norm(x: Tensor, name: str) -> Tensor:
            return x * (x.pow(2).mean(-1, keepdim=True) + spec.eps).rsqrt() * self[f"prefix.{name}.weight"]

        def heads(x: Tensor, name: str, turned: bool) -> Tensor:
            x = linear(x, self[f"prefix.{name}_proj.weight"]).view(len(x), -1, spec.head_dim)
            x = x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin if turned else x
            return x.transpose(0, 1)[None]

        x = norm(hidden, "input_norm")
        q, k, v = heads(x, "q", True), heads(x, "k", True), heads(x, "v", False)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=spec.heads != spec.kv_heads)
        flat = attended[0].transpose(0, 1).reshape(len(x), -1)
        hidden = hidden + linear(flat, self["prefix.o_proj.weight"])
        x = norm(hidden, "post_norm")
        gated = silu(linear(x, self["prefix.gate_proj.weight"])) * linear(x, self["prefix.up_proj.weight"])
        return norm(hidden + linear(gated, self["prefix.down_proj.weight"]), "norm")


def initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """W starts as zero, as in Medusa and Hydra; the prefix layer adds nothing at first. R starts as what takes the
    hidden state over, where Hydra starts at random: what the unembedding reads is then of the target's kind."""
    if name.endswith(".residual.weight"):
        return torch.eye(*shape)
    if "norm" in name:
        return torch.ones(shape)
    if len(shape) == 1 or ".input." in name or ".blocks." in name or name in ("prefix.o_proj.weight", LAST):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


LAST = "prefix.down_proj.weight"
