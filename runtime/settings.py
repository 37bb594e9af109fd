"""From the arguments of generate() to what the runtime needs, by transformers' own rules.

Everything that touches transformers' generation API, private parts included, is in this file. Its methods are called
on a `ModelFace`, which holds a model's configuration without its weights.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from graft.compiler.errors import GenerationError
from graft.runtime.options import ARGUMENTS, INERT, METADATA, REFUSED, SUPPORTED, treatment
from graft.runtime.prompts import read_prompts
from graft.runtime.random import row_seeds

OVERRIDABLE = ("generate", "_sample", "_get_logits_processor", "_get_stopping_criteria", "_prepare_generation_config")
"""Methods that a model class must not have of its own, since graft runs transformers' ones."""

NEUTRAL: dict[str, Any] = {"guidance_scale": 1, "penalty_alpha": 0, "low_memory": False, "assistant_early_exit": 0}
"""Values beside the default at which an option changes nothing."""


class ModelFace(GenerationMixin):
    """What transformers' preparation of generate() asks of a model; it holds no weights."""

    def __init__(self, config: Any, generation_config: GenerationConfig, device: torch.device) -> None:
        self.config, self.generation_config, self.device = config, generation_config, device

    @classmethod
    def of(cls, model: Any) -> ModelFace:
        """The face of a transformers model; raises GenerationError if its class has a generate() of its own."""
        own = [name for name in OVERRIDABLE if getattr(type(model), name, None) is not getattr(GenerationMixin, name)]
        if own:
            raise GenerationError(
                "the model does not generate as transformers' causal language models do",
                expected="GenerationMixin's own " + ", ".join(OVERRIDABLE),
                found=", ".join(own),
                where=type(model).__name__,
            )
        return cls(model.config, model.generation_config, model.device)

    @property
    def api(self) -> Any:
        """This face, untyped: the private methods of GenerationMixin are annotated for models with weights."""
        return self


@dataclass(frozen=True)
class Settings:
    """One generate() call, resolved."""

    input_ids: Tensor
    """int64 [batch, width], prompts as given, each repeated num_return_sequences times."""
    prompts: list[list[int]]
    """The tokens of each row without padding."""
    new_tokens: int
    """How many tokens to generate for each row at most."""
    eos: frozenset[int]
    pad: int
    sample: bool
    seeds: list[int]
    scores: bool
    logits: bool
    as_dict: bool
    streamer: Any
    processors: list[LogitsProcessorList]
    """One list for each row, empty where logits are used as they are."""
    criteria: StoppingCriteriaList
    """Stopping criteria other than length and eos."""


def resolve(face: ModelFace, vocabulary: int, max_positions: int | None, arguments: dict[str, Any]) -> Settings:
    """Read the arguments of generate(), `seed` among them.

    Raises GenerationError for an argument that is unknown, refused or not valid, and for prompts that cannot be run;
    nothing has been computed by then.
    """
    # None unsets an option that the model's own generation_config has; for other arguments it is the same as nothing.
    arguments = {name: value for name, value in arguments.items() if value is not None or name in SUPPORTED}
    refuse_arguments(arguments)
    given = arguments.get("generation_config")
    options = {name: value for name, value in arguments.items() if name not in ARGUMENTS}
    try:
        config = merged(face, given, options)
        refuse_options(config, face.generation_config, given, options)
        prompts = read_prompts(arguments, config, vocabulary, max_positions)
        rows, width = prompts.input_ids.shape
        limit = set_lengths(face, config, given, options, prompts.input_ids)
        face.api._prepare_special_tokens(config, "attention_mask" in arguments, device=face.device, batch_size=rows)
        criteria = face.api._get_stopping_criteria(
            config, arguments.get("stopping_criteria") or StoppingCriteriaList(), tokenizer=arguments.get("tokenizer")
        )
        ends, lengths, others = split_criteria(criteria)
        repeats = config.num_return_sequences
        tokens = [list(row) for row in prompts.tokens for _ in range(repeats)]
        new_tokens = min([limit, *lengths]) - width
        processors = [
            processor_list(face, config, arguments, row, prompt, width, new_tokens) for row, prompt in enumerate(tokens)
        ]
    except (ValueError, TypeError) as error:
        raise GenerationError("the arguments of generate() are not valid", found=error, where="generate()") from error
    if "streamer" in arguments and len(tokens) > 1:
        raise GenerationError(
            "a streamer takes one sequence", expected="a batch of 1", found=f"a batch of {len(tokens)}"
        )
    check_room(tokens, new_tokens, max_positions)
    return Settings(
        input_ids=prompts.input_ids.repeat_interleave(repeats, dim=0),
        prompts=tokens,
        new_tokens=new_tokens,
        eos=ends,
        pad=0 if config._pad_token_tensor is None else int(config._pad_token_tensor),
        sample=bool(config.do_sample),
        seeds=read_seeds(arguments.get("seed"), len(prompts.tokens), repeats, bool(config.do_sample)),
        scores=bool(config.output_scores and config.return_dict_in_generate),
        logits=bool(config.output_logits and config.return_dict_in_generate),
        as_dict=bool(config.return_dict_in_generate),
        streamer=arguments.get("streamer"),
        processors=processors,
        criteria=others,
    )


