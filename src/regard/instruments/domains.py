"""Domain sensitivity of heads: busy on one kind of text, parked on the first token on another.

The dormancy score of head h on a window of text is its mean attention on the first key, over the queries from the ninth on,

    D_h(window) = mean over i >= 8 of A[i, 0]

A head is sensitive to the domain when D differs between windows of two kinds of text by more than windows of one kind differ
among themselves: the labels of the windows are permuted, and each head's difference is compared with the largest difference
of any head under each permutation, so that p holds for all heads at once.

Source: Guo et al. 2024, arXiv 2410.13835 (active-dormant heads); the score and the test are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard._errors import InputError
from regard._progress import track
from regard.attach import Session
from regard.coordinates import Head
from regard.engine import AttentionCall, Block
from regard.instruments.base import HeadMeasure, Instrument, SiteKey
from regard.instruments.observe import token_ids
from regard.instruments.permutation import permutation_test
from regard.pretrained import tokenizer_of

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes


class Dormancy(Instrument):
    """Each sequence's mean attention on the first visible key, over queries at least `from_query` tokens after it.

    Cost: one column of each block; memory O(sequences x heads).

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> dormancy, zeros = Dormancy(from_query=1), torch.zeros(2, 1, 3, 8)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([dormancy]))  # 1/2 and 1/3
    >>> dormancy.compute()["", 0]
    tensor([[0.4167],
            [0.4167]])
    """

    states = {"mass": "list", "rows": "list"}

    def __init__(self, from_query: int = 8) -> None:
        super().__init__()
        self.from_query = from_query

    def before(self, call: AttentionCall) -> None:
        held = self.state["mass"].setdefault(call.site.key, [])
        batch = call.query.shape[0]
        if call.query_offset == 0 or not held or held[-1].shape[0] != batch:
            held.append(torch.zeros(batch, call.heads, dtype=torch.float64))
            self.state["rows"].setdefault(call.site.key, []).append(
                torch.zeros(batch, 1, dtype=torch.float64)
            )

    def weights(self, block: Block) -> None:
        late = block.positions[None, :] - block.first_key >= self.from_query
        if block.valid is not None:
            late = late & block.valid
        mass = block.first_weight
        late = late.expand(mass.shape[0], -1)
        key = block.site.key
        mass = torch.where(late[:, None], mass, 0).double()
        self.state["mass"][key][-1] += mass.sum(-1).cpu() * block.share
        self.state["rows"][key][-1] += late.double().sum(-1, keepdim=True).cpu() * block.share

    def compute(self) -> dict[SiteKey, Tensor]:
        """`{(stack, layer): [sequences, heads]}`, NaN for a sequence without queries that far in."""
        rows = self.state["rows"]
        return {
            key: (torch.cat(mass) / torch.cat(rows[key])).float()
            for key, mass in self.state["mass"].items()
        }


@dataclass(slots=True)
class DomainSensitivity:
    """Dormancy of every head in two domains.

    Attributes:
        means: for each domain, the mean dormancy score of every head.
        difference: first domain minus second (positive: more dormant on the first).
        p: two-sided permutation p-value of each head; `corrected` holds for all heads at once (maximum statistic).
        scores: for each domain `{(stack, layer): [windows, heads]}`.
    """

    domains: tuple[str, str]
    means: dict[str, HeadMeasure]
    difference: HeadMeasure
    p: HeadMeasure
    corrected: HeadMeasure
    scores: dict[str, dict[SiteKey, Tensor]]
    window: int

    def sensitive(self, alpha: float = 0.01, least: float = 0.0) -> list[tuple[Head, float]]:
        """Heads with corrected p < `alpha` and a difference of at least `least`, largest first."""
        p = dict(self.corrected.items())
        found = [(h, d) for h, d in self.difference.items() if p[h] < alpha and abs(d) >= least]
        return sorted(found, key=lambda pair: -abs(pair[1]))

    def sentence(self) -> str:
        """The finding in one line."""
        a, b = self.domains
        found = self.sensitive()
        heads = sum(len(v) for v in self.difference.values.values())
        if not found:
            return f"No head of {heads} is reliably more dormant on {a} or on {b} (corrected p < 0.01)."
        head, gap = found[0]
        more, less = (a, b) if gap > 0 else (b, a)
        return (
            f"{len(found)} of {heads} heads park on the first token to a different degree on {a} and on {b} "
            f"(corrected p < 0.01); the largest gap is {head}, {abs(gap):.2f} more on {more} than on {less}."
        )

    def to_frame(self) -> polars.DataFrame:
        """Columns `stack, layer, head`, one for each domain, `difference, p, corrected`."""
        import polars

        a, b = (dict(self.means[name].items()) for name in self.domains)
        p, corrected = dict(self.p.items()), dict(self.corrected.items())
        rows = [
            (h.stack, h.layer, h.head, a[h], b[h], d, p[h], corrected[h])
            for h, d in self.difference.items()
        ]
        columns = ["stack", "layer", "head", *self.domains, "difference", "p", "corrected"]
        return polars.DataFrame(rows, schema=columns, orient="row")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Every head by its dormancy in the two domains (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(5, 5), layout="constrained")
        a, b = (torch.tensor([v for _, v in self.means[name].items()]) for name in self.domains)
        sure = torch.tensor([v < 0.01 for _, v in self.corrected.items()])
        ax.plot([0, 1], [0, 1], color="0.8", zorder=0)
        ax.plot(
            a[~sure].numpy(),
            b[~sure].numpy(),
            "o",
            color="0.6",
            ms=4,
            label="no reliable difference",
        )
        ax.plot(a[sure].numpy(), b[sure].numpy(), "o", ms=5, label="corrected p < 0.01")
        ax.set(
            xlabel=f"mass on the first token, {self.domains[0]}",
            ylabel=f"mass on the first token, {self.domains[1]}",
        )
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        return f"DomainSensitivity: {self.sentence()}"


def domain_sensitivity(
    model: nn.Module,
    a: Any = None,
    b: Any = None,
    *,
    names: tuple[str, str] | None = None,
    windows: int = 16,
    window: int = 128,
    from_query: int = 8,
    permutations: int = 2000,
    seed: int = 0,
) -> DomainSensitivity:
    """Which heads park on the first token in one kind of text and work in the other.

    Args:
        a, b: a text, several texts, or token ids of each domain, cut into windows of `window` tokens, of which the first
            `windows` are read. By default Python source of the standard library, and English prose.
        names: what to call the domains; "a" and "b", or "code" and "prose" for the default texts.
        from_query: queries nearer to the start than this do not count.

    Raises:
        InputError: a text is shorter than two windows.

    Cost: a forward pass over `2 x windows x window` tokens, attention in blocks; then permutations x windows x heads.
    """
    from regard import texts

    if (a is None) != (b is None):
        raise InputError(
            "give the texts of both domains, or neither for Python code and English prose"
        )
    if a is None:
        a, b = texts.code(windows * window * 5), texts.prose(windows * window * 6)
        names = names or ("code", "prose")
    names = names or ("a", "b")
    scores: dict[str, dict[SiteKey, Tensor]] = {}
    for name, text in track(list(zip(names, (a, b), strict=True)), "Reading two kinds of text"):
        rows = cut(model, text, window)[:windows]
        if len(rows) < 2:
            raise InputError(
                f"the texts of {name!r} fill {len(rows)} windows of {window} tokens, at least 2 are needed"
            )
        instrument = Dormancy(from_query)
        with torch.inference_mode(), Session(model, instrument):
            for part in rows.split(max(1, 2048 // window)):
                model(**token_ids(model, part))
        scores[name] = instrument.compute()
    return compare(scores, window=window, permutations=permutations, seed=seed)


def compare(
    scores: Mapping[str, dict[SiteKey, Tensor]],
    *,
    window: int,
    permutations: int = 2000,
    seed: int = 0,
) -> DomainSensitivity:
    """Compares the dormancy scores `{domain: {(stack, layer): [windows, heads]}}` of two domains."""
    first, second = scores
    keys = list(scores[first])
    sizes = [scores[first][key].shape[1] for key in keys]
    tables = [torch.cat([scores[name][key] for key in keys], 1) for name in (first, second)]
    difference, p, corrected = permutation_test(*tables, permutations=permutations, seed=seed)

    def measure(name: str, unit: str, flat: Tensor, definition: str) -> HeadMeasure:
        return HeadMeasure(
            name, unit, dict(zip(keys, flat.split(sizes), strict=True)), {}, definition
        )

    means = {
        name: measure(
            f"dormancy on {name}",
            "share",
            table.mean(0),
            "mean attention on the first key, queries from the ninth on",
        )
        for name, table in zip((first, second), tables, strict=True)
    }
    return DomainSensitivity(
        (first, second),
        means,
        measure(
            "dormancy difference",
            "share",
            difference,
            f"dormancy on {first} minus dormancy on {second}",
        ),
        measure("p", "probability", p, "two-sided permutation p-value"),
        measure(
            "corrected p",
            "probability",
            corrected,
            "permutation p-value against the largest difference of any head",
        ),
        dict(scores),
        window,
    )


def cut(model: nn.Module, text: Any, window: int) -> Tensor:
    """`[windows, window]` token ids of a text, of several texts (each cut by itself), or of token ids."""
    if isinstance(text, Tensor):
        rows = text if text.dim() == 2 else text[None]
        return torch.cat([row[: len(row) // window * window].view(-1, window) for row in rows])
    tokenizer = tokenizer_of(model)
    pieces = [text] if isinstance(text, str) else list(text)
    rows = [
        torch.tensor(tokenizer(piece, verbose=False)["input_ids"], dtype=torch.long)
        for piece in pieces
    ]
    return torch.cat([row[: len(row) // window * window].view(-1, window) for row in rows])
