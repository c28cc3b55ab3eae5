"""Text for demonstrations, probes and tests: deterministic, already on the machine, no network.

English comes from the language reference that ships inside Python (`pydoc_data.topics`, about
460 kB of explained prose), code from the standard library's own modules. Both differ a little
between Python versions, so two runs read the same bytes when their `sources()` agree. Repeated
paragraphs are dropped: a second copy of a passage would look like induction.

Probes made of tokens (`repeated_random_tokens`, `induction_batch`), needles in haystacks
(`needle_prompts`) and word problems (`arithmetic_problems`) are generated from a seed.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from regard._errors import InputError
from regard._needles import NEEDLES, Needle, NeedlePrompt, needle_prompts, rouge1_recall
from regard._probes import InductionBatch, induction_batch, random_tokens, repeated_random_tokens
from regard._problems import Problem, arithmetic_problems

__all__ = [
    "NEEDLES",
    "InductionBatch",
    "Needle",
    "NeedlePrompt",
    "Problem",
    "arithmetic_problems",
    "code",
    "default_text",
    "induction_batch",
    "needle_prompts",
    "prose",
    "random_tokens",
    "repeated_random_tokens",
    "rouge1_recall",
    "sources",
]

# The default document: topics in the order in which a reader would want them.
_READING = (
    "objects",
    "naming",
    "exceptions",
    "import",
    "customization",
    "attribute-access",
    "types",
)
_MODULES = (
    "argparse", "bisect", "calendar", "configparser", "contextlib", "copy", "csv", "dataclasses",
    "datetime", "difflib", "enum", "fractions", "functools", "gettext", "heapq", "inspect",
    "ipaddress", "json/decoder", "json/encoder", "logging/__init__", "optparse", "pathlib", "pprint",
    "queue", "random", "sched", "shlex", "statistics", "string", "tarfile", "tempfile", "textwrap",
    "threading", "tokenize", "traceback", "types", "typing", "uuid", "weakref", "zipfile",
)  # fmt: skip
_ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


def prose(n_chars: int, seed: int = 0) -> str:
    """`n_chars` characters of English: whole paragraphs of Python's reference in a seeded order.

    Paragraphs are separated by one blank line; the last one is cut to length. Raises InputError
    when more is asked for than there is (about 120,000 characters).

    >>> len(prose(500, seed=1)), prose(500, seed=1) == prose(500, seed=1), prose(9) == prose(9, 1)
    (500, True, False)
    """
    return _cut(_shuffled(_paragraphs(), seed), n_chars, "\n\n", "prose")


def code(n_chars: int, seed: int = 0) -> str:
    """`n_chars` characters of Python: top-level definitions of standard modules, seeded order.

    >>> len(code(500)), code(500) == code(500, seed=1)
    (500, False)
    """
    return _cut(_shuffled(_definitions(), seed), n_chars, "\n\n\n", "code")


def default_text(tokenizer: Any = None, n_tokens: int = 2000) -> str:
    """The report's default document: explained English with headings, lists and small programs.

    Args:
        tokenizer: counts the tokens; without one, four characters are taken for a token.
        n_tokens: the length. The text ends where this many tokens end.

    Returns:
        The beginning of Python's reference on objects, names, exceptions and modules.

    Raises:
        InputError: more is asked for than the reference holds (about 85,000 tokens).

    >>> default_text(n_tokens=10)
    'Objects, values and types\\n\\nObjects are P'
    """
    if n_tokens < 1:
        raise InputError.of("n_tokens", given=n_tokens, expected="at least 1")
    text = _document()
    if tokenizer is None:
        return _checked(text, 4 * n_tokens, "default_text")
    text = text[: 12 * n_tokens]  # more than n_tokens tokens in any vocabulary worth the name
    if getattr(tokenizer, "is_fast", False):
        marks = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = [end for _, end in marks["offset_mapping"]]
        have, cut = len(ends), "" if len(ends) < n_tokens else text[: ends[n_tokens - 1]]
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        have, cut = len(ids), tokenizer.decode(ids[:n_tokens])
    if have < n_tokens:
        raise InputError.of("n_tokens", given=n_tokens, expected=f"at most {have} for this text")
    return cut


def sources() -> dict[str, str]:
    """The sha256 of the bytes behind `prose`, `default_text` and `code` on this Python.

    >>> sorted(sources())
    ['code', 'prose']
    """
    prose_bytes = "\n".join(_topics()).encode()
    code_bytes = b"".join(p.read_bytes() for name in _MODULES if (p := _stdlib(name)).is_file())
    return {
        "prose": hashlib.sha256(prose_bytes).hexdigest(),
        "code": hashlib.sha256(code_bytes).hexdigest(),
    }


def _stdlib(name: str) -> Path:
    return Path(sysconfig.get_path("stdlib")) / f"{name}.py"


@cache
def _topics() -> tuple[str, ...]:
    """All topics, those of the reading order first."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "this Python comes without pydoc_data, the source of the built-in text; "
            "give a text of your own, or install the full standard library"
        ) from error
    names = [*_READING, *sorted(set(topics) - set(_READING))]
    return tuple(topics[name] for name in names if name in topics)


