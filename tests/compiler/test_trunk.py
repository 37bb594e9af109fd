"""Blocks as passes use them: what they add to the stream can be read, replaced and dropped."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from graft.compiler.canonical import aten
from graft.compiler.errors import CheckError
from graft.compiler.program import Program
from graft.compiler.trunk import Block, Trunk, find_trunk
from tests.compiler.programs import Decoder, dense_logits, dense_program, flat_program
from tests.families import VOCABULARY, build

TOKENS = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))

PARTS: dict[str, tuple[str, str, str]] = {
    "llama": ("model.layers", "self_attn", "mlp"),
    "qwen3_moe": ("model.layers", "self_attn", "mlp"),
    "olmo2": ("model.layers", "post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("transformer.h", "attn", "mlp"),
    "cohere": ("model.layers", "self_attn", "mlp"),
    "phi": ("model.layers", "self_attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
}
"""Family -> its layers, and the modules whose outputs its attention and its feed-forward add to the stream."""

KINDS = ("attention", "feed-forward")


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    """Two layers of the family."""
    return build(name, **({"n_layer": 2} if name == "gpt2" else {"num_hidden_layers": 2}))


@functools.cache
def program_of(name: str) -> Program:
    """Captured once; tests work on copies."""
    return dense_program(model_of(name))


def scaled(name: str, layer: int, kind: str, factor: float) -> Tensor:
    """Eager logits with one part's output scaled."""
    model, (layers, *parts) = model_of(name), PARTS[name]
    module = model.get_submodule(f"{layers}.{layer}.{parts[KINDS.index(kind)]}")

    def hook(_: nn.Module, args: object, output: object) -> object:
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model(input_ids=TOKENS, use_cache=False).logits
    finally:
        handle.remove()


def edited(name: str, kind: str, index: int, edit: Callable[[Block], None]) -> Program:
    """A copy of the program with one block edited."""
    program = program_of(name).copy()
    edit(find_trunk(program["forward"].graph, "edit").of_kind(kind)[index])
    program["forward"].graph.eliminate_dead_code()
    program["forward"].graph.lint()
    return program


def halve(block: Block) -> None:
    block.output = block.output * 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", PARTS)
