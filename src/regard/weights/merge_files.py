"""From files to a file: fine-tuned models and their optimisers' second moments in, one merged model out.

    merge_files(
        "base",                                     a model's directory, or a .safetensors file
        ["math", "code"],                           experts of the same shape
        "merged",                                   a new directory, which regard.load and transformers read
        moments=["math/moments.safetensors", "code/moments.safetensors"],       as save_second_moments wrote them
        densities=[0.4, 0.3],
    )

Everything is read and checked before anything is written, and the result appears whole under its name or not at all. A directory
gets the base's configuration and tokenizer, and one `model.safetensors` in the base's dtypes. The merge itself is
`regard.weights.merging.merge_ota`; without moments the edits get the plain mean.

Cost: base and experts are read one tensor at a time; moments and the merged model are held.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from regard._errors import InputError, OutputError
from regard.weights.merging import merge_linear, merge_ota
from regard.weights.moment_files import load_second_moments, open_tensors, write_tensors

INDEX = "model.safetensors.index.json"
DESCRIBES = (".json", ".model", ".txt", ".jinja", ".tiktoken")
"""Endings of the files of a base that describe the merged model as well: configuration and tokenizer."""
OF_A_RUN = (
    INDEX,
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
)

PathLike = str | os.PathLike[str]


class StoredWeights(Mapping[str, Tensor]):
    """A model's tensors in safetensors files, each read when it is asked for.

    Args:
        path: a .safetensors file, or a directory with `model.safetensors` or its parts and their index.

    Raises:
        InputError: no such weights, or files that are damaged.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._files = {file: open_tensors(file) for file in weight_files(self.path)}
        self._where = {name: file for file in self._files.values() for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model."""
    if not path.is_dir():
        return [path]
    if (path / INDEX).is_file():
        try:
            parts = json.loads((path / INDEX).read_text("utf-8"))["weight_map"].values()
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{path / INDEX} is damaged: {error!r}") from error
        return [path / part for part in sorted(set(parts))]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    raise InputError(
        f"{path} must hold model.safetensors or {INDEX}, got {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'nothing'}"
    )


def merge_files(
    base: PathLike,
    experts: Sequence[PathLike],
    out: PathLike,
    *,
    moments: Sequence[PathLike] | None = None,
    densities: Sequence[float] | None = None,
    thresholds: Sequence[float] | None = None,
    power: float = 0.5,
    scale_free: bool = False,
) -> Path:
    """Merges models on disk into one on disk.

    Args:
        base: the model that all experts started from: a directory, or a .safetensors file.
        experts: fine-tuned models, likewise.
        out: where the merged model goes: a directory that does not exist yet when `base` is a directory, else a
            .safetensors file, which is replaced.
        moments: each expert's second moments; None gives the plain mean of the edits.
        densities: share of its edits that each expert keeps.
        thresholds: in place of densities, the least saliency that each expert keeps.
        power: of the moments; 1/2 as published.
        scale_free: divide each tensor's weights by their mean, for experts of different batch sizes.

    Returns:
        `out`.

    Raises:
        InputError: models or moments that cannot be read or do not fit, with both shapes.
        OutputError: a place that cannot be written. Whatever goes wrong, nothing is left there.
    """
    target, source = Path(out), Path(base)
    _check_target(target, source)
    held = StoredWeights(source)
    others = [StoredWeights(expert) for expert in experts]
    if moments is None:
        if densities is not None or thresholds is not None:
            raise InputError(
                "densities and thresholds need moments, got none; give one file an expert"
            )
        merged = merge_linear(held, others)
    else:
        if len(moments) != len(others):
            raise InputError.of(
                "moments", given=len(moments), expected=f"one for each of {len(others)} experts"
            )
        merged = merge_ota(
            held,
            others,
            [load_second_moments(path) for path in moments],
            densities=densities,
            thresholds=thresholds,
            power=power,
            scale_free=scale_free,
        )
    about = {"format": "pt"}
    if not source.is_dir():
        return write_tensors(merged, target, about)
    return _write_directory(merged, source, target, about)


def _check_target(target: Path, source: Path) -> None:
    if not source.is_dir():
        if target.is_dir() or target.suffix != ".safetensors":
            raise OutputError(
                f"the merged model must be a .safetensors file as its base {source.name} is, got {target}"
            )
        return
    if target.exists():
        raise OutputError(
            f"the merged model must be a directory that does not exist yet, got {target}; give another or remove it"
        )


def _write_directory(
    merged: Mapping[str, Tensor], source: Path, target: Path, about: dict[str, Any]
) -> Path:
    staged = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in DESCRIBES and file.name not in OF_A_RUN:
                shutil.copyfile(file, staged / file.name)
        write_tensors(merged, staged / "model.safetensors", about)
        staged.chmod(0o755)
        os.rename(staged, target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error}") from error
    finally:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
    return target
