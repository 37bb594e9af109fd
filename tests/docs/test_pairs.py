"""The table of drafts and acceptance rules in docs/how-it-works.md is what the classes say."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from graft.compiler.acceptance import is_lossless, is_lossy
from graft.compiler.drafting import DraftKind, Verifier
from graft.compiler.passing import spec_name
from graft.runtime.rejection import KSeq, RecursiveRejection
from graft.runtime.verifiers import GreedyWalk, Leviathan, LossyJudge, LossyTypical, SampleAndMatch

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "how-it-works.md"
RULES: tuple[type[Verifier], ...] = (
    GreedyWalk, SampleAndMatch, Leviathan, RecursiveRejection, KSeq, LossyTypical, LossyJudge,
)  # fmt: skip


def cell(rule: type[Verifier], kind: DraftKind) -> str:
    """In which mode the rule is lossless for drafts of that kind, and whether in chains alone."""
    found = []
    for mode, sampling in (("greedy", False), ("sampling", True)):
        if is_lossless(rule, kind, branches=True, sampling=sampling):
            found.append(mode)
        elif is_lossless(rule, kind, branches=False, sampling=sampling):
            found.append(f"{mode}, chains")
    return "; ".join(found) or ("lossy" if is_lossy(rule) else "–")


def table() -> str:
    """The table, as Markdown."""
    kinds = get_args(DraftKind)
    lines = ["| verifier | " + " | ".join(kinds) + " |", "|---|" + "---|" * len(kinds)]
    for rule in RULES:
        lines.append(f"| `{spec_name(rule.__name__)}` | " + " | ".join(cell(rule, kind) for kind in kinds) + " |")
    return "\n".join(lines)


def test_the_table_of_legal_pairs_is_what_the_classes_say() -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8")


def test_the_table_holds_every_rule_there_is() -> None:
    own = {cls for base in (Verifier, *Verifier.__subclasses__()) for cls in base.__subclasses__()}
    there = {cls for cls in own if cls.__module__.startswith("graft.") and not cls.__abstractmethods__}
    assert there == set(RULES)