def test_scaling_a_blocks_output_scales_what_its_module_returns(name: str, index: int, kind: str) -> None:
    program = edited(name, kind, index, halve)
    assert (dense_logits(program, TOKENS) - scaled(name, index, kind, 0.5)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("name", PARTS)
def test_dropping_a_block_is_its_module_returning_zero(name: str, index: int, kind: str) -> None:
    program = edited(name, kind, index, Block.drop)
    assert (dense_logits(program, TOKENS) - scaled(name, index, kind, 0.0)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["cohere", "phi", "gpt_neox"])
def test_dropping_a_parallel_block_drops_both_parts(name: str) -> None:
    program = edited(name, "parallel", 0, Block.drop)
    twice = edited(name, "attention", 0, Block.drop)
    find_trunk(twice["forward"].graph).blocks[0].drop()
    assert (dense_logits(program, TOKENS) - dense_logits(twice, TOKENS)).abs().max() <= 1e-5
    assert len(find_trunk(program["forward"].graph).blocks) == 1


@pytest.mark.parametrize("name", ["cohere", "phi", "gpt_neox"])
def test_both_parts_of_a_parallel_block_can_be_edited_one_after_the_other(name: str) -> None:
    program = program_of(name).copy()
    block = find_trunk(program["forward"].graph).blocks[0]
    for part in block.parts:
        halve(part)
    both = program_of(name).copy()
    halve(find_trunk(both["forward"].graph).blocks[0])
    assert (dense_logits(program, TOKENS) - dense_logits(both, TOKENS)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_neighbouring_blocks_of_one_trunk_can_be_dropped(name: str, kind: str) -> None:
    program = program_of(name).copy()
    for block in find_trunk(program["forward"].graph).of_kind(kind):
        block.drop()
    one_by_one = program_of(name).copy()
    for _ in range(2):
        find_trunk(one_by_one["forward"].graph).of_kind(kind)[0].drop()
        one_by_one["forward"].graph.eliminate_dead_code()
    assert torch.equal(dense_logits(program, TOKENS), dense_logits(one_by_one, TOKENS))
    program["forward"].graph.eliminate_dead_code()
    assert not find_trunk(program["forward"].graph).of_kind(kind)


@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_blocks_of_a_decoding_function_can_be_dropped_and_write_no_state(name: str) -> None:
    program = flat_program(program_of(name))
    function = program["forward"]
    find_trunk(function.graph).attention[0].drop()
    function.graph.eliminate_dead_code()
    assert len([node for node in function.graph.nodes if "kv_append" in str(node.target)]) == 1
    (found,) = Decoder(program).step([(1, TOKENS[0].tolist())])
    assert (found - scaled(name, 0, "attention", 0.0)[0]).abs().max() <= 1e-5


def test_roles_cover_the_way_from_the_embedding_to_the_logits() -> None:
    trunk = find_trunk(program_of("llama")["forward"].graph)
    roles = trunk.roles()
    assert {"embedding", "attention", "feed-forward", "residual", "final-norm", "unembedding"} == set(roles.values())
    assert [len(layer) for layer in trunk.layers] == [2, 2]


def test_a_projected_embedding_enters_the_stream_after_the_projection() -> None:
    program = dense_program(build("opt_post_norm", num_hidden_layers=1))
    trunk = find_trunk(program["forward"].graph)
    assert int(trunk.embedding.meta["val"].shape[-1]) == 32
    assert int(trunk.entry.meta["val"].shape[-1]) == 64
    assert int(trunk.hidden.meta["val"].shape[-1]) == 32
    assert [block.kind for block in trunk.blocks] == ["attention", "feed-forward"]


def graph_of(body: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]) -> fx.Graph:
    """tokens -> embedding -> body -> linear -> logits."""
    graph = fx.Graph()
    tokens, weight = graph.placeholder("tokens"), graph.placeholder("weight")
    stream = graph.call_function(aten.embedding.default, (weight, tokens))
    result = body(graph, stream, weight)
    logits = graph.call_function(aten.linear.default, (result, weight))
    graph.output((logits, result))
    return graph


def trunk_of(body: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]) -> Trunk:
    return find_trunk(graph_of(body))


def test_a_model_without_residual_adds_has_no_trunk() -> None:
    with pytest.raises(CheckError, match="no residual stream"):
        trunk_of(lambda graph, stream, weight: graph.call_function(aten.linear.default, (stream, weight)))


def test_an_add_of_a_constant_is_no_block() -> None:
    def body(graph: fx.Graph, stream: fx.Node, weight: fx.Node) -> fx.Node:
        shifted = graph.call_function(aten.add.Tensor, (stream, 1.0))
        work = graph.call_function(aten.linear.default, (shifted, weight))
        return graph.call_function(aten.add.Tensor, (shifted, work))

    trunk = trunk_of(body)
    assert len(trunk.blocks) == 1
    assert trunk.entry.args[1] == 1.0


def test_a_stream_that_is_scaled_between_blocks_is_followed() -> None:
    def body(graph: fx.Graph, stream: fx.Node, weight: fx.Node) -> fx.Node:
        for _ in range(2):
            work = graph.call_function(aten.linear.default, (stream, weight))
            total = graph.call_function(aten.add.Tensor, (stream, work))
            stream = graph.call_function(aten.mul.Tensor, (total, 0.5))
        return stream

    assert [block.kind for block in trunk_of(body).blocks] == ["feed-forward"] * 2


def test_a_stream_that_never_goes_past_a_block_is_refused() -> None:
    def body(graph: fx.Graph, stream: fx.Node, weight: fx.Node) -> fx.Node:
        left, right = (graph.call_function(aten.linear.default, (stream, weight)) for _ in range(2))
        return graph.call_function(aten.add.Tensor, (left, right))

    with pytest.raises(CheckError, match="goes past the block"):
        trunk_of(body)
