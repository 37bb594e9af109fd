"""Bars of tokens per second, by system and by category of prompt, from a record of benchmarks/speed.py.

The picture lies next to the record, as SVG. Whiskers are the quartiles over prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from rich.console import Console

from benchmarks.record import RESULTS

COLOURS = {
    "graft": "#7fa8d1",
    "graft speculative": "#1f4e79",
    "transformers": "#d9d9d9",
    "transformers prompt lookup": "#b3b3b3",
    "transformers compiled": "#8c8c8c",
    "llama.cpp": "#d8a25c",
}
OTHER = "#595959"
"""A system that has no colour of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", default="speed", help="name of the record under benchmarks/results")
    arguments = parser.parse_args()
    record = json.loads((RESULTS / f"{arguments.record}.json").read_text(encoding="utf-8"))
    path = RESULTS / f"{arguments.record}.svg"
    draw(record, path)
    Console(highlight=False).print(f"kept in benchmarks/results/{path.name}")


def draw(record: dict, path: Path) -> None:
    """One line of two charts for each dtype."""
    # The same record gives the same file, and text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "graft", "svg.fonttype": "none", "font.size": 9})
    results = record["results"]
    figure, axes = pyplot.subplots(
        len(results), 2, figsize=(12, 3.4 * len(results)), width_ratios=(2, 3), squeeze=False, layout="constrained"
    )
    for (left, right), (dtype, systems) in zip(axes, results.items(), strict=True):
        by_system(left, systems)
        by_category(right, systems)
        left.set_title(f"{dtype}, all prompts", loc="left")
        right.set_title(f"{dtype}, by category", loc="left")
    machine = record["machine"]
    figure.suptitle(
        f"decoded tokens per second, SmolLM2-135M-Instruct, batch 1, greedy, {record['new_tokens']} new tokens\n"
        f"{machine['processor']}, {machine['threads']} threads, {record['prompt_count']} prompts, {record['date']}",
        fontsize=10,
    )
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def by_system(axes: Axes, systems: dict[str, dict]) -> None:
    """One bar for each system, the first on top."""
    for place, (name, result) in enumerate(systems.items()):
        value, over = result["tokens_per_second"]["all"], result["spread_over_prompts"]["all"]
        axes.barh(place, value, color=COLOURS.get(name, OTHER), height=0.7)
        axes.plot([over["low"], over["high"]], [place, place], color="black", linewidth=0.8)
        axes.text(max(value, over["high"]), place, f"  {value:.0f}", va="center")
    axes.set_yticks(range(len(systems)), list(systems))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    bare(axes, "x")


def by_category(axes: Axes, systems: dict[str, dict]) -> None:
    """A group of bars for each category."""
    categories = [key for key in next(iter(systems.values()))["tokens_per_second"] if key != "all"]
    width = 0.8 / len(systems)
    for number, (name, result) in enumerate(systems.items()):
        places = [place + (number - (len(systems) - 1) / 2) * width for place in range(len(categories))]
        heights = [result["tokens_per_second"][category] for category in categories]
        axes.bar(places, heights, width, color=COLOURS.get(name, OTHER), label=name)
    axes.set_xticks(range(len(categories)), [category.replace("_", " ") for category in categories])
    axes.set_ylabel("tokens per second")
    axes.legend(frameon=False, fontsize=7, ncols=2)
    axes.margins(y=0.25)
    bare(axes, "y")


def bare(axes: Axes, values: str) -> None:
    """No frame; thin lines at the values."""
    axes.spines[["top", "right", "left" if values == "y" else "bottom"]].set_visible(False)
    axes.grid(axis=values, color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


if __name__ == "__main__":
    main()
