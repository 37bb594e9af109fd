"""Every generation option of transformers, and what graft does with it; docs/limits.md is tested against this table."""

from __future__ import annotations

from typing import Literal

Treatment = Literal["supported", "inert", "refused"]

SUPPORTED = (
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "max_time",
    "stop_strings",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "renormalize_logits",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "watermarking_config",
    "num_return_sequences",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Options that mean what they mean in transformers."""

ARGUMENTS = (
    "inputs",
    "input_ids",
    "attention_mask",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "tokenizer",
    "seed",
)
"""Arguments of generate() that are not options; `seed` is graft's own."""

INERT = {
    "use_cache": "graft always uses its KV cache",
    "cache_implementation": "graft has one KV cache; passes such as CompressKV change its layout",
    "cache_config": "graft has one KV cache; passes such as CompressKV change its layout",
    "max_cache_len": "graft's KV cache grows as needed",
    "compile_config": "graft.compile is the compiler",
    "disable_compile": "graft.compile is the compiler",
    "prefill_chunk_size": "graft chunks prompts by itself",
    "continuous_batching_config": "requests of a batch enter and leave by themselves",
    "low_memory": "it belongs to contrastive search",
    "early_stopping": "it belongs to beam search",
    "length_penalty": "it belongs to beam search",
    "diversity_penalty": "it belongs to beam search",
    "is_assistant": "drafters belong to the plan: graft.Plan(draft=[...])",
    "num_assistant_tokens": "how much to draft belongs to the plan: graft.Plan(tree=...)",
    "num_assistant_tokens_schedule": "how much to draft belongs to the plan: graft.Plan(controller=...)",
    "assistant_confidence_threshold": "how much to draft belongs to the plan: graft.Plan(controller=...)",
    "max_matching_ngram_size": "it belongs to prompt lookup: graft.Plan(draft=[graft.Lookup()])",
    "assistant_lookbehind": "drafters share the target's vocabulary",
    "target_lookbehind": "drafters share the target's vocabulary",
    "decoder_start_token_id": "it belongs to encoder-decoder models",
}
"""Options that change no token here: dropped where the model's own generation_config has them, refused in a call."""

LOOKUP = "graft.compile(model, graft.Plan(draft=[graft.Lookup()]))"
DRAFT_MODEL = "graft.compile(model, graft.Plan(draft=[graft.DraftModel(other)]))"
GREEDY_OR_SAMPLING = "decode greedily or sample: leave it out"
REFUSED = {
    "num_beams": "beam search is not supported; leave it out, or set do_sample=True with num_return_sequences",
    "num_beam_groups": "beam search is not supported; leave it out",
    "constraints": "constrained beam search is not supported; use prefix_allowed_tokens_fn or a logits processor",
    "force_words_ids": "constrained beam search is not supported; use prefix_allowed_tokens_fn or a logits processor",
    "penalty_alpha": "contrastive search is not supported; " + GREEDY_OR_SAMPLING,
    "dola_layers": "DoLa is not supported; " + GREEDY_OR_SAMPLING,
    "guidance_scale": "classifier-free guidance is not supported; leave it out",
    "negative_prompt_ids": "classifier-free guidance is not supported; leave it out",
    "negative_prompt_attention_mask": "classifier-free guidance is not supported; leave it out",
    "token_healing": "heal the prompt's last token before generate()",
    "output_attentions": "attention weights are never materialised; use the transformers model",
    "output_hidden_states": "hidden states are not kept; use the transformers model",
    "assistant_model": DRAFT_MODEL,
    "assistant_tokenizer": "drafters share the target's vocabulary; " + DRAFT_MODEL,
    "assistant_early_exit": "graft.compile(model, graft.Plan(draft=[graft.SelfDraft(graft.EarlyExit(layer))]))",
    "assistant_ensemble_weight": "it changes the output; leave it out",
    "prompt_lookup_num_tokens": LOOKUP,
    "speculation_type": "drafters belong to the plan: graft.Plan(draft=[...])",
    "use_mtp": "drafters belong to the plan: graft.Plan(draft=[...])",
    "inputs_embeds": "pass input_ids",
    "past_key_values": "pass the whole text as input_ids; graft keeps no cache between calls",
    "position_ids": "positions follow from attention_mask; leave it out",
    "token_type_ids": "leave it out: tokenizer(..., return_token_type_ids=False)",
    "synced_gpus": "graft runs on one device; leave it out",
    "custom_generate": "the decoding loop is the program's host program (print(compiled.program.host))",
    "trust_remote_code": "it belongs to custom_generate; leave it out",
}
"""Options and arguments that graft does not do, each with what to do instead."""

METADATA = ("transformers_version", "_from_model_config", "_commit_hash")
"""Fields of a GenerationConfig that are no options."""


def treatment(name: str) -> Treatment | None:
    """What graft does with an option or argument; None for a name that is in no table."""
    if name in SUPPORTED or name in ARGUMENTS:
        return "supported"
    if name in INERT:
        return "inert"
    return "refused" if name in REFUSED else None