@cache
def _paragraphs() -> tuple[str, ...]:
    blocks = (block for topic in _topics() for block in _blocks(topic))
    return tuple(dict.fromkeys(filter(_is_prose, blocks)))


@cache
def _definitions() -> tuple[str, ...]:
    """Top-level functions and classes of the modules, without the very short ones."""
    pieces = []
    for path in filter(Path.is_file, map(_stdlib, _MODULES)):
        text = path.read_text("utf-8")
        lines = text.splitlines()
        for node in ast.parse(text).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
                pieces.append("\n".join(lines[first - 1 : node.end_lineno]))
    return tuple(dict.fromkeys(piece for piece in pieces if len(piece) > 200))


@cache
def _document() -> str:
    blocks = dict.fromkeys(block for topic in _topics() for block in _blocks(topic))
    return "\n\n".join(blocks)


def _blocks(topic: str) -> list[str]:
    """Headings, paragraphs, list items and programs of a topic, without hard line breaks."""
    blocks = []
    for block in re.split(r"\n\s*\n", topic.strip("\n")):
        lines = block.rstrip().translate(_ASCII).split("\n")
        if len(lines) == 2 and re.fullmatch(r"([*=\-~^])\1+", lines[1]):
            blocks.append(lines[0])
        elif _is_verbatim(lines):
            blocks.append("\n".join(lines))
        else:
            blocks.append(_plain(_join(lines)))
    return blocks


def _join(lines: list[str]) -> str:
    """One line of several; a term over its indented definition becomes `term: definition`."""
    if (
        len(lines) > 1
        and lines[0][0].isalnum()
        and all(line.startswith("   ") for line in lines[1:])
    ):
        lines = [lines[0].rstrip() + ":", *lines[1:]]
    return re.sub(r"(?<=\w-) (?=\w)", "", " ".join(line.strip() for line in lines))


def _is_verbatim(lines: list[str]) -> bool:
    """Programs, tables and grammar are indented, ruled, or carry their own line structure."""
    first = lines[0].lstrip()
    ruled = any(set(line) <= set("+-=| ") and len(line) > 3 for line in lines)
    return ruled or "::=" in first or (lines[0] != first and not first.startswith("*"))


def _plain(text: str) -> str:
    """Without the marks of emphasis, with one space between sentences."""
    text = re.sub(r"\s{2,}", " ", text)
    text = re.sub(r"'(\"[^']*\")'", r"\1", text)
    return re.sub(r"(?<![\w*])\*{1,2}(\w[^*]*?)\*{1,2}(?![\w*])", r"\1", text)


def _is_prose(block: str) -> bool:
    return (
        len(block) > 150
        and "\n" not in block
        and block[0].isalpha()
        and block.rstrip().endswith(".")
        and sum(c.isalpha() or c == " " for c in block) > 0.85 * len(block)
    )


def _shuffled(pieces: tuple[str, ...], seed: int) -> list[str]:
    order = list(pieces)
    random.Random(seed).shuffle(order)
    return order


def _cut(pieces: list[str], n_chars: int, gap: str, what: str) -> str:
    return _checked(gap.join(pieces), n_chars, what)


def _checked(text: str, n_chars: int, what: str) -> str:
    if not 0 < n_chars <= len(text):
        raise InputError(f"{what} has 1..{len(text)} characters to give, got {n_chars}")
    return text[:n_chars]
