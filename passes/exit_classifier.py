"""A classifier that says of a row whether it may exit (CALM, 2207.07061): a line over the stream's final norm.

before:
    early = _to_copy(linear(final_norm(h1), table), dtype=float32)
    total = sum(exp(sub(early, amax(early, [-1], True))), [-1], True)
    share = reciprocal(total)
after:
    share = sigmoid(_to_copy(linear(final_norm(h1), weight, bias), dtype=float32))
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graft.compiler.building import add_parameters
from graft.compiler.canonical import aten
from graft.compiler.errors import CheckpointError
from graft.compiler.nodes import Origin, Value
from graft.compiler.passing import View
from graft.compiler.shapes import attribute

CLASSIFIER = "exit_classifier"
"""Name of its parameters among the program's weights."""
CLASSIFIER_FORMAT, CLASSIFIER_WEIGHTS = "graft exit classifier", "classifier.safetensors"
"""What "format" says in the folder's config.json, and the file of tensors."""


def classified(view: View, hidden: Value, folder: str | Path, layer: int) -> Value:
    """float32 [..., 1]: the probability that the target's best token is what this norm of the stream unembeds to.

    Raises CheckpointError for a folder that holds no classifier, or one of another layer or width.
    """
    width = int(hidden.shape[-1])
    tensors = read_classifier(folder, layer, width)
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


def read_classifier(folder: str | Path, layer: int, width: int) -> dict[str, Tensor]:
    """Its tensors, checked."""
    where = Path(folder).expanduser()
    expected = {"weight": (1, width), "bias": (1,)}
    try:
        made_for = json.loads((where / "config.json").read_text())["layer"]
        found = load_file(where / CLASSIFIER_WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            "there is no exit classifier here",
            expected=f"config.json and {CLASSIFIER_WEIGHTS}, as train-heads writes them",
            found=f"{type(error).__name__}: {error}",
            where=where,
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if made_for != layer or shapes != expected:
        raise CheckpointError(
            "the exit classifier is not for this exit",
            expected=f"layer {layer}, {expected}",
            found=f"layer {made_for}, {shapes}",
            where=where,
        )
    return found
