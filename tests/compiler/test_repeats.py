"""Layers that are alike, traced once: the graph is the one that tracing every layer gives, node for node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from graft.compiler.capture import Captured, capture, traced
from graft.compiler.errors import CaptureError
from graft.compiler.nodes import origin_of
from graft.compiler.repeats import Repeats, Unrolling, find_kinds
from tests.families import build

DEEP = {"num_hidden_layers": 4}


@pytest.fixture
def unrolled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the layers that were not traced but copied."""
    paths: list[str] = []
    layer = Unrolling.layer

    def spy(self: Unrolling, node: fx.Node) -> list[fx.Node]:
        paths.append(self.repeats.paths[node.args[3]])
        return layer(self, node)

    monkeypatch.setattr(Unrolling, "layer", spy)
    return paths


def whole(model: PreTrainedModel) -> Captured:
    """Captured with every layer traced by itself."""
    with torch.no_grad():
        return traced(model, Repeats(model, []))


def described(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """Everything about every node: the call, its value, where it comes from."""
    return [
        (node.format_node(), str(node.meta["val"]), origin_of(node)) for node in graph.nodes if node.op != "output"
    ]


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt"])
def test_the_graph_is_that_of_a_model_traced_whole(name: str, unrolled: list[str]) -> None:
    model = build(name, **DEEP)
    captured = capture(model)
    assert len(unrolled) >= 2
    assert described(captured.graph) == described(whole(model).graph)
    assert {name: id(value) for name, value in captured.weights.named_parameters()} == {
        name: id(value) for name, value in model.named_parameters()
    }


def test_all_layers_of_a_llama_but_the_first_are_copied(unrolled: list[str]) -> None:
    capture(build("llama", **DEEP))
    assert unrolled == ["model.layers.1", "model.layers.2", "model.layers.3"]


def test_layers_with_and_without_a_window_are_two_kinds() -> None:
    kinds = find_kinds(build("gemma2", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2))
    assert [len(kind.layers) for kind in kinds] == [2, 2]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.mlp.register_forward_hook(lambda module, args, output: output * 2),
        lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.5),
        lambda layer: setattr(layer.self_attn, "scaling", 0.1),
        lambda layer: setattr(layer.mlp, "act_fn", nn.ReLU()),
        lambda layer: setattr(layer.mlp, "forward", lambda x: x * 3),
        lambda layer: setattr(layer.mlp, "down_proj", nn.Linear(96, 64, bias=True)),
    ],
    ids=["hook", "epsilon", "scale", "activation", "forward", "bias"],
)
def test_a_layer_that_differs_in_anything_is_traced_itself(change: Callable[[Any], Any], unrolled: list[str]) -> None:
    model = build("llama", **DEEP)
    change(model.model.layers[1])
    graph = capture(model.eval()).graph
    assert unrolled == ["model.layers.2", "model.layers.3"]
    assert described(graph) == described(whole(model).graph)


def test_a_layer_that_shares_a_parameter_is_traced_itself(unrolled: list[str]) -> None:
    model = build("llama", **DEEP)
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    graph = capture(model).graph
    assert unrolled == ["model.layers.3"]
    assert described(graph) == described(whole(model).graph)


def test_code_that_computes_with_the_index_of_its_layer_is_traced_whole(unrolled: list[str]) -> None:
    model = build("gpt2", n_layer=4, scale_attn_by_inverse_layer_idx=True)
    graph = capture(model).graph
    assert not unrolled
    assert str(graph) == str(whole(model).graph)


def writes_its_input(self: LlamaDecoderLayer, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    hidden_states.add_(1.0)
    return FORWARD(self, hidden_states, **kwargs)


def keeps_a_value(self: LlamaDecoderLayer, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    self.seen = hidden_states
    return FORWARD(self, hidden_states, **kwargs)


FORWARD = LlamaDecoderLayer.forward


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("forward", [writes_its_input, keeps_a_value])
def test_a_layer_that_does_more_than_return_is_traced_whole(
    forward: Callable[..., Any], unrolled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", **DEEP)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    graph = capture(model).graph
    assert not unrolled
    assert str(graph) == str(whole(model).graph)


def test_code_that_makes_a_name_of_its_index_is_traced_whole(
    unrolled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        factor = {"layer 2": 3.0}.get(f"layer {self.self_attn.layer_idx}", 1.0)
        return FORWARD(self, hidden_states * factor, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    model = build("llama", **DEEP)
    graph = capture(model).graph
    assert not unrolled
    assert str(graph) == str(whole(model).graph)


def test_a_layer_that_is_called_in_another_way_is_traced_itself(
    unrolled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third call gets an argument that the others do not get."""

    def forward(self: Any, hidden_states: Tensor, twice: bool = False, **kwargs: Any) -> Tensor:
        return FORWARD(self, hidden_states * 2 if twice else hidden_states, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return CALL(self, *args, **kwargs, **({"twice": True} if len(calls) == 3 else {}))

    calls: list[Any] = []
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", call)
    model = build("llama", **DEEP)
    with torch.no_grad():
        repeats = Repeats(model, find_kinds(model))
        with pytest.raises(CaptureError, match="does not compute"):  # the model itself is called four times more
            traced(model, repeats)
    assert unrolled == ["model.layers.1", "model.layers.3"]


CALL = LlamaDecoderLayer.__call__


def test_the_model_is_as_before_after_capture_and_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", **DEEP)
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    capture(model)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, x, **_: x if float(x.sum()) > 0 else -x)
    with pytest.raises(CaptureError):
        capture(model)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before
