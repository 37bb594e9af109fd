"""train_heads(): features, a loop over shards that can be interrupted and resumed, and the folder that comes out."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from graft.compiled import CompiledModel
from graft.compiler.errors import CheckpointError
from graft.passes.heads.dialects import CONFIG
from graft.training.exits import Exit, TrainedAcceptance, TrainedAdapter, TrainedClassifier
from graft.training.features import Sample, Shards, Texts, compute, replace_text, sequences
from graft.training.lines import TrainedJudge, places
from graft.training.options import TrainOptions
from graft.training.steps import Figures, batches
from graft.training.trainees import TrainedHeads, Trainee

Say = Callable[[str], None]
Bar = Callable[[str, float], None]
"""Called with what is being trained, and the part of all epochs that is done, 0 to 1."""
WORK = "training"
"""Folder inside the result's for what a run needs to go on; removed when it is finished."""
SETTINGS, STATE, PROGRESS = "settings.json", "state.safetensors", "progress"


def train_heads(
    compiled: CompiledModel,
    texts: Texts,
    folder: str | Path,
    options: TrainOptions | None = None,
    *,
    name: str = "",
    say: Say | None = None,
    bar: Bar | None = None,
) -> dict[str, Any]:
    """Train what `options.kind` names for a compiled model on `texts` and write it to `folder`: for
    `graft.Heads(folder)`, `graft.Kangaroo(folder, layer)`, `graft.LayerSkip(layer, acceptance=folder)`,
    `graft.ConfidenceExit(layer, threshold, folder)` or `graft.LossyJudge(folder)`.

    `compiled` must be the target without approximations, with its parameters (compiled without `release`); training
    runs on its device. `name` says in the result which model they are for. Interrupted, the same call goes on where it
    was; the result is that of a run that was not. `say` is told what is going on, and `bar` of training in its place:
    the loss, and the tokens per step promised on what is held out. Returns the figures that are in config.json too:
    loss and top-1 of each head and simulated tokens per step, on sequences that were not trained on.

    Raises CheckpointError where the folder holds something else or a run with other options or text, and where there
    is too little text.
    """
    options, folder = options or TrainOptions(), Path(folder).expanduser()
    say = say or (lambda _: None)
    work = claim(folder, settings(compiled, texts, options))
    shards = Shards(work)
    found = sequences(compiled, texts, work, options.length, options.new_tokens)
    shards.build(found, features(compiled, options), lambda done: say(f"hidden states of {done} tokens"))
    run = Run(compiled, shards, options, work)
    run.resume()
    figures = run.train(bar or (lambda text, _: say(text)))
    return finish(run, folder, figures, {"model": name, "data": texts.digest, **asdict(options)})


def settings(compiled: CompiledModel, texts: Texts, options: TrainOptions) -> str:
    """What must be the same for a run to be resumed."""
    config = compiled.generator.face.config.to_dict()
    shown = {key: config.get(key) for key in ("model_type", "hidden_size", "vocab_size", "num_hidden_layers")}
    return json.dumps({"options": asdict(options), "data": texts.digest, "model": shown}, sort_keys=True)


def claim(folder: Path, wanted: str) -> Path:
    """The folder of a run's state, new or of the same run."""
    work = folder / WORK
    if (work / SETTINGS).is_file():
        if (held := (work / SETTINGS).read_text()) != wanted:
            raise CheckpointError(
                "another training run was begun here",
                expected=wanted,
                found=held,
                where=folder,
                remedy="go on with the same options and text, or choose another folder",
            )
        return work
    if folder.is_dir() and any(folder.iterdir()):
        raise CheckpointError(
            "heads are trained into a folder of their own",
            expected="no folder, an empty one, or a run that was interrupted",
            found=", ".join(sorted(path.name for path in folder.iterdir())[:8]),
            where=folder,
        )
    work.mkdir(parents=True, exist_ok=True)
    replace_text(work / SETTINGS, wanted)
    return work


def features(compiled: CompiledModel, options: TrainOptions) -> Callable[[list[int]], dict[str, Tensor]]:
    """What makes a text into what the kind is trained on."""
    if options.kind == "judge":
        return lambda one: places(compiled, one, options)
    count = min(options.labels, compiled.decoder.vocabulary)
    stream = None if options.kind in ("hydra", "medusa") else Exit(compiled, options.layer).stream
    return lambda one: compute(compiled, one, count, stream)


def trainee(compiled: CompiledModel, shards: Shards, options: TrainOptions) -> Trainee:
    """What the options name."""
    if options.kind == "kangaroo":
        return TrainedAdapter(compiled, options)
    if options.kind == "acceptance":
        return TrainedAcceptance(compiled, options)
    if options.kind == "exit-classifier":
        return TrainedClassifier(compiled, options)
    if options.kind == "judge":
        return TrainedJudge(compiled, options)
    return TrainedHeads(compiled, shards, options)


