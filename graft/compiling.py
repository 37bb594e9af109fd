"""compile(): from a model and a plan to something that generates."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from graft.codegen.lowering import LoweringWarning, check_backend, lower
from graft.codegen.release import release as release_packed
from graft.compiled import CompiledModel
from graft.compiler.capture import capture, check_model
from graft.compiler.errors import PlanError
from graft.compiler.host import plain_host, speculative_host
from graft.compiler.ordering import ordered
from graft.compiler.passing import Pass
from graft.compiler.pipeline import run_passes
from graft.compiler.plan import Plan
from graft.compiler.program import DENSE, Function, KVState, Program
from graft.passes.add_draft import AddDraft
from graft.passes.canonicalise import Canonicalise
from graft.passes.common_subexpression import CommonSubexpression
from graft.passes.compress_kv import CompressKV
from graft.passes.dead_code import DeadCode
from graft.passes.kv_cache import KVCache
from graft.passes.merge_linears import MergeLinears
from graft.runtime.controllers import Adaptive
from graft.runtime.decoder import Decoder
from graft.runtime.drafters.merge import Merge
from graft.runtime.generate import Generator
from graft.runtime.kv_overlay import KVOverlay
from graft.runtime.kv_store import KVStore
from graft.runtime.settings import ModelFace
from graft.runtime.tree_policies import BestFirst

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TARGET = "forward"
"""Name of the target's function."""
Progress = Callable[[str], None]
"""Called with what is being done from now on."""


def compile(
    model: PreTrainedModel,
    plan: Plan | None = None,
    *,
    backend: str = "auto",
    release: bool = False,
    progress: Progress | None = None,
) -> CompiledModel:
    """Compile a causal language model of transformers for decoding.

    `model` is in eval mode, in any floating dtype, on any device, and is left as it was. Without a plan, plain
    decoding. `backend` is "cpp" (fused C++, on the CPU), "triton" (GPU), "aten", or "auto": C++ on the CPU where there
    is a compiler, else ATen. C++ reads packed copies of the weights; with `release` the model's own are given up, and
    the model can no longer run.

    Raises PlanError before anything runs if the plan's parts do not go together, CaptureError if the model cannot be
    captured, PassError or CheckError if a pass fails, LoweringError if the backend cannot run it.
    """
    plan = Plan() if plan is None else plan
    if not isinstance(plan, Plan):
        raise PlanError(
            "compile() takes a Plan", found=type(plan).__name__, remedy="Plan.from_spec and Plan.from_toml read text"
        )
    plan.check()
    passes = pipeline(plan)
    ordered(passes)
    check_backend(backend)
    check_model(model)
    face = ModelFace.of(model)
    say = progress or (lambda _: None)
    say(f"capturing {type(model).__name__}")
    with collection_paused():
        captured = capture(model)
        program = Program({"forward": Function("forward", captured.graph, captured.weights, DENSE)})
        program.host = speculative_host() if plan.draft else plain_host()
        run_passes(program, passes, sample=plan.sample, progress=lambda name, *_: say(f"running pass {name}"))
    say("lowering")
    config, vocabulary = model.config.get_text_config(), int(model.get_output_embeddings().weight.shape[0])
    positions = getattr(config, "max_position_embeddings", None)
    decoder = decoder_of(program, vocabulary, positions, backend)
    compiled = assembled(program, plan, decoder, face)
    if release:
        # Last of all: nothing may fail behind this.
        compiled.released_bytes = release_packed([model, captured.weights], compiled.executables)
        if not compiled.released_bytes:
            problem = "nothing was released: the code that runs reads the model's own parameters"
            warnings.warn(problem, LoweringWarning, stacklevel=2)
    return compiled


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """No search for garbage in cycles meanwhile: a graph is thousands of objects that live on, and looking through all
    of them again and again takes a tenth of the time of compiling."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def assembled(program: Program, plan: Plan, decoder: Decoder, face: ModelFace) -> CompiledModel:
    """The parts of a compiled model put together, the plan's defaults filled in."""
    drafter, policy = merged(plan), plan.tree.policy or BestFirst()
    decoder.first_token = getattr(face.config.get_text_config(), "bos_token_id", None)
    if drafter is not None:
        drafter.open(decoder, policy)  # a drafter that does not fit this model says so now, not when text is wanted
    generator = Generator(
        decoder,
        face,
        program.host,
        drafter=drafter,
        policy=policy,
        controller=plan.controller or Adaptive(),
        verifier=plan.verifier,
        nodes=plan.tree.nodes + 1,
    )
    return CompiledModel(program, plan, generator)


