"""Held text as token ids: files, or the documentation that comes with Python."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.compiler.errors import PlanError


@dataclass(frozen=True)
class Documents:
    """Token ids of some documents of one length, and where they come from."""

    ids: tuple[tuple[int, ...], ...]
    source: str
    digest: str
    """SHA-256 of all texts, whether or not they were used to their end."""


def read_documents(files: Sequence[str | Path], tokenizer: Any, length: int, count: int) -> Documents:
    """`count` documents of `length` tokens: the first piece of every file, then the second of every file, and so on.

    Raises PlanError for a file that cannot be read, and where there is too little text.
    """
    texts = {}
    for file in map(Path, files):
        try:
            texts[file.name] = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            found = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
            raise PlanError("a text cannot be read", expected="UTF-8 text", found=found, where=file) from error
    return documents(texts, ", ".join(texts), tokenizer, length, count)


def own_documents(tokenizer: Any, length: int, count: int) -> Documents:
    """Documents from the longest topics of the documentation that comes with Python (pydoc_data.topics)."""
    import platform
    from pydoc_data.topics import topics

    longest = sorted(topics.items(), key=lambda item: (-len(item[1]), item[0]))[: 4 * count]
    source = f"topics of Python {platform.python_version()}'s documentation, the longest first"
    return documents(dict(longest), source, tokenizer, length, count)


def documents(texts: dict[str, str], source: str, tokenizer: Any, length: int, count: int) -> Documents:
    """Pieces of the texts, which take turns."""
    ids = [tuple(tokenizer(text, verbose=False)["input_ids"]) for text in texts.values()]
    most = max((len(one) // length for one in ids), default=0)
    pieces = [one[n * length : (n + 1) * length] for n in range(most) for one in ids if len(one) >= (n + 1) * length]
    if len(pieces) < count:
        raise PlanError(
            "there is too little text to measure on",
            expected=f"{count} pieces of {length} tokens, each from one text",
            found=f"{len(pieces)}; texts of {', '.join(str(len(one)) for one in ids) or 'no'} tokens",
            where=source,
            remedy="more text, a shorter context, or fewer documents",
        )
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    return Documents(tuple(pieces[:count]), source, digest)
