"""The report's text."""

from __future__ import annotations

from graft.codegen.skips import SkipCount
from graft.compiled import lossy_note
from graft.compiler.plan import Plan
from graft.compiler.program import PassRecord
from graft.report import render_report
from graft.runtime.verifiers import LossyTypical, SampleAndMatch
from tests.programs import program_of

RECORDS = [
    PassRecord("kv-cache", "exact", 3, 0.0123, 150, 161, 10_000, 10_000, "logits differ by 2e-07 at most"),
    PassRecord("drop-block{index=1}", "approximate", 1, 0.004, 161, 150, 10_000, 9_000, "KL 0.03 nats", ("one note",)),
]


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(f"{name} "))


def test_every_pass_has_a_row_with_contract_matches_sizes_time_and_check() -> None:
    text = render_report(RECORDS)
    found = " ".join(row(text, "kv-cache").split())
    assert found == "kv-cache exact 3 150 -> 161 10 kB 12 logits differ by 2e-07 at most"
    assert "10 kB -> 9 kB" in row(text, "drop-block{index=1}") and "KL 0.03 nats" in text and "one note" in text
    assert "16" in row(text, "all").split()


def test_the_predicted_cost_of_a_step_is_given_for_one_row_and_for_more() -> None:
    text = render_report([], function=program_of("llama")["forward"])
    one, eight = (row(text, str(rows)).split() for rows in (1, 8))
    # weights and KV of one sequence, in kB: the rows of a step share both, but for what they gather and write
    assert (one[3:5], eight[3:5]) == (["404", "kB"], ["406", "kB"])
    assert (one[5:7], eight[5:7]) == (["787", "kB"], ["793", "kB"])


def test_measured_numbers_carry_their_units_and_rates_are_derived() -> None:
    stats = {
        "new_tokens": 100,
        "steps": 40,
        "tokens_per_step": 2.475,
        "drafted": 200,
        "accepted": 60,
        "prefill_seconds": 0.0501,
        "decode_seconds": 2.0,
        "new_tokens_per_request": [100],
    }
    text = render_report([], stats)
    assert row(text, "tokens per second").split()[-1] == "50.00"
    assert row(text, "acceptance").split()[-1] == "30.0%"
    assert row(text, "prefill").split()[-2:] == ["50.1", "ms"]
    assert row(text, "decode").split()[-2:] == ["2.000", "s"]
    assert "per request" not in text


def test_skipping_is_told_by_function_with_shares_of_rows_and_of_whole_regions() -> None:
    guards = (SkipCount("not all gt", 2, 3000, 10, 5, 40, 30), SkipCount("some gt", 1, 1000, 10, 0, 40, 4))
    text = render_report([], skips={"forward": guards, "plain": (), "unused": (SkipCount("a", 1, 1, 0, 0, 0, 0),)})
    shown = " ".join(row(text, "forward").split())
    assert shown == "forward 3 10 53.3% 33.3% 2.5 kB of 4 kB"  # (2 * 30 + 4) / (3 * 40), 2 * 5 / (3 * 10)
    assert "plain" not in text and "unused" not in text


def test_drafters_are_listed_with_what_each_contributed() -> None:
    drafters = {"lookup": {"drafted": 12, "accepted": 5}, "recycle": {"drafted": 30, "draft_seconds": 0.002}}
    text = render_report([], {"new_tokens": 1, "drafters": drafters})
    assert row(text, "lookup").split() == ["lookup", "12", "5"]
    assert row(text, "recycle").split() == ["recycle", "30", "2.0", "ms"]


def test_the_report_keeps_to_its_width() -> None:
    text = render_report([RECORDS[0], PassRecord("x" * 80, "exact", 1, 1.0, 1, 1, 1, 1, "y" * 300)], width=90)
    assert max(map(len, text.splitlines())) <= 90


def test_square_brackets_in_a_note_are_text() -> None:
    record = PassRecord("a", "exact", 1, 1.0, 1, 1, 1, 1, "on [bold] rows [N]")
    assert "on [bold] rows [N]" in render_report([record])


def test_a_lossy_acceptance_rule_heads_the_report() -> None:
    assert lossy_note(Plan(verifier=LossyTypical())).startswith("LOSSY: verifier lossy-typical")
    assert lossy_note(Plan()) == lossy_note(Plan(verifier=SampleAndMatch())) == ""
