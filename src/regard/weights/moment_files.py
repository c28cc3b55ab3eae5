"""An optimiser's second moments in a safetensors file, whole or as two vectors a matrix.

    save_second_moments(capture_second_moments(optimizer, expert), "expert/moments.safetensors")
    save_second_moments(moments, "expert/moments.safetensors", compress=True)     rows + columns numbers, not rows x columns
    moments = load_second_moments("expert/moments.safetensors")

A compressed matrix keeps its row sums and its column sums over their total; reading gives their product, the rank-one form of
`regard.ops.merging.rank_one`. A checkpoint that `regard train` left (`training.safetensors`) is read as well. Of an optimiser
saved by `torch.save`, build the optimiser, `load_state_dict`, and take `capture_second_moments`: its file has numbers for names.

Source of the compressed form: Mahdavinia et al. 2025, arXiv 2509.11167, as in Adafactor (arXiv 1804.04235).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regard._errors import InputError, OutputError

FORMAT = "regard-moments/1"
CHECKPOINT = "exp_avg_sq/"
"""Before the names of second moments in a checkpoint of `regard.labs.training`."""
ROWS, COLUMNS = "/rows", "/columns"


def save_second_moments(
    second: Mapping[str, Tensor], path: str | os.PathLike[str], *, compress: bool = False
) -> Path:
    """Writes second moments in float32, whole or not at all.

    Args:
        second: by parameter name, as from `capture_second_moments`.
        path: the file.
        compress: keep matrices as row and column sums.

    Raises:
        InputError: nothing to write, or moments that are negative or not finite.
        OutputError: a place that cannot be written.
    """
    if not second:
        raise InputError("second moments must hold at least one tensor, got none")
    tensors = {}
    for name, tensor in second.items():
        moment = tensor.detach().float()
        if not bool((moment.isfinite() & (moment >= 0)).all()):
            raise InputError(
                f"the second moment of {name} must be finite and at least 0, got least {float(moment.min())}"
            )
        if compress and moment.ndim == 2:
            total = moment.sum()
            tensors[name + ROWS] = moment.sum(1)
            tensors[name + COLUMNS] = moment.sum(0) / (total if bool(total > 0) else 1.0)
        else:
            tensors[name] = moment
    return write_tensors(tensors, Path(path), {"format": FORMAT})


def load_second_moments(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Second moments by parameter name, from `save_second_moments` or a checkpoint of `regard train`.

    Raises:
        InputError: no such file, or one that is damaged or holds no moments.
    """
    with open_tensors(Path(path)) as file:
        names, about = list(file.keys()), file.metadata() or {}
        if about.get("format") == FORMAT:
            found = {name: file.get_tensor(name) for name in names}
        else:
            held = [name for name in names if name.startswith(CHECKPOINT)]
            found = {name.removeprefix(CHECKPOINT): file.get_tensor(name) for name in held}
    if not found:
        raise InputError(
            f"{path} must hold second moments, got {', '.join(sorted(names)[:3]) or 'nothing'}; write it with save_second_moments"
        )
    whole = {n: v for n, v in found.items() if not n.endswith((ROWS, COLUMNS))}
    for name in (n.removesuffix(ROWS) for n in found if n.endswith(ROWS)):
        columns = found.get(name + COLUMNS)
        if columns is None:
            raise InputError(f"{path} is damaged: {name} has row sums and no column sums")
        whole[name] = torch.outer(found[name + ROWS], columns)
    return whole


def open_tensors(path: Path) -> safe_open:
    """A safetensors file opened for reading, or an `InputError` that says what is wrong with it."""
    if path.suffix in (".bin", ".pt", ".pth", ".pkl"):
        raise InputError(
            f"{path} must be a .safetensors file, got a pickled one, which could run code; save it again with safetensors"
        )
    if not path.is_file():
        raise InputError(f"{path} must be a .safetensors file, got a place where there is none")
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from error


def write_tensors(tensors: Mapping[str, Tensor], path: Path, about: dict[str, str]) -> Path:
    """Writes a safetensors file beside its place and moves it there when it is whole."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file({n: t.contiguous().clone() for n, t in tensors.items()}, name, about)
            Path(name).chmod(0o644)  # safetensors writes files that only their owner may read
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    return path
