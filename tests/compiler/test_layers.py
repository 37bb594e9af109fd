"""Which layers are the same."""

from __future__ import annotations

import networkx as nx
import pytest

from graft.compiler.layers import Run, find_classes, find_layers, fold, graph_hash
from graft.compiler.program import Program
from graft.passes.drop_block import DropBlock
from tests.programs import ALTERNATING, TIDY, program_of


def classes(program: Program) -> list[int]:
    return find_layers(program["forward"]).classes


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3_moe"])
def test_layers_of_one_kind_are_one_class_before_and_after_the_kv_cache(family: str) -> None:
    program = program_of(family)
    assert classes(program) == [0, 0, 0]
    assert classes(program.snapshots["capture"]) == [0, 0, 0]


def test_sliding_and_full_attention_are_two_classes_that_alternate() -> None:
    layers = find_layers(program_of("gemma2", **ALTERNATING)["forward"])
    assert layers.classes == [0, 1, 0, 1]
    assert [run.title for run in layers.runs] == ["layers 0-3, 2 x 2 (shown: layers 0-1)"]


def test_a_layer_that_lost_its_feed_forward_is_a_class_of_its_own() -> None:
    program = program_of("llama", (*TIDY, DropBlock(index=(1,))))
    assert classes(program) == [0, 1, 0]


def test_layers_with_other_constants_differ() -> None:
    function = program_of("llama")["forward"].copy()
    epsilon = next(node for node in find_layers(function).layers[1].nodes if 1e-06 in node.args)
    epsilon.args = (epsilon.args[0], 1e-05)
    assert find_layers(function).classes == [0, 1, 0]


def test_swapped_operands_of_a_subtraction_make_another_layer() -> None:
    function = program_of("llama")["forward"].copy()
    nodes = find_layers(function).layers[2].nodes
    silu_times_up = next(node for node in nodes if "silu" in str(node.args[:1]) and len(node.args) == 2)
    silu_times_up.args = silu_times_up.args[::-1]
    assert find_layers(function).classes == [0, 0, 2]


def test_every_node_has_a_twin_with_the_same_operator_in_the_first_layer_of_its_class() -> None:
    layers = find_layers(program_of("llama")["forward"])
    nodes = layers.layers[2].nodes
    twins = [layers.twins[node] for node in nodes]
    assert set(twins) == set(layers.layers[0].nodes)
    assert [twin.target for twin in twins] == [node.target for node in nodes]


def test_operands_precede_their_users_in_the_order_of_the_sections() -> None:
    layers = find_layers(program_of("gemma2")["forward"])
    number = {node: index for index, section in enumerate(layers.sections) for node in section.nodes}
    edges = [(operand, node) for node in number for operand in node.all_input_nodes if operand in number]
    assert len(edges) > len(number)
    assert all(number[operand] <= number[node] for operand, node in edges)


def test_a_function_without_a_trunk_is_one_section() -> None:
    function = program_of("llama")["forward"].copy()
    for node in list(function.graph.nodes):
        if node.op == "output":
            node.args = ((next(n for n in function.graph.nodes if n.op == "call_function"),),)
    function.graph.eliminate_dead_code()
    layers = find_layers(function)
    assert layers.trunk is None and layers.layers == [] and len(layers.head.nodes) == 1


def test_repeating_patterns_are_folded_to_the_widest_and_within() -> None:
    assert fold("AAAA") == (Run(0, 1, 4),)
    assert fold("ABBB") == (Run(0, 1, 1), Run(1, 1, 3))
    assert fold("ABABC") == (Run(0, 2, 2, (Run(0, 1, 1), Run(1, 1, 1))), Run(4, 1, 1))
    assert fold("AAAAABAAAAABAA") == (Run(0, 6, 2, (Run(0, 1, 5), Run(5, 1, 1))), Run(12, 1, 2))
    assert fold("") == ()


def test_labelled_graphs_that_hash_alike_but_differ_are_told_apart() -> None:
    # Two triangles and a hexagon: the standard pair that Weisfeiler-Lehman cannot tell apart.
    pair = [nx.DiGraph(), nx.DiGraph()]
    for graph, cycles in zip(pair, ([(0, 1, 2), (3, 4, 5)], [(0, 1, 2, 3, 4, 5)]), strict=True):
        for cycle in cycles:
            graph.add_edges_from(zip(cycle, cycle[1:] + cycle[:1], strict=True), label="0")
        nx.set_node_attributes(graph, "same", "label")
    hashes = {graph_hash(graph) for graph in pair}
    assert len(hashes) == 1
    assert find_classes(pair)[0] == [0, 1]
