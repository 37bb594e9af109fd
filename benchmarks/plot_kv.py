"""Pictures of a record of benchmarks/kv.py: KL against bytes, and the time of a step against context."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from rich.console import Console

from benchmarks.plot import bare
from benchmarks.record import RESULTS

REFERENCES = {"recency": ("#8c8c8c", "recency alone"), "random": ("#d9d9d9", "chance")}
"""Kind of arm -> colour and label of the line through all that were measured."""
COLOURS = {"codec": "#1f4e79", "eviction": "#d8a25c", "selection": "#5b8c5a", "several": "#8c3b5e"}
OF = {"eviction": "eviction=", "selection": "selection=", "codec": "codec="}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", default="kv", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    record = json.loads((RESULTS / f"{arguments.record}.json").read_text(encoding="utf-8"))
    # The same record gives the same file, and text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "graft", "svg.fonttype": "none", "font.size": 9})
    for part, draw in (("quality", draw_quality), ("times", draw_times)):
        if part in record:
            path = RESULTS / f"{arguments.record}-{'time' if part == 'times' else part}.svg"
            draw(record, path)
            Console(highlight=False).print(f"kept in benchmarks/results/{path.name}")


def draw_quality(record: dict, path: Path) -> None:
    """KL against what is allocated, and against what a step reads."""
    quality = record["quality"]
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.6), sharey=True, layout="constrained")
    for one, key, label in zip(axes, ("allocated", "read_by_a_step"), ("allocated", "read by a step"), strict=True):
        scatter(one, quality["arms"], key)
        one.set_xlabel(f"bytes {label}, share of the full cache's")
    axes[0].set_ylabel("KL(full || arm), nats per token")
    axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    machine, text = record["machine"], record["text"]
    figure.suptitle(
        f"SmolLM2-135M-Instruct, {quality['dtype']}: {text['documents']} x {quality['tokens']} tokens behind "
        f"{quality['context']}; whiskers are 95% intervals\n{text['source']}; {machine['processor']}, {record['date']}",
        fontsize=10,
    )
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def scatter(axes: Axes, arms: dict[str, dict], key: str) -> None:
    """One point for each arm; references as lines."""
    full = arms["full"]["bytes"][key]
    for kind, (colour, label) in REFERENCES.items():
        points = sorted((one["bytes"][key] / full, one["kl"]["mean"]) for one in arms.values() if one["kind"] == kind)
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=".", linewidth=1, label=label)
    seen: set[str] = set()
    for name, one in arms.items():
        if one["kind"] in ("full", *REFERENCES):
            continue
        group = family(one["spec"])
        place, kl = one["bytes"][key] / full, one["kl"]
        low, high = max(kl["mean"] - kl["low"], 0.0), max(kl["high"] - kl["mean"], 0.0)
        axes.errorbar(place, kl["mean"], [[low], [high]], color=COLOURS[group], marker="o", markersize=4, linewidth=0.8,
                      label=None if group in seen else group)  # fmt: skip
        seen.add(group)
        axes.annotate(f" {name}", (place, kl["mean"]), fontsize=6.5, va="bottom", color=COLOURS[group])
    axes.set_yscale("log")
    axes.margins(x=0.12)
    bare(axes, "y")


def family(spec: str) -> str:
    """Which of codec, eviction and selection an arm has."""
    found = [
        name for name, mark in OF.items() if mark in spec and not (name == "codec" and "codec=dense-pages" in spec)
    ]
    return found[0] if len(found) == 1 else "several"


def draw_times(record: dict, path: Path) -> None:
    """A line for each arm; whiskers are quartiles."""
    times = record["times"]
    contexts = sorted(times["contexts"], key=int)
    figure, axes = pyplot.subplots(figsize=(7.5, 4.6), layout="constrained")
    for name in times["contexts"][contexts[0]]:
        figures = [times["contexts"][context][name]["us"] for context in contexts]
        middle = [one["median"] / 1e3 for one in figures]
        below = [(one["median"] - one["low"]) / 1e3 for one in figures]
        above = [(one["high"] - one["median"]) / 1e3 for one in figures]
        colour = "black" if name == "full" else None
        axes.errorbar(
            [int(context) for context in contexts],
            middle,
            [below, above],
            marker="o",
            markersize=4,
            label=name,
            color=colour,
        )
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms, a step of one row")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    machine = record["machine"]
    figure.suptitle(
        f"SmolLM2-135M-Instruct, {times['dtype']}, {times['backend']}\n"
        f"{machine['processor']}, {machine['threads']} threads, {record['date']}",
        fontsize=10,
    )
    bare(axes, "y")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
