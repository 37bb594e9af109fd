"""What transformers calls for attention and for masks while a model is captured.

The mask function makes no mask. It records what was asked for in a `MaskRequest`, which transformers hands on to the
attention function, so that the operator's window is the one the model means even where the model never passes it on.
Anything whose meaning is not known here is refused, never ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from graft.compiler import ops  # noqa: F401  (defines graft::attention)
from graft.compiler.errors import CaptureError

INTERFACE = "graft"
"""Name under which attention and mask function are known to transformers during capture."""

WINDOW_MASK = "sliding_window_overlay"
KNOWN_MASKS = frozenset(
    {"and_masks", "causal_mask_function", WINDOW_MASK, "packed_sequence_compatibility_function"}
    | {"packed_sequence_mask_function", "remap_positions_for_packed_sequence"}
)
"""Mask functions of transformers that mean causal attention, perhaps within a window. Positions of one captured
sequence count up by one, so the packed-sequence overlay is the identity there."""

INDEX = "layer_idx"
"""The attribute by which transformers' modules know which layer they are in."""

UNDERSTOOD = frozenset({"scaling", "softcap", "s_aux"})
"""Arguments of attention that become arguments of the operator."""

WITHOUT_MEANING = frozenset(
    {"sliding_window", "layer_idx", "position_ids", "cache_position", "use_cache", "output_attentions"}
    | {"output_hidden_states", "return_dict", "output_router_logits", "router_logits", "past_key_values"}
    | {"position_embeddings", "logits_to_keep"}
)
"""Arguments that do not change what eager attention computes; the window is the mask's, as in eager attention."""


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


class NotAlike(Exception):
    """Layers that were taken for alike are not: each has to be traced by itself."""


@dataclass(frozen=True, eq=False)
class LayerIndex:
    """Stands in for a layer's index while that layer is traced for others too: to be handed on, not computed with."""

    value: int

    def refuse(self, *_: Any) -> Any:
        """What is computed with the index is another thing in each layer."""
        raise NotAlike(f"the code of layer {self.value} computes with its index")

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __divmod__ = __pow__ = refuse
    __bool__ = __int__ = __float__ = __index__ = __hash__ = __neg__ = __and__ = __or__ = __xor__ = refuse
    __str__ = __format__ = refuse  # a name made of it would be the same in each layer


def layer_index(module: nn.Module) -> int:
    """The layer that the module says it is in; 0 where it does not say."""
    index = getattr(module, INDEX, None)
    return index.value if isinstance(index, LayerIndex) else int(index or 0)


def register() -> None:
    """Make both functions known to transformers under `INTERFACE`."""
    AttentionInterface.register(INTERFACE, attention_function)
    AttentionMaskInterface.register(INTERFACE, mask_function)


def mask_function(*, mask_function: Callable, local_size: int | None = None, **_: Any) -> MaskRequest:
    """transformers' mask interface: records the window, makes no mask."""
    parts = mask_parts(mask_function)
    unknown = sorted(parts - KNOWN_MASKS)
    if unknown or (WINDOW_MASK in parts) != bool(local_size):
        raise CaptureError(
            "the model asks for a mask that graft does not know",
            expected="causal attention, perhaps within a sliding window",
            found=", ".join(unknown) or f"a window of {local_size} over {', '.join(sorted(parts))}",
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
    if not isinstance(attention_mask, MaskRequest):
        raise CaptureError(
            "attention was given a mask that its model made itself",
            expected="a mask from transformers.masking_utils",
            found=type(attention_mask).__name__,
        )
    surplus = [f"{name}={given!r:.40}" for name, given in arguments.items() if is_surplus(name, given)]
    if surplus:
        raise CaptureError("attention was called with arguments that graft does not know", found=", ".join(surplus))
    scale = arguments.get("scaling")
    output = torch.ops.graft.attention(
        query,
        key,
        value,
        float(query.shape[-1] ** -0.5 if scale is None else scale),
        attention_mask.window,
        float(arguments.get("softcap") or 0.0),
        arguments.get("s_aux"),
        layer_index(module),
    )
    return output, None


def is_surplus(name: str, given: Any) -> bool:
    """Whether the argument may change the meaning of attention in a way that is not known here."""
    if name == "dropout":
        return bool(given)
    if name == "is_causal":
        return given is False
    return given is not None and name not in UNDERSTOOD | WITHOUT_MEANING
