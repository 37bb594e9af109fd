"""A classifier that says of a row whether it may exit (CALM, 2207.07061): a line over the stream's final norm.

before:
    early = _to_copy(linear(final_norm(h1), table), dtype=float32)
    total = sum(exp(sub(early, amax(early, [-1], True))), [-1], True)
    share = reciprocal(total)
after:
    share = sigmoid(_to_copy(linear(final_norm(h1), weight, bias), dtype=float32))
"""

from __future__ import annotations

from pathlib import Path

import torch

from graft.compiler.building import add_parameters
from graft.compiler.canonical import aten
from graft.compiler.nodes import Origin, Value
from graft.compiler.passing import View
from graft.compiler.shapes import attribute
from graft.passes.heads.trained import read_trained

CLASSIFIER = "exit_classifier"
"""Name of its parameters among the program's weights."""
CLASSIFIER_FORMAT, CLASSIFIER_WEIGHTS = "graft exit classifier", "classifier.safetensors"
"""What "format" says in the folder's config.json, and the file of tensors."""


def classified(view: View, hidden: Value, folder: str | Path, layer: int) -> Value:
    """float32 [..., 1]: the probability that the target's best token is what this norm of the stream unembeds to.

    Raises CheckpointError for a folder that holds no classifier, or one of another layer or width.
    """
    width = int(hidden.shape[-1])
    tensors = read_trained(folder, "exit classifier", CLASSIFIER_WEIGHTS, lambda _: line_shapes(width), layer=layer)
    function = view.function
    add_parameters(view, CLASSIFIER, {name: one.to(function.device, hidden.dtype) for name, one in tensors.items()})
    read, (_, fakes) = [], function.fake_inputs()
    for name in ("weight", "bias"):
        with function.graph.inserting_before(hidden.node):
            node = function.graph.get_attr(f"{CLASSIFIER}.{name}")
        node.meta["val"] = fakes.parameter(attribute(function.weights, node.target))
        node.meta["origin"] = Origin(CLASSIFIER, "", (view.by,))
        read.append(Value(node, view.by))
    score = hidden.apply(aten.linear.default, *read)
    return score.apply(aten._to_copy.default, dtype=torch.float32).apply(aten.sigmoid.default)


def line_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Of a line over rows of this width."""
    return {"weight": (1, width), "bias": (1,)}