def refuse_arguments(arguments: dict[str, Any]) -> None:
    """Raise GenerationError for names that no table knows, and for refused arguments that are no options."""
    known = [*SUPPORTED, *ARGUMENTS, *INERT, *REFUSED]
    options = vars(GenerationConfig())
    for name, value in arguments.items():
        if treatment(name) is None and name not in options:
            close = difflib.get_close_matches(name, known, n=1)
            raise GenerationError(
                "generate() has no such argument",
                found=name,
                where="generate()",
                remedy=f"did you mean {close[0]}?" if close else "see docs/limits.md for what it takes",
            )
        if name in REFUSED and name not in options and value is not False:
            raise refusal(name, value)


def merged(face: ModelFace, given: GenerationConfig | None, options: dict[str, Any]) -> GenerationConfig:
    """Options over `given` over the model's generation_config over defaults, as transformers merges them."""
    if given is not None and not isinstance(given, GenerationConfig):
        raise GenerationError("generation_config is of another type", expected="a GenerationConfig", found=type(given))
    known = vars(GenerationConfig())
    config: GenerationConfig
    config, _ = face.api._prepare_generation_config(given, **{k: v for k, v in options.items() if k in known})
    return config


def refuse_options(
    config: GenerationConfig, own: GenerationConfig, given: GenerationConfig | None, options: dict[str, Any]
) -> None:
    """Raise GenerationError for every option that is set and that graft does not follow."""
    unset = vars(GenerationConfig())
    defaults = unset | default_options()
    for name, value in vars(config).items():
        if name in METADATA or name.startswith("_") or same(value, defaults.get(name)):
            continue
        if name in NEUTRAL and value == NEUTRAL[name]:
            continue
        asked = name in options or (given is not None and not same(getattr(given, name, None), unset.get(name)))
        inherited = not asked or (name not in options and same(getattr(own, name, None), value))
        match treatment(name) if name in unset else "custom":
            case "supported":
                continue
            case "inert" | "custom" if inherited:
                continue
            case "refused" if value is False:
                continue
            case "custom":
                close = difflib.get_close_matches(name, SUPPORTED, n=1)
                raise GenerationError(
                    "generation_config has an option that transformers does not know",
                    found=name,
                    where="generation_config",
                    remedy=f"did you mean {close[0]}?" if close else "remove it",
                )
            case _:
                raise refusal(name, value)


def refusal(name: str, value: object) -> GenerationError:
    """The error for an option that graft does not follow."""
    shown = repr(value) if isinstance(value, int | float | str | bool | list | tuple) else type(value).__name__
    return GenerationError(
        f"graft does not support {name}",
        found=f"{name}={shown[:80]}",
        where="generate()",
        remedy=REFUSED.get(name) or INERT.get(name) or "leave it out, or use the transformers model",
    )


def default_options() -> dict[str, Any]:
    """What transformers gives to options that nobody set."""
    return dict(GenerationConfig._get_default_generation_params())


