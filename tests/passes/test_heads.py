"""medusa-heads and hydra-heads: the listings in their docstrings, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import fx

from graft.compiler.errors import CheckpointError
from graft.compiler.host import speculative_host
from graft.compiler.nodes import call_nodes
from graft.compiler.passing import Pass, View
from graft.compiler.pipeline import run_passes
from graft.compiler.program import FLAT, Function, Input
from graft.compiler.trunk import find_trunk
from graft.passes import acceptance_head, clover_heads, eagle_heads, hydra_heads, judge_head, medusa_heads
from graft.passes.clover_heads import CloverHeads
from graft.passes.eagle_heads import EagleHeads
from graft.passes.heads.config import HeadsConfig
from graft.passes.hydra_heads import HydraHeads
from graft.passes.medusa_heads import MedusaHeads
from tests.heads import random_tensors, write
from tests.heads_layered import CLOVER, EAGLE
from tests.passes.listings import Sheet, expression, first_call, listings
from tests.programs import program_of

MEDUSA = HeadsConfig("medusa", heads=2, width=64, vocabulary=131)
HYDRA = replace(MEDUSA, kind="hydra", biased=False)
NAMES = {
    MEDUSA: {"model.embed_tokens.weight": "table"}
    | {f"heads.{i}.{path}": f"{name}_{i}" for i in (0, 1) for path, name in
       (("input.weight", "w"), ("input.bias", "b"), ("unembedding.weight", "u"))},
    HYDRA: {"model.embed_tokens.weight": "table", "heads.1.residual.weight": "r", "heads.1.residual.bias": "c",
            "heads.1.input.weight": "w", "heads.1.input.bias": "b", "heads.1.unembedding.weight": "o"},
}  # fmt: skip


def grafted(one: Pass, name: str) -> Function:
    """The function that the pass adds to a llama."""
    program = program_of("llama").copy()
    program.host = speculative_host()
    one.run(View(program, one.pass_name()))
    return program[name]


@pytest.mark.parametrize(
    ("module", "config", "name"), [(medusa_heads, MEDUSA, "heads"), (hydra_heads, HYDRA, "heads_1")]
)
def test_the_docstring_shows_what_it_does(module: ModuleType, config: HeadsConfig, name: str, tmp_path: Path) -> None:
    one = (MedusaHeads if config.kind == "medusa" else HydraHeads)(write(tmp_path / "heads", config))
    function = grafted(one, name)
    shapes = dict.fromkeys(NAMES[config].values(), (64,))
    rows = (*FLAT, Input("hidden", ("N", 64), torch.float32), Input("token_1", ("N",), torch.int64))
    shown = Sheet(rows, shapes).run(listings(module)[1])
    found = [expression(node) for node in function.output.args[0]]
    for path, short in NAMES[config].items():
        found = [text.replace(path, short) for text in found]
    assert [expression(node) for node in shown] == found


def test_the_docstring_of_the_acceptance_head_shows_what_it_does(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in acceptance_head.acceptance_shapes(1, 64).items()}
    save_file(tensors, tmp_path / acceptance_head.ACCEPTANCE_WEIGHTS)
    (tmp_path / "config.json").write_text('{"layer": 1, "num_layers": 1}')
    function = grafted(acceptance_head.AcceptanceHead(str(tmp_path), 1), "acceptance")
    names = {"0.linear.weight": "w", "0.linear.bias": "b", "1.weight": "o", "1.bias": "c"}
    rows = (*FLAT, Input("hidden", ("N", 64), torch.float32))
    shown = Sheet(rows, dict.fromkeys(names.values(), (64,))).run(listings(acceptance_head)[1])
    found = [expression(node) for node in function.output.args[0]]
    for path, short in names.items():
        found = [text.replace(f"acceptance.model.{path}", short) for text in found]
    assert [expression(node) for node in shown] == found


def test_the_docstring_of_the_judge_head_shows_what_it_does(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1, 64), "bias": torch.zeros(1)}, tmp_path / judge_head.JUDGE_WEIGHTS)
    (tmp_path / "config.json").write_text("{}")
    function = grafted(judge_head.JudgeHead(str(tmp_path)), "judge")
    rows = (*FLAT, Input("hidden", ("N", 64), torch.float32))
    shown = Sheet(rows, {"weight": (1, 64), "bias": (1,)}).run(listings(judge_head)[1])
    found = [expression(node).replace("judge.", "") for node in function.output.args[0]]
    assert [expression(node) for node in shown] == found
    with pytest.raises(CheckpointError, match="does not fit"):
        save_file({"weight": torch.zeros(1, 32)}, tmp_path / judge_head.JUDGE_WEIGHTS)
        grafted(judge_head.JudgeHead(str(tmp_path)), "judge")


EPSILON = 1e-6


def sheet_of(width: int, names: dict[str, str]) -> Sheet:
    """A sheet for heads that read rows of `width` numbers, with the parts that listings do not spell out."""
    sheet = Sheet((*FLAT, Input("hidden", ("N", width), torch.float32)), dict.fromkeys(names.values(), (64,)))
    call = {name: sheet[name] for name in ("add", "clamp", "mean", "mul", "rsqrt", "sum")}

    def norm(x: fx.Node, weight: fx.Node) -> fx.Node:
        mean = call["add"](call["mean"](call["mul"](x, x), [-1], True), EPSILON)
        return call["mul"](call["mul"](x, call["rsqrt"](mean)), weight)

    def unit(x: fx.Node) -> fx.Node:
        return call["rsqrt"](call["clamp"](call["sum"](call["mul"](x, x), [-1], True), EPSILON**2))

    sheet.update(norm=norm, unit=unit)
    return sheet


def renamed(nodes: list[fx.Node], names: dict[str, str]) -> list[str]:
    """The nodes as expressions, parameters by the names of a listing."""
    found = [expression(node) for node in nodes]
    for path in sorted(names, key=len, reverse=True):
        found = [text.replace(path, names[path]) for text in found]
    return found


def test_the_docstring_of_clover_heads_shows_what_it_does(tmp_path: Path) -> None:
    function = grafted(CloverHeads(write(tmp_path / "heads", CLOVER)), "heads_1")
    names = {f"heads.next.{one}.{part}": f"{short}_{one}" for one in "qkv" for part, short in
             (("weight", "w"), ("bias", "b"))}  # fmt: skip
    names |= {"heads.next.norm.weight": "n", "heads.next_head.weight": "w", "heads.next_head.bias": "b"}
    names |= {"heads.head_norm.weight": "m", "lm_head.weight": "matrix"}
    sheet = sheet_of(64, names)
    sheet.update(table=sheet["matrix"], unembedding=sheet["matrix"])
    shown = sheet.run(listings(clover_heads)[1])
    assert [expression(node) for node in shown] == renamed(function.output.args[0], names)


def test_the_docstring_of_eagle_heads_shows_what_it_does(tmp_path: Path) -> None:
    function = grafted(EagleHeads(write(tmp_path / "heads", replace(EAGLE, taps=(1, 2)))), "heads_0")
    names = {f"heads.layers.0.{one}_proj.weight": one for one in "qkv"}
    names |= {"heads.layers.0.embedding_norm.weight": "n", "heads.layers.0.input_norm.weight": "m"}
    names |= {"heads.fc.weight": "fc", "model.embed_tokens.weight": "table"}
    shown = sheet_of(192, names).run(listings(eagle_heads)[1])
    (feature,) = next(node for node in function.graph.nodes if node.target == "heads.fc.weight").users
    projected = first_call(function, "linear_rows")
    assert [expression(node) for node in shown] == renamed([feature, projected], names)


def test_a_tap_hands_out_streams_behind_the_hidden_states_and_changes_nothing_else(tmp_path: Path) -> None:
    program = program_of("llama").copy()
    before = [str(node) for node in program["forward"].output.args[0]]
    for name, taps in (("first", (1, 2)), ("second", (2, 3))):
        folder = write(tmp_path / name, replace(EAGLE, taps=taps))
        run_passes(program, [EagleHeads(folder, name)], facts={"canonical", "kv-cache"})  # refuses what is not lossless
    logits, hidden, kv = program["forward"].output.args[0]
    assert [str(logits), str(hidden.args[0][0]), str(kv)] == before
    streams = [find_trunk(program["forward"].graph).layers[layer][0].stream for layer in (1, 2)]
    streams.append(find_trunk(program["forward"].graph).exit)
    assert [part.args[0] for part in hidden.args[0][1:]] == streams
    assert program["first_0"].row_inputs[0].sizes[1] == 192 and program["second_0"].row_inputs[0].sizes[1] == 256


def test_streams_are_read_in_front_of_the_second_the_middle_and_the_last_layers_but_two(tmp_path: Path) -> None:
    program = program_of("llama", num_hidden_layers=8).copy()
    EagleHeads(write(tmp_path / "heads", replace(EAGLE, taps=None))).run(View(program, "eagle-heads"))
    layers = find_trunk(program["forward"].graph).layers
    handed_out = program["forward"].output.args[0][1].args[0][1:]
    assert [part.args[0] for part in handed_out] == [layers[layer][0].stream for layer in (2, 4, 5)]


def test_the_target_is_left_as_it_was(tmp_path: Path) -> None:
    program = program_of("llama").copy()
    before = str(program["forward"].graph)
    HydraHeads(write(tmp_path / "heads", HYDRA)).run(View(program, "hydra-heads"))
    assert str(program["forward"].graph) == before
    assert list(program.functions) == ["forward", "heads_0", "heads_1"]
    assert not call_nodes(program["heads_0"].graph, [torch.ops.graft.kv_append.default])


@pytest.mark.parametrize(
    ("change", "found"),
    [({"width": 32}, "width 32"), ({"vocabulary": 99}, "99 tokens"), ({"kind": "medusa"}, "kind medusa")],
    ids=["width", "vocabulary", "kind"],
)
def test_heads_for_another_model_are_refused(change: dict, found: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "heads", replace(HYDRA, **change))
    with pytest.raises(CheckpointError, match=rf"not for this model[^$]*width 64, 131 tokens[^$]*{found}"):
        grafted(HydraHeads(folder), "heads_0")


def test_a_draft_vocabulary_beyond_the_models_is_refused(tmp_path: Path) -> None:
    config = replace(HYDRA, vocabulary=10, reduced=True)
    tensors = random_tensors(config) | {"draft_vocabulary": torch.arange(10) * 100}
    with pytest.raises(CheckpointError, match="not for this model"):
        grafted(HydraHeads(write(tmp_path / "heads", config, tensors)), "heads_0")
