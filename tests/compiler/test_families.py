"""Every family: captured, its blocks found, and its logits right on every path; or refused with the reason.

The table in docs/families.md is made from the same measurements, with GRAFT_UPDATE_DOCS=1 in the environment.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graft.compiler.capture import capture
from graft.compiler.errors import CaptureError, CheckError
from graft.compiler.nodes import call_nodes
from graft.compiler.ops import NO_PARENT
from graft.compiler.trunk import Trunk, find_trunk, module_layer
from tests.compiler.programs import Decoder, dense_logits, dense_program, flat_program
from tests.families import (
    CAPTURED,
    FAMILIES,
    REFUSED,
    REFUSED_ROPES,
    ROPE_TYPES,
    ROPE_VARIANTS,
    VOCABULARY,
    WINDOW,
    build,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
LENGTH = 17
"""Tokens of the longer sequence: far beyond the sliding window."""
LIMIT = 1e-5
"""Largest difference of a float32 logit from eager."""

PARALLEL = {"cohere", "cohere2", "gpt_neox", "phi", "stablelm_parallel"}
ATTENTION_TWICE = {"diffllama"}
"""Families with two attention operators in one layer."""


@dataclass(frozen=True)
class Report:
    """What was measured on one family."""

    blocks: str = ""
    windows: tuple[int, ...] = ()
    """Window of each attention node."""
    dense: float = 0.0
    """Largest logit difference from eager, on a dense batch."""
    flat: float = 0.0
    """The same, over ragged rows, single tokens, chunks and a tree."""
    trunk: Trunk | None = None
    refusal: str = ""


@cache
def report(name: str) -> Report:
    """Capture one family, run it every way, and compare with eager."""
    model = build(name)
    try:
        dense = dense_program(model)
        flat = flat_program(dense)
    except (CaptureError, CheckError) as error:
        return Report(refusal=str(error))
    tokens = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    trunk = find_trunk(dense["forward"].graph)
    attention = call_nodes(dense["forward"].graph, [torch.ops.graft.attention.default])
    return Report(
        block_summary(trunk),
        tuple(node.args[4] if len(node.args) > 4 else 0 for node in attention),
        gap(dense_logits(dense, tokens), expected),
        max(decode_errors(Decoder(flat), model, tokens, expected)),
        trunk,
    )


def gap(found: Tensor, expected: Tensor) -> float:
    """The largest absolute difference."""
    return float((found - expected).abs().max())


def decode_errors(decoder: Decoder, model: nn.Module, tokens: Tensor, expected: Tensor) -> list[float]:
    """Errors of: ragged rows in shuffled slots, a chunk of prefill beside a single token, single tokens, a tree."""
    long, short = tokens.tolist()
    first, second = decoder.step([(2, long[:9]), (0, short[:4])])
    errors = [gap(first, expected[0, :9]), gap(second, expected[1, :4])]
    chunk, one = decoder.step([(2, long[9:16]), (0, short[4:5])])
    errors += [gap(chunk, expected[0, 9:16]), gap(one, expected[1, 4:5])]
    for index in range(5, 9):
        errors.append(gap(decoder.step([(0, short[index : index + 1])])[0], expected[1, index : index + 1]))
    tree, parents, paths = [long[16], 7, 8, 9], [NO_PARENT, 0, 0, 2], [[0], [0, 1], [0, 2], [0, 2, 3]]
    (found,) = decoder.step([(2, tree)], parents)
    with torch.no_grad():
        for row, path in enumerate(paths):
            sequence = torch.tensor([long[:16] + [tree[node] for node in path]])
            errors.append(gap(found[row], model(input_ids=sequence, use_cache=False).logits[0, -1]))
    return errors


def block_summary(trunk: Trunk) -> str:
    """The layers' blocks, e.g. "3 x (attention, feed-forward)"."""
    layers = {tuple(block.kind for block in layer) for layer in trunk.layers}
    return " or ".join(f"{len(trunk.layers)} x ({', '.join(kinds)})" for kinds in sorted(layers))


@pytest.mark.parametrize("name", CAPTURED)
def test_a_family_decodes_what_eager_computes(name: str) -> None:
    found = report(name)
    assert not found.refusal
    assert found.dense <= LIMIT
    assert found.flat <= LIMIT


