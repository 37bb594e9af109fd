"""llama.cpp on the weights that transformers loaded: `python -m benchmarks.llama` compares the two's token ids.

The weights are written to a GGUF file, matrices in the model's own dtype and norms in float32, as llama.cpp has them,
with tokenizer and metadata of the file they came from. They then run through llama-cpp-python's low-level functions.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from rich.console import Console
from transformers import PreTrainedModel

from benchmarks.record import OWN_PROMPTS, load_prompts
from examples.smollm2 import load, weights
from graft.compiler.errors import GenerationError, GraftError

TYPES = {torch.float32: GGMLQuantizationType.F32, torch.bfloat16: GGMLQuantizationType.BF16}
FILE_TYPES = {torch.float32: 0, torch.bfloat16: 32}
"""llama.cpp's numbers for what most tensors of a file are."""
OWN_KEYS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
"""Metadata that belongs to the file and not to the model."""


ERROR_LEVEL = 4
"""GGML_LOG_LEVEL_ERROR."""


class PeerError(GraftError):
    """Another system failed at what it was asked to do."""


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    console = Console(highlight=False)
    model, tokenizer = load(torch.float32)
    ids = tokenizer(load_prompts(OWN_PROMPTS, 1)[0].text)["input_ids"]
    text = torch.tensor([ids])
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": 48}
    expected = model.generate(text, attention_mask=torch.ones_like(text), **options)[0, len(ids) :].tolist()
    for flash in (False, True):
        llama = Llama(model, torch.get_num_threads(), len(ids) + len(expected), flash)
        found, _, _ = llama.generate(ids, len(expected))
        llama.close()
        same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), len(expected))
        name = "with" if flash else "without"
        console.print(f"{name} flash attention: the first {same} of {len(expected)} tokens are transformers'")
        if same < len(expected):
            raise PeerError("llama.cpp and transformers disagree", expected=expected, found=found)


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Write a Llama model of transformers to a GGUF file, in the dtype that it has.

    Raises GenerationError for a dtype other than float32 and bfloat16.
    """
    if model.dtype not in TYPES:
        raise GenerationError("no such GGUF file is written", expected=" or ".join(map(str, TYPES)), found=model.dtype)
    writer = GGUFWriter(path, "llama")
    for field in GGUFReader(str(weights())).fields.values():
        if not field.name.startswith(OWN_KEYS):
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    writer.add_file_type(FILE_TYPES[model.dtype])
    config = model.config
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # a shared parameter once: llama.cpp shares the embedding, too
        data = parameter.detach().float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            data = permuted(data, heads)
        kind = TYPES[model.dtype] if data.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight",)), quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Outputs in llama.cpp's order: it rotates neighbours within a head, transformers the halves of a head."""
    return matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2).reshape(matrix.shape)


class Llama:
    """One sequence of a model in llama.cpp.

    Greedy decoding is llama_decode() of one token and numpy's argmax over the logits where they lie: two calls into
    llama.cpp and one into numpy for a token, and no sampler, which would first copy the logits into an array of
    candidates. Keys and values are float32 for a float32 model, and otherwise float16, llama.cpp's default.
    """

    def __init__(self, model: PreTrainedModel, threads: int, context: int, flash: bool) -> None:
        """Room for `context` tokens. Raises PeerError if llama.cpp cannot be set up, ImportError if it is missing."""
        self.api = quiet_api()
        self.vocabulary = model.config.vocab_size
        options = self.api.llama_model_default_params()
        # Read, not mapped, so that the file may go and the weights lie in memory like everyone else's.
        options.use_mmap = False
        with tempfile.TemporaryDirectory(prefix="graft-") as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path)
            self.model = self.api.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise PeerError("llama.cpp does not load the weights")
        settings = self.api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = -(-context // 256) * 256
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = int(flash)
        if model.dtype == torch.float32:
            settings.type_k = settings.type_v = int(GGMLQuantizationType.F32)
        self.context = self.api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise PeerError("llama.cpp does not open a context", found=f"flash attention {flash}, {context} tokens")
        self.next = (ctypes.c_int32 * 1)()
        self.step = self.api.llama_batch_get_one(self.next, 1)

    def close(self) -> None:
        """Free context and weights."""
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def generate(self, ids: list[int], new_tokens: int) -> tuple[list[int], float, float]:
        """So many greedy tokens after `ids`; seconds until the first of them, and from then on."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)
        prompt = (ctypes.c_int32 * len(ids))(*ids)
        start = time.perf_counter()
        new = [self.decode(self.api.llama_batch_get_one(prompt, len(ids)))]
        first = time.perf_counter()
        while len(new) < new_tokens:
            self.next[0] = new[-1]
            new.append(self.decode(self.step))
        return new, first - start, time.perf_counter() - first

    def decode(self, batch: object) -> int:
        """Run a batch; the best token after its last one."""
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise PeerError("llama_decode failed", expected=0, found=status)
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())


def faster(model: PreTrainedModel, threads: int, context: int, by_prefill: bool = False) -> tuple[Llama, bool]:
    """llama.cpp with or without flash attention, whichever is faster here with a prompt of half of the context: at
    decoding after it, or at running it."""
    found: dict[bool, Llama] = {flash: Llama(model, threads, context, flash) for flash in (False, True)}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    ids = [100 + 7 * i % 4000 for i in range(context // 2)]
    for _ in range(3):
        for flash, llama in found.items():
            _, prefill, decode = llama.generate(ids, 2 if by_prefill else 24)
            seconds[flash].append(prefill if by_prefill else decode)
    flash = median(seconds[True]) < median(seconds[False])
    found.pop(not flash).close()
    return found[flash], flash


def quiet_api() -> ModuleType:
    """llama_cpp, which says errors alone. Raises ImportError where it is not installed."""
    import llama_cpp

    llama_cpp.llama_log_set(show_errors, None)
    llama_cpp.llama_backend_init()
    return llama_cpp


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def show_errors(level: int, text: bytes, data: object) -> None:
    """What llama.cpp calls with its messages: only errors are worth reading here."""
    if level == ERROR_LEVEL:
        sys.stderr.write(text.decode(errors="replace"))


if __name__ == "__main__":
    main()