def same(a: object, b: object) -> bool:
    """Whether two option values are equal; tensors are compared by identity."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def set_lengths(
    face: ModelFace, config: GenerationConfig, given: GenerationConfig | None, options: dict[str, Any], ids: Tensor
) -> int:
    """Resolve max_length and min_length in place as transformers does; the longest sequence, padding included."""
    unset = {
        name: options.get(name) is None
        and (given is None or getattr(given, name) is None)
        and getattr(face.generation_config, name) is None
        for name in ("max_length", "min_length")
    }
    width = ids.shape[1]
    call(
        face.api._prepare_generated_length,
        generation_config=config,
        has_default_max_length=unset["max_length"],
        has_default_min_length=unset["min_length"],
        model_input_name="input_ids",
        input_ids_length=width,
        inputs_tensor=ids,
    )
    face.api._validate_generated_length(config, width, unset["max_length"])
    limit: int = config.max_length
    return limit


def call(method: Callable[..., Any], **arguments: Any) -> Any:
    """Call with those arguments that this release of transformers takes."""
    parameters = inspect.signature(method).parameters
    return method(**{name: value for name, value in arguments.items() if name in parameters})


def split_criteria(criteria: StoppingCriteriaList) -> tuple[frozenset[int], list[int], StoppingCriteriaList]:
    """Eos tokens, length limits and the other criteria; the first two are then checked without tensors."""
    ends: set[int] = set()
    lengths: list[int] = []
    others = StoppingCriteriaList()
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            ends.update(criterion.eos_token_id.flatten().tolist())
        elif type(criterion) is MaxLengthCriteria:
            lengths.append(criterion.max_length)
        else:
            others.append(criterion)
    return frozenset(ends), lengths, others


def processor_list(
    face: ModelFace,
    config: GenerationConfig,
    arguments: dict[str, Any],
    row: int,
    prompt: Sequence[int],
    width: int,
    new_tokens: int,
) -> LogitsProcessorList:
    """The logits processors of one sequence, built by transformers as if it were alone and not padded."""
    # A copy by hand: deepcopy would copy the tensors of special tokens too.
    own = GenerationConfig.__new__(GenerationConfig)
    vars(own).update(vars(config))
    padding = width - len(prompt)
    own.max_length = len(prompt) + new_tokens
    own.min_length = max(0, (config.min_length or 0) - padding)
    allowed = arguments.get("prefix_allowed_tokens_fn")
    ids = torch.tensor([prompt], device=face.device)
    processors: LogitsProcessorList = call(
        face.api._get_logits_processor,
        generation_config=own,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=ids,
        prefix_allowed_tokens_fn=allowed and (lambda _, prefix: allowed(row, prefix)),
        logits_processor=arguments.get("logits_processor") or LogitsProcessorList(),
        device=face.device,
        model_kwargs={},
    )
    return processors


def read_seeds(seed: Any, prompts: int, repeats: int, sample: bool) -> list[int]:
    """One seed for each row; without `seed` they come from torch's global generator, as transformers' samples do."""
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ())) if sample else 0
    if isinstance(seed, int) and not isinstance(seed, bool):
        return row_seeds(seed, prompts * repeats)
    seeds = list(seed) if isinstance(seed, list | tuple) else None
    if seeds is None or len(seeds) not in (prompts, prompts * repeats) or not all(type(s) is int for s in seeds):
        expected = f"an int or a list of {prompts} ints"
        raise GenerationError("seed is not valid", expected=expected, found=repr(seed)[:80], where="generate()")
    if len(seeds) == prompts * repeats:
        return seeds
    return [derived for one in seeds for derived in row_seeds(one, repeats)]


def check_room(prompts: list[list[int]], new_tokens: int, max_positions: int | None) -> None:
    """Warn where the model's positions end before the length limit; the sequence then ends with them."""
    longest = max(map(len, prompts))
    if max_positions is not None and longest + new_tokens > max_positions + 1:
        warnings.warn(
            f"a prompt of {longest} tokens and {new_tokens} new tokens exceed the model's {max_positions} positions; "
            "generation stops there at the latest",
            UserWarning,
            stacklevel=2,
        )