class Run:
    """The state of one run: network, optimiser, and how far it has come."""

    def __init__(self, compiled: CompiledModel, shards: Shards, options: TrainOptions, work: Path) -> None:
        self.shards, self.options, self.work = shards, options, work
        self.trainee = trainee(compiled, shards, options)
        self.network = self.trainee.network
        decay = options.weight_decay
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=options.rate, weight_decay=decay)
        total = sum(shards.sizes or ())
        generator = torch.Generator().manual_seed(options.seed)
        held = torch.randperm(total, generator=generator)[: max(1, round(options.held_out * total))]
        self.held_out = frozenset(held.tolist())
        if len(self.held_out) == total:
            raise CheckpointError("there is too little text to train on", found=f"{total} sequences", where=work.parent)
        self.progress: dict[str, Any] = {"epoch": 0, "shard": 0, "step": 0, "steps": 0, "best": None, "waited": 0}
        self.best = self.network.named()

    def sequences(self, number: int, held_out: bool) -> list[Sample]:
        """Those of a shard that are trained on, or those that are measured on."""
        first = sum((self.shards.sizes or [])[:number])
        found = enumerate(self.shards.read(number), first)
        return [one for place, one in found if (place in self.held_out) is held_out and len(one.tokens)]

    def train(self, bar: Bar) -> Figures:
        """All epochs that are left, or until measurements no longer improve; the figures of the best one."""
        options, progress = self.options, self.progress
        while progress["epoch"] < options.epochs and progress["waited"] < options.patience:
            order = self.order(progress["epoch"])
            while progress["shard"] < len(order):
                self.train_shard(order[progress["shard"]], bar)
                progress["shard"] += 1
                self.save()
            progress["epoch"], progress["shard"] = progress["epoch"] + 1, 0
            if not progress["steps"]:
                progress["steps"] = progress["step"] * options.epochs
            figures = self.measured()
            if progress["best"] is None or figures["loss"] < progress["best"]["loss"]:
                progress["best"], progress["waited"] = figures, 0
                self.best = {name: tensor.clone() for name, tensor in self.network.named().items()}
            else:
                progress["waited"] += 1
            self.save()
            measured = f"held-out loss {figures['loss']:.3f}, {figures['tokens_per_step']:.2f} tokens a step"
            bar(f"epoch {progress['epoch']}: {measured}", progress["epoch"] / options.epochs)
        best: Figures = progress["best"]
        return best

    def order(self, epoch: int) -> list[int]:
        """The shards in the order of an epoch."""
        generator = torch.Generator().manual_seed(self.options.seed * 1000 + epoch + 1)
        return torch.randperm(len(self.shards.sizes or ()), generator=generator).tolist()

    def train_shard(self, number: int, bar: Bar) -> None:
        """One step for each batch of a shard; nothing is kept of a shard that is not finished."""
        options, progress = self.options, self.progress
        samples = self.sequences(number, False)
        first = progress["epoch"] + progress["shard"] / len(self.shards.sizes or ())
        trained = 0
        for batch in batches(samples, options.batch):
            for group in self.optimiser.param_groups:
                group["lr"] = options.rate * self.schedule(progress["step"])
            self.optimiser.zero_grad(set_to_none=True)
            each = self.trainee.losses(batch)
            total = sum(loss * options.decay**head for head, loss in enumerate(each))
            assert isinstance(total, Tensor)
            total.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimiser.step()
            progress["step"] += 1
            trained += len(batch)
            epochs = first + trained / len(samples) / len(self.shards.sizes or ())
            bar(f"{self.place()}: loss {float(total.detach()):.3f}", epochs / options.epochs)

    def place(self) -> str:
        """How far the run has come, and what was measured last."""
        progress = self.progress
        steps = f" of {progress['steps']}" if progress["steps"] else ""
        best = progress["best"]
        measured = f", {best['tokens_per_step']:.2f} tokens a step on what is held out" if best else ""
        return f"epoch {progress['epoch'] + 1} of {self.options.epochs}, step {progress['step']}{steps}{measured}"

    def schedule(self, step: int) -> float:
        """Part of the learning rate: the first epoch, by which the steps are counted, runs at all of it."""
        steps = self.progress["steps"]
        if not steps:
            return min(1.0, (step + 1) / 20)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / steps)))

    def measured(self) -> Figures:
        """The figures on what is held out."""
        held = (batch for number in range(len(self.shards.sizes or ())) for batch in self.held_batches(number))
        return self.trainee.measure(held)

    def held_batches(self, number: int) -> Iterator[list[Sample]]:
        """What is held out of a shard."""
        yield from batches(self.sequences(number, True), self.options.batch)

    def save(self) -> None:
        """Everything that the run needs to go on, in one file and a small one behind it."""
        tensors = {f"now {name}": tensor for name, tensor in self.network.named().items()}
        tensors |= {f"best {name}": tensor for name, tensor in self.best.items()}
        for number, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"moment {number} {key}": torch.as_tensor(value) for key, value in state.items()}
        held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        temporary = self.work / f"{STATE}.part"
        # One file: state and progress cannot belong to different moments.
        save_file(held, temporary, metadata={PROGRESS: json.dumps(self.progress)})
        temporary.replace(self.work / STATE)

    def resume(self) -> None:
        """Take up what was saved, if anything was."""
        file = self.work / STATE
        if not file.is_file():
            return
        with safe_open(file, framework="pt") as opened:
            self.progress = json.loads(opened.metadata()[PROGRESS])
        held = load_file(file)
        own = self.network.named()
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(held[f"now {name}"])
        self.best = {name: held[f"best {name}"] for name in own}
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in held.items():
            if name.startswith("moment "):
                _, number, key = name.split(" ")
                state.setdefault(int(number), {})[key] = tensor
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": state})


def finish(run: Run, folder: Path, figures: Figures, about: dict[str, Any]) -> dict[str, Any]:
    """Write the heads, then remove what only the run needed."""
    config, tensors = run.trainee.finished(run.best)
    temporary = folder / f"{run.trainee.file}.part"
    save_file(tensors, temporary)
    temporary.replace(folder / run.trainee.file)
    replace_text(folder / CONFIG, json.dumps({**config, "figures": figures, "training": about}, indent=2))
    shutil.rmtree(folder / WORK)
    return figures
