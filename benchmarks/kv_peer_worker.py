"""What benchmarks/kv_peer.py runs in kvpress' interpreter: work as JSON on standard input, figures on standard output.

It imports nothing of graft.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import quantiles

import kvpress
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    work = json.load(sys.stdin)
    torch.set_num_threads(work["threads"])
    path = Path(work["weights"])
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    arms = {"full": None, **{name: made(one["press"], one["ratio"]) for name, one in work["presses"].items()}}
    found, full = {}, {}
    with torch.inference_mode():
        for name, press in arms.items():
            kls, times, size = [], [], 0
            for number, text in enumerate(work["texts"]):
                cache = prefill(model, press, text[: work["context"]])
                size = size or bytes_of(cache)
                logits = continued(model, press, cache, text, work["context"], work["tokens"])
                full.setdefault(number, logits)
                kls.append(divergence(full[number], logits))
                if not number:
                    cache = prefill(model, press, text[: work["context"]])
                    times = steps(model, press, cache, text, work["context"], work["repeats"])
            low, middle, high = quantiles(times, n=4, method="inclusive")
            found[name] = {
                "press": "" if press is None else type(press).__name__,
                "cache_bytes": size,
                "kl": {"mean": float(f"{sum(kls) / len(kls):.6g}")},
                "step_us": {
                    key: round(1e6 * value) for key, value in (("low", low), ("median", middle), ("high", high))
                },
            }
    versions = {"kvpress": kvpress.__version__ if hasattr(kvpress, "__version__") else installed("kvpress"),
                "transformers": transformers.__version__, "torch": torch.__version__}  # fmt: skip
    print(json.dumps({"versions": versions, "arms": found}))


def installed(name: str) -> str:
    """A package's version."""
    from importlib import metadata

    return metadata.version(name)


def made(name: str, ratio: float) -> object:
    """A press that gives up this share."""
    if name == "ThinKPress":
        return kvpress.ThinKPress(key_channel_compression_ratio=ratio, window_size=32)
    if name == "SnapKVPress":
        return kvpress.SnapKVPress(compression_ratio=ratio, window_size=32, kernel_size=7)
    if name == "AdaKVPress":
        return kvpress.AdaKVPress(made("SnapKVPress", ratio))
    return getattr(kvpress, name)(compression_ratio=ratio)


def prefill(model, press, ids):  # type: ignore[no-untyped-def]
    """The cache behind a prompt, compressed at its end as kvpress does."""
    cache = DynamicCache()
    tokens = torch.tensor([ids])
    forget(model)
    if press is None:
        model.model(tokens, past_key_values=cache)
    else:
        with press(model):
            model.model(tokens, past_key_values=cache)
    return cache


def forget(model) -> None:  # type: ignore[no-untyped-def]
    """Keys that an earlier prompt had masked."""
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None


def bytes_of(cache) -> int:  # type: ignore[no-untyped-def]
    """Bytes of all keys and values that the cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def run(model, cache, tokens, start):  # type: ignore[no-untyped-def]
    """Logits of tokens that stand at `start`, whatever the cache's length."""
    positions = torch.arange(start, start + len(tokens))[None]
    return model(torch.tensor([tokens]), past_key_values=cache, position_ids=positions).logits[0].float()


def continued(model, press, cache, text, context, tokens):  # type: ignore[no-untyped-def]
    """Logits of a continuation, token by token, as decoding runs it."""
    rows = [run(model, cache, [text[place]], place) for place in range(context, context + tokens)]
    return torch.cat(rows)


def steps(model, press, cache, text, context, repeats) -> list[float]:  # type: ignore[no-untyped-def]
    """Seconds of steps of one token."""
    found = []
    for number in range(repeats + 2):
        start = time.perf_counter()
        run(model, cache, [text[context - 1]], context + number)
        found.append(time.perf_counter() - start)
    return found[2:]


def divergence(full: torch.Tensor, arm: torch.Tensor) -> float:
    """Mean KL(full || arm) in nats per token."""
    before, after = full.log_softmax(-1), arm.log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


if __name__ == "__main__":
    main()
