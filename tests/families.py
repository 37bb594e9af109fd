"""Tiny random models of every family that tests run over.

`build("gemma2")` makes one in some ten milliseconds: hidden size 64, 3 layers, 4 heads over 2 key-value heads, a
vocabulary of 131, a sliding window of 6 where the family has one, logits of order one, and no parameter at a value
(zero bias, unit norm) that would hide a mistake. The same name, seed and options always give the same weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 131
WINDOW = 6
"""Sliding window of the families that have one."""
ORIGINAL_LENGTH = 16
"""Length up to which the rope variants are unscaled; positions from there on are what they are about."""

COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
GROUPED_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
MULTIPLIERS: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
HEAD: dict[str, Any] = {"head_dim": 16}
SLIDING: dict[str, Any] = {"sliding_window": WINDOW}
MIXED: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
GEMMA4: dict[str, Any] = {
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "global_head_dim": 32,
}
GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": GROUPED_EXPERTS | MIXED | HEAD | {"num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1},
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "bloom": {"n_layer": 3, "n_head": 4},
    "codegen": GPT | {"n_ctx": 128, "rotary_dim": 8},
    "cohere": {"logit_scale": 0.5},
    "cohere2": MIXED | {"logit_scale": 0.5},
    "cwm": MIXED | HEAD,
    "deepseek_v2": LATENT | GROUPED_EXPERTS | {"topk_method": "greedy"},
    "deepseek_v3": LATENT | GROUPED_EXPERTS,
    "diffllama": {},
    "doge": {},
    "dots1": GROUPED_EXPERTS | MIXED,
    "ernie4_5": {},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "exaone4": MIXED,
    "falcon": {},
    "falcon_alibi": {"model_type": "falcon", "alibi": True},
    "flex_olmo": EXPERTS,
    "gemma": HEAD,
    # transformers 5.17 would choose an attention that leaves the cap out.
    "gemma2": HEAD
    | MIXED
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "attn_implementation": "eager"},
    "gemma3_text": HEAD | MIXED,
    "gemma3n_text": HEAD | MIXED | {"vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0},
    "gemma4_text": HEAD | MIXED | GEMMA4 | {"hidden_size_per_layer_input": 0},
    "gemma4_text_per_layer": HEAD | MIXED | GEMMA4 | {"model_type": "gemma4_text", "hidden_size_per_layer_input": 16},
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": HEAD | GROUPED_EXPERTS,
    "gpt2": GPT,
    "gpt2_scaled_by_layer": GPT | {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
    "gpt_bigcode": GPT,
    "gpt_neo": {"num_heads": 4, "num_layers": 3, "window_size": WINDOW}
    | {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "gpt_neox": {},
    "gpt_neox_sequential": {"model_type": "gpt_neox", "use_parallel_residual": False},
    "gpt_oss": EXPERTS | HEAD | MIXED,
    "gptj": GPT | {"rotary_dim": 8},
    "granite": MULTIPLIERS,
    "granitemoe": MULTIPLIERS | EXPERTS,
    "granitemoeshared": MULTIPLIERS | EXPERTS | {"shared_intermediate_size": 48},
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD | EXPERTS | {"moe_topk": 2},
    "jamba": EXPERTS,
    "jetmoe": EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama": {},
    "llama4_text": EXPERTS | HEAD | {"intermediate_size_mlp": 96},
    "longcat_flash": LATENT
    | {"num_layers": 3, "head_dim": 8, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32}
    | {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2},
    "mamba": {},
    "minimax": EXPERTS | HEAD,
    "minimax_m2": EXPERTS | HEAD,
    "ministral": MIXED | HEAD,
    "ministral3": HEAD,
    "mistral": SLIDING,
    "mixtral": EXPERTS | HEAD | SLIDING,
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128},
    "nanochat": {},
    "nemotron": {},
    "olmo": {"clip_qkv": 1.0},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "opt_post_norm": {"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "persimmon": {},
    "phi": {},
    "phi3": SLIDING,
    "phimoe": EXPERTS | SLIDING,
    "qwen2": MIXED | {"use_sliding_window": True},
    "qwen2_moe": EXPERTS | MIXED | {"shared_expert_intermediate_size": 48, "use_sliding_window": True},
    "qwen3": HEAD | MIXED | {"use_sliding_window": True},
    "qwen3_moe": EXPERTS | HEAD,
    "qwen3_next": EXPERTS | HEAD,
    "seed_oss": HEAD,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "stablelm": {},
    "stablelm_parallel": {"model_type": "stablelm", "use_parallel_residual": True},
    "starcoder2": SLIDING,
    "vaultgemma": HEAD | MIXED,
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4},
}
"""Family -> configuration on top of `COMMON`; "model_type" where the name is not that already."""


REFUSED: dict[str, str] = {
    "bloom": "attention is computed by the model's own code",
    "codegen": "attention is computed by the model's own code",
    "doge": "attention is computed by the model's own code",
    "falcon": "attention is computed by the model's own code",
    "falcon_alibi": "attention is computed by the model's own code",
    "gpt_neo": "attention is computed by the model's own code",
    "gptj": "attention is computed by the model's own code",
    "mpt": "attention is computed by the model's own code",
    "xglm": "attention is computed by the model's own code",
    "jamba": "keeps a recurrent state",
    "mamba": "keeps a recurrent state",
    "qwen3_next": "keeps a recurrent state",
    "gemma3n_text": "no residual stream",
    "gemma4_text_per_layer": "no operand that goes past the block",
    "jetmoe": "shapes depend on data",
    "lfm2": "combined across tokens outside attention",
    "llama4_text": "a mask that graft does not know",
    "longcat_flash": "cannot be captured by torch.export",
    "minimax": "runs other code for other batches or lengths",
}
"""Family -> what the refusal says; every other family is captured."""

CAPTURED = tuple(name for name in FAMILIES if name not in REFUSED)

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")

WITHOUT_ROPE = frozenset(
    {"biogpt", "bloom", "codegen", "falcon_alibi", "gpt2", "gpt2_scaled_by_layer", "gpt_bigcode", "gpt_neo", "gptj"}
    | {"jamba", "mamba", "mpt", "opt", "opt_post_norm", "xglm"}
)
"""Families whose positions are learned, sinusoidal, ALiBi, a rotary embedding without types, or none."""

RESTRICTED: dict[str, tuple[str, ...]] = {
    "gemma4_text": (),
    "gemma4_text_per_layer": (),
    "persimmon": ROPE_TYPES[:-1],
    "phi": ROPE_TYPES[:-1],
    "phi3": ("default", "longrope"),
    "phimoe": ("default", "longrope"),
    "stablelm": ROPE_TYPES[:-1],
    "stablelm_parallel": ROPE_TYPES[:-1],
}
"""Families that do not take every type: their validation refuses it, or their code splits the head at another width."""

ROPE_VARIANTS: dict[str, tuple[str, ...]] = {
    name: RESTRICTED.get(name, ROPE_TYPES) for name in FAMILIES if name not in WITHOUT_ROPE
}
"""Family -> the rope types that its configuration and its code accept; families without a rotary embedding are absent.
Where there is nothing to choose the tuple is empty."""


REFUSED_ROPES = frozenset({("phimoe", "longrope")})
"""(family, rope type) that is refused: phimoe scales by the longest position in Python, which has no per-token form."""


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of the family, in eval mode on the CPU, with `overrides` on top of its configuration."""
    options = copy.deepcopy(COMMON | FAMILIES[name] | overrides)
    config = AutoConfig.for_model(options.pop("model_type", name), **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        randomise(model)
    for parameter in model.parameters():  # as from_pretrained does it: rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    if dtype == torch.float64 and getattr(model.config, "_experts_implementation", None):
        model.config._experts_implementation = "eager"  # transformers' default has no float64
    return model.eval()


def rope_overrides(name: str, kind: str) -> dict[str, Any]:
    """Overrides for `build` that give every layer of the family a rope of that type, unscaled up to ORIGINAL_LENGTH."""
    config = build(name).config
    nested = {key: value for key, value in config.rope_parameters.items() if isinstance(value, dict)}
    overrides: dict[str, Any] = {
        "rope_parameters": {key: rope_parameters(config, value, kind) for key, value in nested.items()}
        or rope_parameters(config, config.rope_parameters, kind)
    }
    if kind == "dynamic":
        overrides["max_position_embeddings"] = ORIGINAL_LENGTH
    if hasattr(config, "original_max_position_embeddings"):
        overrides["original_max_position_embeddings"] = ORIGINAL_LENGTH
    return overrides


def rope_parameters(config: Any, default: dict[str, Any], kind: str) -> dict[str, Any]:
    """The dictionary for one rope, with the family's own base and rotated fraction."""
    partial = default.get("partial_rotary_factor", 1.0)
    pairs = int((getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) * partial) // 2
    common = {"rope_type": kind, "rope_theta": default["rope_theta"], "partial_rotary_factor": partial}
    if "llama_4_scaling_beta" in default:
        common |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": ORIGINAL_LENGTH}
    if "Phimoe" in type(config).__name__ and kind == "longrope":
        common |= {"short_mscale": 1.2, "long_mscale": 1.4}
    scaled = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL_LENGTH}
    return common | {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "yarn": scaled | {"beta_fast": 4.0, "beta_slow": 1.0},
        "longrope": scaled
        | {"short_factor": [1.0 + 0.1 * i for i in range(pairs)], "long_factor": [2.0 + 0.3 * i for i in range(pairs)]},
        "llama3": scaled | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "proportional": {"partial_rotary_factor": 0.5 * partial},
    }[kind]


def randomise(model: nn.Module) -> None:
    """Random parameters: matrices that keep activations of order one, and vectors off their usual zero or one."""
    buffers = dict(model.named_buffers())
    stored = [buffers[path] for path in model.state_dict() if path in buffers and buffers[path].is_floating_point()]
    with torch.no_grad():
        for tensor in [*model.parameters(), *stored]:
            noise = torch.randn(tensor.shape)
            if tensor.dim() < 2:
                tensor.add_(0.1 * noise)
            else:
                tensor.copy_(0.125 * noise)
        for module in model.modules():
            if type(module).__name__.endswith("LayerNorm1P"):  # scales by 1 + weight, but its weight starts at 1
                module.weight.sub_(1.0)
