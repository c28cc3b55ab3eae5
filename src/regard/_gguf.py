"""A GGUF file as an ordinary transformers model: unpacked, savable, with its own tokenizer.

transformers reads GGUF files but keeps treating the result as quantised: `save_pretrained` and
`.float()` refuse. Here the weights are unpacked and copied into a fresh model of the same
configuration, so that nothing about it is special afterwards.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from regard._errors import ModelError

MAGIC = b"GGUF"

# In these vocabularies every digit is a token of its own. The file says so only by the vocabulary's
# name (llama.cpp's table `LLAMA_VOCAB_PRE_TYPE_*`), which transformers does not look at.
_SPLIT_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}


def check_gguf(path: Path) -> None:
    """Raise ModelError unless the file at `path` starts as a GGUF file does."""
    with path.open("rb") as file:
        head = file.read(len(MAGIC))
    if head != MAGIC:
        raise ModelError(
            f"{path} is not a GGUF file: it starts with {head!r}, expected {MAGIC!r}; "
            "download it again, or give the directory of a Hugging Face model"
        )


def load_gguf(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, dict[str, Any]]:
    """Load a GGUF file as `(model, tokenizer, facts)`.

    Args:
        path: a `.gguf` file of an architecture that transformers can read.
        dtype: what the weights are unpacked to.

    Returns:
        The model in eval mode without any trace of quantisation; its tokenizer; and what the file
        says of itself: `{"quantisation": "Q4_1 (210 of 272 tensors)", "name": ...}`.

    Raises:
        ModelError: the file is not GGUF, or transformers cannot read it.

    Cost: twice the unpacked weights in memory for a moment.
    """
    check_gguf(path)
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError("reading GGUF files needs the gguf package: pip install gguf") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "local_files_only": True,
    }
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            packed = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype, **_unpacked())
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:
        raise ModelError(f"transformers could not read {path}: {error}") from error
    facts = read_facts(path)
    if facts.pop("vocabulary", None) in _SPLIT_DIGITS:
        split_digits(tokenizer)
    return plain(packed, dtype), tokenizer, facts


def _unpacked() -> dict[str, Any]:
    try:
        from transformers import GgufConfig  # newer releases keep the blocks packed unless told
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def plain(packed: Any, dtype: torch.dtype) -> Any:
    """A model of the same class and weights as `packed`, with no memory of quantisation."""
    values = packed.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype", "torch_dtype"):
        values.pop(key, None)
    config = type(packed.config).from_dict(values)
    standard = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = type(packed)(config)
    finally:
        torch.set_default_dtype(standard)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    if packed.can_generate():
        model.generation_config = packed.generation_config
    return model.eval()


def read_facts(path: Path) -> dict[str, Any]:
    """The file's own words: model name, vocabulary, and the quantisation of its tensors."""
    from gguf import GGUFReader

    reader = GGUFReader(os.fspath(path))
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    packed = {kind: n for kind, n in kinds.most_common() if kind not in {"F32", "F16", "BF16"}}
    total = sum(kinds.values())
    facts: dict[str, Any] = {
        "quantisation": ", ".join(f"{kind} ({n} of {total} tensors)" for kind, n in packed.items())
    }
    for name, key in (("name", "general.name"), ("vocabulary", "tokenizer.ggml.pre")):
        field = reader.fields.get(key)
        if field is not None:
            facts[name] = field.contents()
    return facts


def split_digits(tokenizer: Any) -> None:
    """Make every digit a piece of its own before the byte-pair merges run."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
