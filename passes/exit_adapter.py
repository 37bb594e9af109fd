"""Kangaroo's adapter (2404.18911): an attention block of its own between an exit and the unembedding, then a norm.

before:
    h1 = stream behind the exit
    logits = unembed(norm(h1))
after:
    h2 = add(h1, adapter.attention(adapter.norm(h1)))
    logits = unembed(adapter.last_norm(h2))

The paper's adapter is one attention block of the target's kind, RMSNorm, attention with rotary positions, residual, and
no feed-forward. So its graph is that of the block which stands behind the exit, over other parameters and a KV state of
its own: what is taken from the model works for every family whose layers begin with attention. Keys of a checkpoint
are those of a model of one layer: `layers.0.self_attn.q_proj.weight`, ..., `layers.0.input_layernorm.weight`,
`norm.weight`. Since the function that has the layers below has the adapter too, each row leaves its keys and values in
both caches, and the paper's gap in the adapter's cache behind a fully accepted draft does not arise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx

from graft.compiler.building import add_parameters
from graft.compiler.canonical import ATTENTION, STATE_WRITES
from graft.compiler.errors import CheckpointError, PassError
from graft.compiler.layers import layer_path
from graft.compiler.nodes import new_input, untyped_node
from graft.compiler.passing import View
from graft.compiler.program import Function
from graft.compiler.shapes import attribute
from graft.compiler.trunk import Block, Trunk, between

ADAPTER = "exit_adapter"
"""Name of the adapter's parameters among the program's weights."""
STATE = "kv_adapter"
ADAPTER_FORMAT, ADAPTER_WEIGHTS = "graft exit adapter", "adapter.safetensors"
"""Of a folder that `train-heads` writes: what "format" says in its config.json, and the file of tensors."""


def attach_adapter(view: View, function: Function, trunk: Trunk, layer: int, path: str) -> None:
    """Let the function, a copy of the target, end in the adapter behind `layer` layers.

    Raises PassError for a model whose layers begin otherwise, CheckpointError for a file that does not fit.
    """
    norm = between(trunk.exit, trunk.hidden)
    kept, names = adapter_parts(trunk, layer)
    shapes = {name: attribute(function.weights, node.target) for node, name in names.items()}
    add_parameters(view, ADAPTER, load(file_of(path, layer), shapes))
    for node, name in names.items():
        with function.graph.inserting_before(node):
            own = function.graph.get_attr(f"{ADAPTER}.{name}")
        own.meta = dict(node.meta)
        for user in [user for user in node.users if user in kept.nodes or user in norm]:
            user.replace_input_with(node, own)
    give_state(function, kept)


def adapter_parts(trunk: Trunk, layer: int) -> tuple[Block, dict[fx.Node, str]]:
    """The attention block behind `layer` layers, all others behind it being dropped, and what an adapter calls each
    parameter of the block and of the final norm. Raises PassError for a model whose layers begin otherwise."""
    first, *others = [block for one in trunk.layers[layer:] for block in one]
    kept = first.parts[0] if first.parts else first
    if kept.kind != "attention" or len(kept.attention) != 1:
        raise PassError("an adapter needs a layer that begins with attention", found=first.kind, where=f"layer {layer}")
    norm = between(trunk.exit, trunk.hidden)
    for block in reversed([*first.parts[1:], *others]):
        block.drop()
    prefix = layer_path(kept.attention[0])
    names = {node: f"layers.0.{node.target.removeprefix(prefix + '.')}" for node in parameters(kept.nodes, prefix)}
    return kept, names | {node: f"norm.{node.target.rpartition('.')[2]}" for node in parameters(norm, "")}


def file_of(path: str, layer: int) -> Path:
    """The file of tensors: `path`, or that of a folder that `train-heads` wrote for this exit."""
    found = Path(path).expanduser()
    if not found.is_dir():
        return found
    try:
        made_for = json.loads((found / "config.json").read_text())["layer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("there is no adapter here", found=error, where=found) from error
    if made_for != layer:
        raise CheckpointError(
            "the adapter is for another exit", expected=f"layer {layer}", found=f"layer {made_for}", where=found
        )
    return found / ADAPTER_WEIGHTS


def parameters(nodes: Iterable[fx.Node], prefix: str) -> list[fx.Node]:
    """The parameters under a module that the nodes read."""
    read = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source.op == "get_attr")
    return [node for node in read if node.target.startswith(prefix)]


def give_state(function: Function, block: Block) -> None:
    """Let the block keep its rows in a state of its own."""
    (attend,) = [node for node in block.nodes if node.target in ATTENTION]
    (append,) = [node for node in block.nodes if node.target in STATE_WRITES]
    state = next(state for state in function.states if state.name == source_of(append).name)
    append.replace_all_uses_with(append.args[0], delete_user_cb=lambda user: user is not attend)
    own = new_input(function.graph, STATE)
    with function.graph.inserting_before(append):
        written = untyped_node(function.graph, append.target, (own, *append.args[1:5], 0), like=append)
    attend.args = (written, *attend.args[1:6], 0, *attend.args[7:])
    function.states = (*function.states, replace(state, name=STATE, layers=1))
    output = function.output
    output.args = ((*output.args[0], written),)


def source_of(write: fx.Node) -> fx.Node:
    """The state's input that a write goes back to."""
    node = write.args[0]
    while node.op != "placeholder":
        node = node.args[0]
    return node


def load(path: Path, shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's tensors in the model's dtype. Raises CheckpointError naming keys that are missing, surplus or of other
    sizes."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        problem = "an adapter cannot be read"
        raise CheckpointError(problem, expected="a safetensors file", found=error, where=path) from error
    missing, surplus = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    wrong = [
        f"{name} {list(found[name].shape)} for {list(one.shape)}"
        for name, one in shapes.items()
        if name in found and found[name].shape != one.shape
    ]
    if missing or surplus or wrong:
        raise CheckpointError(
            "an adapter does not fit the model",
            expected=", ".join(sorted(shapes)),
            found=f"missing: {missing or 'none'}; surplus: {surplus or 'none'}; of other sizes: {wrong or 'none'}",
            where=path,
        )
    return {name: found[name].to(one.dtype) for name, one in shapes.items()}