def pipeline(plan: Plan) -> list[Pass]:
    """The passes of a plan, in the order they are asked for; declared facts may move the user's own. A drafter's that
    work on functions without a cache stand where there is one."""
    layout = tuple(one for one in plan.target if isinstance(one, CompressKV))
    drafting = [
        dataclasses.replace(one, layout=layout) if isinstance(one, AddDraft) else one for one in draft_passes(plan)
    ]
    early = [one for one in drafting if "cache-free" in one.requires]
    return [
        Canonicalise(),
        *plan.target,
        DeadCode(),
        CommonSubexpression(),
        *early,
        KVCache(),
        MergeLinears(),
        DeadCode(),
        *(one for one in drafting if one not in early),
    ]


def merged(plan: Plan) -> Merge | None:
    """The plan's drafters as one, or None."""
    return Merge(plan.draft) if plan.draft else None


def draft_passes(plan: Plan) -> list[Pass]:
    """The graph parts of the plan's drafters, and where there are some of its verifier. Raises PlanError where one of
    them could change the target's functions."""
    found: list[Pass] = []
    for part in (*plan.draft, plan.verifier):
        if part is None or not plan.draft:
            continue
        for one in part.passes:
            if one.contract != "lossless":
                raise PlanError(
                    "a pass of a drafter or verifier could change the target",
                    expected="contract lossless",
                    found=f"{one.pass_name()}, {one.contract}",
                    where=type(part).__name__,
                )
            found.append(one)
    return found


def decoder_of(
    program: Program,
    vocabulary: int,
    positions: int | None,
    backend: str,
    panels: Mapping[str, Tensor] | None = None,
) -> Decoder:
    """The target, lowered, with a KV store, and the functions that draft, which share what is packed; `panels` as in
    codegen.lowering.lower."""
    packed = dict(panels or {})
    target: Decoder | None = None
    store = KVStore(target_states(program), program[TARGET].device)
    own: dict[tuple[KVState, ...], KVStore] = {}  # a state of one name is one state among functions that draft too
    for function in sorted(program.functions.values(), key=lambda one: one.name != TARGET):
        function.lowered = executable = lower(function, backend, packed, target.executable if target else None)
        packed |= executable.panels
        if target is None:
            target = Decoder(function, executable, vocabulary, positions, store)
        else:
            size = int(function.output.args[0][0].meta["val"].shape[-1])
            held: KVStore | KVOverlay | None = None
            if shares_state(function, target.function):
                held = KVOverlay(store, function.states)
            elif function.states:
                held = own.get(function.states) or KVStore(function.states, function.device)
                own[function.states] = held
            target.functions[function.name] = Decoder(function, executable, size, positions, held)
    assert target is not None
    return target


def shares_state(function: Function, target: Function) -> bool:
    """Whether a function that drafts runs on the target's KV: a state of one name is one state."""
    return bool({state.name for state in function.states} & {state.name for state in target.states})


def target_states(program: Program) -> list[KVState]:
    """The states of the target, then those that functions which share some of them have besides."""
    target = program[TARGET]
    found = {state.name: state for state in target.states}
    for function in program.functions.values():
        if shares_state(function, target):
            found = {state.name: state for state in function.states} | found
    others = [state for name, state in found.items() if state not in target.states]
    return [*target.states, *others]