@pytest.mark.parametrize("name", CAPTURED)
def test_the_trunk_agrees_with_the_modules_that_made_it(name: str) -> None:
    trunk = report(name).trunk
    assert trunk is not None
    assert [block.kind for block in trunk.blocks] == (
        ["parallel"] * 3 if name in PARALLEL else ["attention", "feed-forward"] * 3
    )
    assert len(trunk.attention) == len(trunk.feed_forward) == 3
    for block in [*trunk.blocks, *(part for parallel in trunk.blocks for part in parallel.parts)]:
        made_by = {module_layer(node) for node in (*block.terms, *block.attention)}
        assert made_by == {block.layer}
        assert len(block.attention) == (block.kind != "feed-forward") * (2 if name in ATTENTION_TWICE else 1)


@pytest.mark.parametrize("name", CAPTURED)
def test_the_window_is_what_the_mask_function_was_asked_for(name: str) -> None:
    config = build(name).config
    windows = report(name).windows
    types = getattr(config, "layer_types", None)
    if types:
        expected = [WINDOW if kind == "sliding_attention" else 0 for kind in types]
    else:
        expected = [getattr(config, "sliding_window", None) or 0] * 3
    assert windows == tuple(window for window in expected for _ in range(2 if name in ATTENTION_TWICE else 1))


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_not_supported_is_refused_with_the_reason(name: str) -> None:
    assert REFUSED[name] in report(name).refusal


@pytest.mark.parametrize(
    "name", ["bloom", "codegen", "doge", "gptj", "llama4_text", "longcat_flash", "jetmoe", "lfm2", "minimax"]
)
def test_a_refusal_names_the_module_or_the_line(name: str) -> None:
    where = next(line for line in report(name).refusal.splitlines() if line.startswith("  where: "))
    assert f"modeling_{name.removesuffix('_text')}.py" in where or "layers." in where


def test_a_recurrent_model_is_refused_before_it_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("traced"))
    with pytest.raises(CaptureError, match="recurrent state"):
        capture(build("qwen3_next"))


def table() -> str:
    """The page's table."""
    lines = ["| family | captured | blocks | logits error | rope types | window | reason |", "|" + "---|" * 7]
    for name in sorted(FAMILIES):
        cells = [name, *(refused_cells(name) if report(name).refusal else captured_cells(name))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def captured_cells(name: str) -> list[str]:
    """Numbers are given as bounds, so that the table is the same on every machine."""
    found, kinds = report(name), ROPE_VARIANTS.get(name)
    error = max(found.dense, found.flat)
    bound = f"≤ {LIMIT:.0e}" if error <= LIMIT else f"{error:.0e}"
    window = "none" if not any(found.windows) else "every layer" if all(found.windows) else "some layers"
    right = ", ".join(kind for kind in kinds or () if (name, kind) not in REFUSED_ROPES)
    refused = ", ".join(kind for kind in kinds or () if (name, kind) in REFUSED_ROPES)
    ropes = "no rope" if kinds is None else "all" if kinds == ROPE_TYPES else right or "its own"
    if refused:
        ropes += f"; {refused} is refused"
    return ["yes", found.blocks, bound, ropes, window, ""]


def refused_cells(name: str) -> list[str]:
    """The first line of the refusal, and what was found."""
    first, *lines = report(name).refusal.splitlines()
    parts = dict(line.strip().split(": ", 1) for line in lines)
    found = re.sub(r"^(\w+): .*", r"\1", parts.get("found", "none"))  # torch's own words change with its version
    return ["no", "", "", "", "", first if found == "none" else f"{first} ({found})"]


def test_the_table_of_families_in_the_docs_is_current() -> None:
    begin, end = "<!-- table -->\n", "\n<!-- end of table -->"
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(begin)
    _, after = rest.split(end)
    current = before + begin + table() + end + after
    if os.environ.get("GRAFT_UPDATE_DOCS") == "1":
        PAGE.write_text(current, encoding="utf-8")
        page = current
    assert page == current, "docs/families.md is stale: run GRAFT_UPDATE_DOCS=1 pytest tests/compiler/test_families.py"
