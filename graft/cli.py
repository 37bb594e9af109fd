"""The command line: look at a program, run a model, list what plans may name."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.progress import Progress

if TYPE_CHECKING:
    from graft.compiler.plan import Plan
    from graft.compiler.program import Program

FAILED, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
"""Exit codes: an error that graft explains, Ctrl-C, and a reader of the output that went away."""

EXAMPLES = """
examples:
  python -m graft inspect HuggingFaceTB/SmolLM2-135M --after kv-cache
  python -m graft inspect model/ --plan plan.toml --diff capture skip-ffn
  python -m graft inspect model/ --explain linear_3
  python -m graft inspect model/ --source
  python -m graft run model/ --prompt "The capital of France is" --max-new-tokens 32
  python -m graft quality model/ --spec "target=compress-kv{codec=affine}" --text book.txt
  python -m graft train-heads model/ --data prompts.jsonl book.txt --out heads/
  python -m graft train-routers model/ --data book.txt --out routers/ --top-k 2
  python -m graft passes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code. graft's own errors are printed without a traceback."""
    arguments = parser().parse_args(argv)
    from graft.compiler.errors import GraftError

    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except GraftError as error:
        print(f"graft: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("graft: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    return 0


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="graft",
        description="A compiler for LLM decoding.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    inspect = commands.add_parser("inspect", help="show the program that a model is compiled to")
    add_model(inspect)
    inspect.add_argument("--after", metavar="PASS", help='the program after this pass; "capture": as captured')
    inspect.add_argument("--function", metavar="NAME", help="this function only")
    inspect.add_argument("--full", action="store_true", help="print every layer, identical ones too")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    what = inspect.add_mutually_exclusive_group()
    what.add_argument("--diff", nargs=2, metavar=("BEFORE", "AFTER"), help="what changed between two passes")
    what.add_argument("--explain", metavar="NODE", help="everything known about one node or parameter")
    what.add_argument("--svg", metavar="FILE", help="draw the function (forward, or --function)")
    what.add_argument("--source", action="store_true", help="the generated code of the function")
    what.add_argument("--report", action="store_true", help="what each pass did, and the predicted cost of a step")
    what.add_argument("--losses", metavar="FILE", help="the report, what compress-kv loses added up from FILE")
    inspect.set_defaults(command=inspect_command)

    run = commands.add_parser("run", help="generate text")
    add_model(run)
    run.add_argument("--prompt", required=True, metavar="TEXT", help='the prompt; "-": read standard input')
    run.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most this many (%(default)s)")
    run.add_argument("--chat", action="store_true", help="wrap the prompt in the tokenizer's chat template")
    run.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token (default)")
    run.add_argument("--seed", type=int, metavar="N", help="seed for sampling")
    run.add_argument("--stats", action="store_true", help="print the report when done, on standard error")
    run.set_defaults(command=run_command)

    quality = commands.add_parser("quality", help="measure what compressing the KV cache costs")
    add_quality(quality)
    quality.set_defaults(command=quality_command)

    train = commands.add_parser("train-heads", help="train draft heads, an adapter, an exit classifier or a judge")
    add_training(train)
    train.set_defaults(command=train_command)

    export = commands.add_parser("export-heads", help="write trained Medusa heads as vLLM reads them")
    export.add_argument("heads", metavar="HEADS", help="the folder of the heads")
    export.add_argument("--model", required=True, help="the model that they draft for: a folder, or a name on the hub")
    export.add_argument("--out", required=True, metavar="FOLDER", help="where to write them")
    export.add_argument("--quiet", action="store_true", help="show no progress")
    export.set_defaults(command=export_command, gguf=None)

    routers = commands.add_parser("train-routers", help="train routers that run feed-forwards in part")
    add_routers(routers)
    routers.set_defaults(command=routers_command)

    passes = commands.add_parser("passes", help="list passes, drafters and all else that a plan may name")
    passes.add_argument("--use", action="append", default=[], metavar="FILE", help="a Python file that defines more")
    passes.add_argument("--json", action="store_true", help="print JSON")
    passes.set_defaults(command=passes_command)
    return top


def add_model(command: argparse.ArgumentParser) -> None:
    """Options that say which model, and what to do to it."""
    command.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hugging Face hub")
    plan = command.add_mutually_exclusive_group()
    plan.add_argument("--plan", metavar="FILE", help="a plan in TOML")
    plan.add_argument("--spec", metavar="TEXT", help="a plan in one line, such as 'target=drop-block{index=3}'")
    command.add_argument("--use", action="append", default=[], metavar="FILE", help="a Python file that defines passes")
    command.add_argument("--gguf", metavar="FILE", help="a GGUF file in MODEL")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; auto: as stored (default)")
    command.add_argument("--quiet", action="store_true", help="show no progress")


def add_training(command: argparse.ArgumentParser) -> None:
    """Options of `train-heads`; those of `TrainOptions` have its defaults."""
    command.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hugging Face hub")
    command.add_argument("--out", required=True, metavar="FOLDER", help="for the heads; a run goes on there")
    what = 'text, or ".jsonl" with a "prompt" or "turns" in each line, which the model continues'
    command.add_argument("--data", required=True, nargs="+", metavar="FILE", help=what)
    kinds = ("hydra", "medusa", "kangaroo", "acceptance", "exit-classifier", "judge")
    command.add_argument("--kind", choices=kinds, default="hydra", help="what to train (%(default)s)")
    command.add_argument("--prefix", action="store_true", help="Hydra++: a decoder layer in front of the heads")
    command.add_argument("--unembedding", choices=("target", "shared"), default="target", help="(%(default)s)")
    counts = ("heads", "layers", "layer", "vocabulary", "length", "new-tokens", "ahead", "epochs", "batch",
              "patience", "seed")  # fmt: skip
    for name, kind in (*((name, int) for name in counts), ("rate", float)):
        command.add_argument(f"--{name}", type=kind, metavar="N", help="see graft.TrainOptions")
    command.add_argument("--gguf", metavar="FILE", help="a GGUF file in MODEL")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; auto: as stored (default)")
    command.add_argument("--device", help="where the model runs and heads are trained; a GPU where there is one")
    command.add_argument("--quiet", action="store_true", help="show no progress")


def add_routers(command: argparse.ArgumentParser) -> None:
    """Options of `train-routers`; those of `RouterOptions` have its defaults."""
    command.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hugging Face hub")
    command.add_argument("--out", required=True, metavar="FOLDER", help="for the routers")
    what = 'text, or ".jsonl" with a "prompt" or "turns" in each line'
    command.add_argument("--data", required=True, nargs="+", metavar="FILE", help=what)
    command.add_argument("--length", type=int, default=256, metavar="N", help="tokens of a text (%(default)s)")
    choice = command.add_mutually_exclusive_group()
    choice.add_argument("--top-k", type=int, metavar="N", help="blocks that a token runs (2)")
    choice.add_argument("--prefixes", metavar="N,N", help="numbers of first blocks to choose from")
    command.add_argument("--layers", metavar="N,N", help="feed-forwards, counted from 0; all, where left out")
    for name, kind in (("blocks", int), ("share", float), ("epochs", int), ("rate", float), ("seed", int)):
        command.add_argument(f"--{name}", type=kind, metavar="N", help="see graft.RouterOptions")
    command.add_argument("--gguf", metavar="FILE", help="a GGUF file in MODEL")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; auto: as stored (default)")
    command.add_argument("--quiet", action="store_true", help="show no progress")


def routers_command(arguments: argparse.Namespace) -> None:
    """`train-routers`: train, and print the figures."""
    from graft.compiler.errors import PlanError
    from graft.training import RouterOptions, train_routers
    from graft.training.features import pieces, read_texts

    names = ("blocks", "share", "epochs", "rate", "seed", "top_k")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for name in ("prefixes", "layers"):
        if (text := getattr(arguments, name)) is not None:
            try:
                given[name] = tuple(int(word) for word in text.split(","))
            except ValueError as error:
                raise PlanError(f"--{name} takes numbers", expected="such as 0,1,4", found=text) from error
    if "prefixes" in given:
        given["top_k"] = None
    with Progress(quiet=arguments.quiet) as progress:
        progress(f"loading {arguments.model}")
        texts = read_texts(arguments.data, load("AutoTokenizer", arguments))
        model = load("AutoModelForCausalLM", arguments, dtype=arguments.dtype).eval()
        cut = [one for text in (*texts.documents, *texts.prompts) for one in pieces(text, arguments.length)]
        figures = train_routers(model, cut, arguments.out, RouterOptions(**given), progress=progress)
    print(json.dumps(figures, indent=2))


def add_quality(command: argparse.ArgumentParser) -> None:
    """Options of `quality`; those of `graft.quality.Options` have its defaults."""
    command.add_argument("model", metavar="MODEL", help="a folder, or a name on the Hugging Face hub")
    what = "of an arm, in %s; may be given several times"
    command.add_argument("--plan", action="append", default=[], metavar="FILE", help=what % "TOML")
    command.add_argument("--spec", action="append", default=[], metavar="TEXT", help=what % "one line")
    command.add_argument("--text", nargs="+", default=[], metavar="FILE", help="held text (Python's documentation)")
    command.add_argument("--documents", type=int, default=4, metavar="N", help="pieces of it (%(default)s)")
    for name, help_text in (("context", "in front of what is compared"), ("tokens", "compared"),
                            ("streamed", "of a text compressed on the way"), ("passkey-context", "of a passkey"),
                            ("streamed-texts", ""), ("passkeys", ""), ("resamples", ""), ("seed", "")):  # fmt: skip
        command.add_argument(f"--{name}", type=int, metavar="N", help=help_text and f"tokens {help_text}")
    command.add_argument("--references", choices=("all", "continuation", "none"), help="see graft.quality.Options")
    command.add_argument("--json", metavar="FILE", help='write all figures; "-": print them in place of the table')
    command.add_argument("--parts", action="store_true", help="measure the mechanisms of the plans, each alone")
    command.add_argument("--save", metavar="FILE", help="put every KL to those in FILE, which inspect --losses adds up")
    command.add_argument("--use", action="append", default=[], metavar="FILE", help="a Python file that defines passes")
    command.add_argument("--gguf", metavar="FILE", help="a GGUF file in MODEL")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; auto: as stored (default)")
    command.add_argument("--backend", default="auto", help="as in graft.compile (%(default)s)")
    command.add_argument("--quiet", action="store_true", help="show no progress")


def quality_command(arguments: argparse.Namespace) -> None:
    """`quality`: measure, and print a table or figures."""
    from graft.quality.command import run

    run(arguments)


def train_command(arguments: argparse.Namespace) -> None:
    """`train-heads`: train, and print the figures."""
    import torch

    from graft.compiling import compile as compile_
    from graft.training import TrainOptions, train_heads
    from graft.training.features import read_texts

    given = {name: getattr(arguments, name) for name in TrainOptions.__dataclass_fields__ if hasattr(arguments, name)}
    options = TrainOptions(**{name: value for name, value in given.items() if value is not None})
    with Progress(quiet=arguments.quiet) as progress:
        progress(f"loading {arguments.model}")
        texts = read_texts(arguments.data, load("AutoTokenizer", arguments))
        model = load("AutoModelForCausalLM", arguments, dtype=arguments.dtype).eval()
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        fast = compile_(model.to(device), progress=progress)
        figures = train_heads(fast, texts, arguments.out, options, name=arguments.model, say=progress, bar=progress)
    print(json.dumps(figures, indent=2))


def export_command(arguments: argparse.Namespace) -> None:
    """`export-heads`: write heads in another layout."""
    from graft.training import export_heads

    with Progress(quiet=arguments.quiet) as progress:
        progress(f"loading {arguments.model}")
        model = load("AutoModelForCausalLM", arguments, dtype="auto")
        print(export_heads(arguments.heads, arguments.out, model))


def inspect_command(arguments: argparse.Namespace) -> None:
    """`inspect`: print one view of the compiled program."""
    with Progress(quiet=arguments.quiet) as progress:
        progress("starting torch and transformers")
        fast = compile_model(arguments, progress)
    print(view(arguments, fast))


def view(arguments: argparse.Namespace, fast: Any) -> str:
    """What `inspect` prints."""
    from graft.compiler.diff import snapshot
    from graft.compiler.listing import list_function, list_program

    program: Program = fast.program
    if arguments.report:
        return str(fast.report())
    if arguments.losses:
        from graft.quality import Losses

        return str(fast.report(Losses.load(arguments.losses)))
    if arguments.source:
        return str(program[arguments.function or "forward"].source)
    found: Any
    if arguments.diff:
        found = program.diff(*arguments.diff)
    elif arguments.explain:
        found = program.explain(arguments.explain, arguments.function)
    else:
        shown = snapshot(program, arguments.after) if arguments.after else program
        found = shown[arguments.function] if arguments.function else shown
        if arguments.svg:
            drawing = shown[arguments.function or "forward"].draw(full=arguments.full)
            return f"wrote {drawing.save(arguments.svg)}" + (f"; {drawing.note}" if drawing.note else "")
        if not arguments.json and arguments.function:
            return list_function(found, full=arguments.full)
        if not arguments.json:
            return list_program(found, full=arguments.full)
    return json.dumps(found.to_json(), indent=2) if arguments.json else str(found)


def run_command(arguments: argparse.Namespace) -> None:
    """`run`: generate, the text appearing as it is made."""
    from graft.compiler.errors import GraftError

    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    with Progress(quiet=arguments.quiet) as progress:
        progress("starting torch and transformers")
        tokenizer = load("AutoTokenizer", arguments)
        fast = compile_model(arguments, progress)
    if arguments.chat and not tokenizer.chat_template:
        raise GraftError("the model's tokenizer has no chat template", where=arguments.model, remedy="leave out --chat")
    if arguments.chat:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    from transformers import TextStreamer

    options: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        options = {"do_sample": True, "temperature": arguments.temperature}
        options |= {"seed": arguments.seed} if arguments.seed is not None else {}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    fast.generate(**inputs, max_new_tokens=arguments.max_new_tokens, streamer=streamer, **options)
    if arguments.stats:
        print(f"\n{fast.report()}", file=sys.stderr)


def passes_command(arguments: argparse.Namespace) -> None:
    """`passes`: what a plan may name, with options and one line of documentation."""
    from graft.components import describe, describe_text

    found = describe(arguments.use)
    print(json.dumps(found, indent=2) if arguments.json else describe_text(found))


def compile_model(arguments: argparse.Namespace, progress: Progress) -> Any:
    """Load the model and compile it by the plan that the options name; a CompiledModel."""
    from graft.compiling import compile as compile_

    plan = read_plan(arguments)
    progress(f"loading {arguments.model}")
    if not Path(arguments.model).is_dir():
        progress.clear()  # a download shows bars of its own
    model = load("AutoModelForCausalLM", arguments, dtype=arguments.dtype).eval()
    return compile_(model, plan, progress=progress)


def read_plan(arguments: argparse.Namespace) -> Plan | None:
    """The plan of --plan or --spec; None where neither is given."""
    from graft.compiler.plan import Plan
    from graft.compiler.registry import load_file

    for path in arguments.use:
        load_file(path)
    if arguments.plan:
        return Plan.from_toml(Path(arguments.plan))
    return Plan.from_spec(arguments.spec) if arguments.spec else None


def load(kind: str, arguments: argparse.Namespace, **options: Any) -> Any:
    """`transformers.<kind>.from_pretrained` on the model; what it raises becomes one of graft's errors."""
    import transformers

    from graft.compiler.errors import GraftError

    if arguments.gguf:
        options["gguf_file"] = arguments.gguf
    logging = transformers.utils.logging
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would write over ours
    try:
        return getattr(transformers, kind).from_pretrained(arguments.model, **options)
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise GraftError(
            f"transformers cannot load {arguments.model}",
            expected="a folder with a causal language model, or its name on the hub",
            found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            where=f"{kind}.from_pretrained",
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
