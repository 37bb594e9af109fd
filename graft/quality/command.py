"""`python -m graft quality`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from graft.cli import load
from graft.compiler.errors import GraftError, PlanError
from graft.compiler.plan import Plan
from graft.compiler.registry import load_file
from graft.compiler.spec import show
from graft.progress import Progress
from graft.quality.arms import split
from graft.quality.losses import Losses, parts
from graft.quality.measuring import Options, measure
from graft.quality.texts import own_documents, read_documents


def run(arguments: argparse.Namespace) -> None:
    """Measure the plans that the options name, and print what came out."""
    given = {one.name: getattr(arguments, one.name, None) for one in fields(Options)}
    options = Options(**{name: value for name, value in given.items() if value is not None})
    if arguments.documents < 1:
        raise PlanError("no document to measure on", expected="--documents of 1 or more", found=arguments.documents)
    with Progress(quiet=arguments.quiet) as progress:
        progress("starting torch and transformers")
        plans = read_plans(arguments)
        tokenizer = load("AutoTokenizer", arguments)
        how = (tokenizer, options.length, arguments.documents)
        texts = read_documents(arguments.text, *how) if arguments.text else own_documents(*how)
        progress(f"loading {arguments.model}")
        model = load("AutoModelForCausalLM", arguments, dtype=arguments.dtype).eval()
        kept = Losses.load(arguments.save, model) if arguments.save and Path(arguments.save).exists() else None
        found = measure(
            model, plans, texts.ids, options, tokenizer=tokenizer, backend=arguments.backend, progress=progress
        )
    about = {"model": arguments.model, "dtype": str(model.dtype).removeprefix("torch."), "text": texts.source,
             "text_sha256": texts.digest, "documents": arguments.documents, **asdict(options)}  # fmt: skip
    figures = json.dumps({**about, "arms": found.to_json()}, indent=1)
    if arguments.json and arguments.json != "-":
        write(Path(arguments.json), figures)
    print(figures if arguments.json == "-" else found)
    if arguments.save:
        sizes = {"context": options.context, "tokens": options.tokens, "documents": arguments.documents}
        of_text = {"text": texts.source, "text_sha256": texts.digest, **sizes}
        losses = Losses.of(found, next(iter(plans.values())), model, of_text)
        losses = losses if kept is None else losses.beside(kept)
        losses.save(arguments.save)
        if arguments.json != "-":
            print(*added_up(losses, plans), sep="\n")


def added_up(losses: Losses, plans: dict[str, Plan]) -> Iterator[str]:
    """A line for each plan whose loss those of its mechanisms can be added up to."""
    for name, plan in plans.items():
        one = losses.estimate(plan)
        if len(one.parts) > 1 and one.total is not None and one.measured is not None:
            yield f"{name}: KL {one.measured.mean:.3g}, that of its mechanisms together {one.total.mean:.3g}"


def read_plans(arguments: argparse.Namespace) -> dict[str, Plan]:
    """The plans by name: a file's name, or the compression of a line."""
    for path in arguments.use:
        load_file(path)
    plans: dict[str, Any] = {}
    for path in map(Path, arguments.plan):
        plans[path.stem] = Plan.from_toml(path)
    for text in arguments.spec:
        plan = Plan.from_spec(text)
        split(plan)
        plans[text.removeprefix("target=")] = plan
    if len(plans) < len(arguments.plan) + len(arguments.spec) or not plans:
        names = ", ".join(plans) or "none"
        raise PlanError("plans to measure", expected="one or more, of different names", found=names,
                        remedy="--plan FILE, or --spec TEXT")  # fmt: skip
    return mechanisms(plans.values()) if arguments.parts else plans


def mechanisms(plans: Iterable[Plan]) -> dict[str, Plan]:
    """What the plans' compressions are made of, each alone, beside the plan's other passes."""
    apart = [split(plan) for plan in plans]
    return {show(part): replace(rest, target=(*rest.target, part)) for rest, change in apart for part in parts(change)}


def write(path: Path, text: str) -> None:
    """The figures as a file. Raises GraftError where that cannot be written."""
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise GraftError("the figures cannot be written", found=error.strerror, where=path) from error
