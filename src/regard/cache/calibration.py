"""Which heads of a model need memory: a profile, made once from one or a few plain texts and kept beside the model.

The model reads a text and then repeats it; the largest attention that any repeated token pays to a key, in a KV head, says how
much this head needs that key (KVzip's reconstruction score). Ranking the keys of all layers and heads together and keeping the
best fraction f leaves each head a share of its keys. The mean share over the texts, for a grid of fractions, is the profile.

Sources: KVzip (Kim et al. 2025, arXiv 2505.23416) for the score and the ranking over all heads. That the head's shares transfer
to other texts is measured in `evidence/`, not taken from there.
Cost: two readings of each text and one pass of statistics: about 15 CPU seconds for 1024 tokens of SmolLM2-135M.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError

FORMAT = "regard.calibration/1"
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Calibration:
    """The share of its keys that each KV head keeps when the whole cache keeps a given fraction.

    Attributes:
        model: name of the model.
        fingerprint: of its weights; `check(model)` compares.
        texts, tokens: how many texts and tokens it was made from.
        fractions: fractions of the whole cache, ascending.
        shares: for each fraction `[layers][kv_heads]`; their mean is the fraction.
    """

    model: str
    fingerprint: str
    texts: int
    tokens: int
    fractions: tuple[float, ...]
    shares: tuple[tuple[tuple[float, ...], ...], ...]

    def __post_init__(self) -> None:
        table = torch.tensor(self.shares, dtype=torch.float64)
        grid = torch.tensor(self.fractions, dtype=torch.float64)
        good = (
            table.dim() == 3
            and len(table) == len(grid) > 0
            and bool((grid.diff() > 0).all())
            and 0 < grid[0] <= grid[-1] < 1
            and bool(((table >= 0) & (table <= 1)).all())
            and torch.allclose(table.mean((1, 2)), grid, atol=0.02)
        )
        if not good:
            raise InputError(
                "a calibration holds, for ascending fractions in (0, 1), the share of each head, whose mean is the fraction; "
                "this one does not (was the file edited?)"
            )

    @property
    def layers(self) -> int:
        return len(self.shares[0])

    @property
    def kv_heads(self) -> int:
        return len(self.shares[0][0])

    def shares_at(self, fraction: float) -> Float[Tensor, "layers kv_heads"]:
        """Shares at any fraction in (0, 1]: linear between the grid's, all 0 at 0 and all 1 at 1, so the mean is kept."""
        if not 0 < fraction <= 1:
            raise InputError.of("fraction", given=fraction, expected="in (0, 1]")
        table = torch.tensor(self.shares, dtype=torch.float64)
        ends = torch.zeros_like(table[:1]), torch.ones_like(table[:1])
        table = torch.cat([ends[0], table, ends[1]])
        grid = torch.tensor([0.0, *self.fractions, 1.0], dtype=torch.float64)
        above = int((grid < fraction).sum())
        part = (fraction - grid[above - 1]) / (grid[above] - grid[above - 1])
        return table[above - 1].lerp(table[above], part.item())

    def check(self, model: Any) -> None:
        """Raises InputError unless this calibration was made for `model` (the same weights)."""
        found = fingerprint(model)
        if found != self.fingerprint:
            raise InputError(
                f"this calibration was made for {self.model} (weights {self.fingerprint[:12]}), got a model with weights "
                f"{found[:12]}; make one with regard.cache.calibrate(model, texts)"
            )

    def save(self, path: str | Path) -> Path:
        """Writes a small JSON file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(path.name + ".tmp")
        scratch.write_text(json.dumps({"format": FORMAT} | asdict(self)), encoding="utf-8")
        scratch.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            InputError: no such file, or not a calibration.
        """
        try:
            held: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"no calibration at {path}: {error.strerror}") from None
        except ValueError:
            raise InputError(f"{path} is not a calibration: it is not JSON") from None
        if not isinstance(held, dict) or held.pop("format", None) != FORMAT:
            raise InputError(f"{path} is not a calibration of the format {FORMAT}")
        try:
            shares = tuple(tuple(map(tuple, layers)) for layers in held.pop("shares"))
            fractions = tuple(held.pop("fractions"))
            return cls(**held, fractions=fractions, shares=shares)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is a damaged calibration: {error}") from None


def fingerprint(model: Any) -> str:
    """A sha256 of the model's shape and of a sample of every weight: cheap, and different for every fine-tuning step."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().flatten()
        if not flat.is_floating_point() or not len(flat):
            continue
        sample = flat[:: max(1, len(flat) // 256)][:256].float().cpu()
        digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def calibrate(
    model: Any,
    texts: Sequence[str] | str | None = None,
    *,
    tokenizer: Any = None,
    tokens: int = 1024,
    fractions: Sequence[float] = FRACTIONS,
) -> Calibration:
    """Makes the profile of a model's KV heads that `Calibrated` budgets use.

    Args:
        model: a decoder with a tokenizer (`regard.load` gives one).
        texts: plain texts like those the model will read; None takes English that comes with Python.
        tokenizer: when it is not the model's own.
        tokens: how much of each text is used, at most.
        fractions: the grid of the profile.

    Returns:
        a `Calibration`; `save` it beside the model.

    Raises:
        InputError: an empty text or one of under 64 tokens.

    Cost: see the module; three texts of 1024 tokens take under a minute of one core for SmolLM2-135M.
    """
    from regard.cache.reconstruction import reconstruct
    from regard.pretrained import provenance, tokenizer_of

    tokenizer = tokenizer_of(model, tokenizer)
    if texts is None:
        from regard.texts import default_text

        texts = [default_text(tokenizer, tokens)]
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise InputError.of("texts", given=texts, expected="at least one text")
    total, used = None, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :tokens]
        if ids.shape[1] < 64:
            raise InputError(
                f"a text to calibrate on must have at least 64 tokens, got {ids.shape[1]}"
            )
        peaks = reconstruct(model, ids.to(model.device), tokenizer=tokenizer)
        shares = torch.stack([head_shares(peaks, fraction) for fraction in fractions])
        total = shares if total is None else total + shares
        used += ids.shape[1]
    assert total is not None
    mean = total / len(texts)
    return Calibration(
        model=str(provenance(model, tokenizer, digest=False)["name"]),
        fingerprint=fingerprint(model),
        texts=len(texts),
        tokens=used,
        fractions=tuple(float(f) for f in fractions),
        shares=tuple(
            tuple(tuple(round(x, 5) for x in heads) for heads in layers) for layers in mean.tolist()
        ),
    )


def head_shares(
    peaks: Float[Tensor, "layers kv_heads tokens"], fraction: float
) -> Float[Tensor, "layers kv_heads"]:
    """The share of its keys that each head keeps when the best `fraction` of all keys is kept."""
    flat = peaks.flatten()
    kept = torch.zeros_like(flat, dtype=torch.float64)
    kept[flat.argsort(descending=True, stable=True)[: round(fraction * len(flat))]] = 1
    return kept.view_as(peaks).mean(-1)
