"""Formulas for FLOPs and bytes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from graft.compiler.canonical import graft
from graft.compiler.cost import Workload, function_cost, node_cost
from graft.compiler.nodes import call_nodes
from tests.families import build
from tests.programs import program_of

BATCH, LENGTH = 2, 17


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_matrix_products_are_what_torch_counts_in_the_eager_model(family: str) -> None:
    model = build(family)
    model.config._attn_implementation = "eager"
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    dense = program_of(family).snapshots["common-subexpression"]["forward"]
    estimate = function_cost(dense).at(Workload(batch=BATCH, length=LENGTH))
    assert estimate.products == counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_token_costs_what_its_row_of_the_dense_batch_costs(family: str) -> None:
    program = program_of(family)
    dense = function_cost(program.snapshots["common-subexpression"]["forward"]).at(Workload(batch=1, length=4))
    flat = function_cost(program["forward"]).at(Workload(rows=4, context=4, wanted=4))
    assert flat.products == dense.products


def test_weights_are_read_once_per_call_and_the_embedding_by_row() -> None:
    program = program_of("llama")
    at = lambda rows: function_cost(program["forward"]).at(Workload(rows=rows)).weights  # noqa: E731
    embedding, row = 131 * 64 * 4, 64 * 4
    assert at(1) == program.parameter_bytes - embedding + row
    assert at(8) - at(1) == 7 * row


def test_tied_weights_are_read_once() -> None:
    tied = program_of("llama", tie_word_embeddings=True)
    assert function_cost(tied["forward"]).at(Workload()).weights == tied.parameter_bytes + 64 * 4


def test_kv_is_read_once_per_sequence_and_no_further_than_the_window() -> None:
    cost = function_cost(program_of("gemma2")["forward"])
    kv = lambda **sizes: cost.at(Workload(**sizes)).kv  # noqa: E731
    token = 2 * (16 + 16) * 4
    written = 3 * token
    assert kv(context=100) == (6 + 100 + 6) * token + written
    assert kv(context=100, sequences=3, rows=3) == 3 * kv(context=100)


def test_the_cost_of_one_node_is_a_formula_in_rows() -> None:
    function = program_of("llama")["forward"]
    linear = next(node for node in function.graph.nodes if "down_proj" in str(node.args))
    assert str(node_cost(function, linear).flops) == f"{2 * 96 * 64}*N"
    assert str(node_cost(function, linear).weights) == str(96 * 64 * 4)


def test_no_more_experts_are_read_than_slots_choose_or_there_are() -> None:
    function = program_of("mixtral", num_hidden_layers=1)["forward"]
    (product, _) = call_nodes(function.graph, [graft.expert_linear.default])
    cost, matrix = node_cost(function, product), 192 * 64
    for rows, experts in ((1, 2), (2, 4), (9, 4)):
        assert cost.at(Workload(rows=rows)).weights == experts * matrix * 4
        assert cost.at(Workload(rows=rows)).products == 2 * (2 * rows) * matrix
    one, two, many = (function_cost(function).at(Workload(rows=rows)).weights for rows in (1, 2, 9))
    row = 64 * 4  # of the embedding
    assert two - one == 2 * (matrix + 64 * 96) * 4 + row and many - two == 7 * row


def test_merging_linears_changes_no_products() -> None:
    program = program_of("llama")
    before, after = (function_cost(p["forward"]) for p in (program.snapshots["kv-cache"], program))
    assert (before.products - after.products).expand() == 0
    assert before.weights == after.weights
