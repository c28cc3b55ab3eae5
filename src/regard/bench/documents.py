"""What a model reads in a bench: documents cut to one length, each with the text that really follows.

Built-in documents are on every machine that has regard: English from Python's reference, code from
its standard library, licence texts of the packages that regard depends on. No document shares a
paragraph with another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from regard._errors import InputError
from regard.texts import code, prose

KINDS = ("prose", "code", "licence")
CONTINUATION = 48  # tokens after the context, which the model is asked to predict
_LICENSED = ("torch", "numpy", "transformers", "safetensors", "rich", "huggingface_hub")


@dataclass(frozen=True)
class Document:
    """`ids` are the tokens of the text, `length + CONTINUATION` of them or more."""

    name: str
    kind: str
    ids: tuple[int, ...]


def builtin_documents(
    tokenizer: Any, length: int, kinds: Sequence[str] = KINDS, each: int = 1, skip: int = 0
) -> list[Document]:
    """`each` documents of every kind, in the order prose, code, licence, prose, code, ...

    Args:
        tokenizer: of the model under test.
        length: tokens of the context; each document holds `CONTINUATION` more.
        kinds: of `KINDS`.
        each: documents of a kind.
        skip: leave out as many documents of each kind first (for a text that no test document shares).

    Raises:
        InputError: an unknown kind, or more text than the machine holds.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InputError.of("kinds", given=unknown[0], expected=f"of {', '.join(KINDS)}")
    cut = {
        kind: _slices(tokenizer, _source(kind), length + CONTINUATION, skip + each, f"{kind} texts")
        for kind in kinds
    }
    return [
        Document(f"{kind} {number + 1}", kind, cut[kind][number])
        for number in range(skip, skip + each)
        for kind in kinds
    ]


def text_documents(
    tokenizer: Any, text: str, length: int, most: int = 3, name: str = "text"
) -> list[Document]:
    """A text of your own, cut into up to `most` consecutive documents.

    Raises:
        InputError: the text is shorter than one document.
    """
    need = length + CONTINUATION
    ids = _ids(tokenizer, text)
    if len(ids) < need:
        raise InputError(
            f"the text must have at least {need} tokens (a context of {length} and {CONTINUATION} to "
            f"predict), got {len(ids)}; give a longer text, or --lengths {max(64, len(ids) - CONTINUATION)}"
        )
    count = min(most, len(ids) // need)
    return [
        Document(f"{name} {number + 1}", "text", tuple(ids[number * need : (number + 1) * need]))
        for number in range(count)
    ]


def _slices(tokenizer: Any, text: str, size: int, count: int, what: str) -> list[tuple[int, ...]]:
    """`count` slices of `size` tokens, one after another."""
    ids = _ids(tokenizer, text[: 8 * size * count + 2000])
    if len(ids) < size * count:
        ids = _ids(tokenizer, text)
    if len(ids) < size * count:
        raise InputError(
            f"the built-in {what} hold {len(ids)} tokens, got {count} documents of {size}; "
            "ask for fewer or shorter ones, or give --text"
        )
    return [tuple(ids[number * size : (number + 1) * size]) for number in range(count)]


def _source(kind: str) -> str:
    if kind == "prose":
        return prose(110_000)
    if kind == "code":
        return code(600_000)
    return _licences()


@cache
def _licences() -> str:
    """The licence texts of installed packages, hard line breaks joined, repeated paragraphs dropped."""
    files = sorted(
        (
            path
            for name in _LICENSED
            for path in _files(name)
            if re.search(r"licen[cs]e|copying|notice", path.name, re.I)
        ),
        key=str,
    )
    blocks: dict[str, None] = {}
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        for block in re.split(r"\n\s*\n", text or ""):
            line = " ".join(block.split())
            if len(line) > 100 and sum(c.isalpha() or c == " " for c in line) > 0.8 * len(line):
                blocks.setdefault(line)
    return "\n\n".join(blocks)


def _files(package: str) -> Iterable[metadata.PackagePath]:
    try:
        return metadata.files(package) or ()
    except metadata.PackageNotFoundError:
        return ()


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
