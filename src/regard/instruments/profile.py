"""What kind of pattern a head has: shares of attention by place, the profile over distances, the receptive field.

Shares of one row (they add up to 1 with the rest, or to the row's mass with learned sinks):
 sink   the first visible key (unless it lies within the local window)
 local  the last `window` keys, the query's own included
 global everything else
and two quantities beside them: `uniformity` exp(H)/n, the share of the visible keys that the row effectively uses, and
`reach`, the distance within which 90 % of the attention of an average row lies, not counting the sink.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regard._errors import InputError
from regard.engine import Block
from regard.instruments.base import HeadMeasure, RowInstrument


class PatternProfile(RowInstrument):
    """Sink / local / global shares, uniformity and the diagonal bands of each head (causal self-attention).

    Args:
        window: how many keys count as local.
        width: how many diagonals are kept in the distance profile.

    Cost: reads `width` numbers for each row; memory O(heads x width).

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> profile, zeros = PatternProfile(window=1, width=4), torch.zeros(1, 1, 4, 8)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([profile]))  # uniform rows
    >>> {name: round(measure["L0H0"], 3) for name, measure in profile.compute().items()}
    {'sink share': 0.271, 'local share': 0.521, 'global share': 0.208, 'uniformity': 1.0, 'reach': 1.0}
    >>> profile.bands()["", 0][0, 1]  # weight on the previous key: (0 + 1/2 + 1/3 + 1/4) / 4
    tensor(0.2708)
    """

    states = {"bands": "sum", "sink bands": "sum", "band rows": "sum"}
    quantities = {
        "sink share": (
            "share",
            "attention on the first visible key, when it is outside the local window",
        ),
        "local share": ("share", "attention on the last `window` keys, the query's own included"),
        "global share": ("share", "attention on every other key"),
        "uniformity": (
            "share",
            "exp(entropy) / visible keys: the share of the visible keys effectively used",
        ),
    }

    def __init__(self, window: int = 16, width: int = 128) -> None:
        if not 1 <= window <= width <= 512:
            raise InputError(
                f"profile needs 1 <= window <= width <= 512, got window={window}, width={width}"
            )
        super().__init__()
        self.window, self.width = window, width

    def weights(self, block: Block) -> None:
        if block.site.kind == "cross" or not block.site.causal:
            return
        diagonals = block.diagonals(self.width)
        local = diagonals[..., : self.window].sum(-1)
        first = block.first_key
        away = block.positions[None, :] - first  # tokens back to the sink, `[batch|1, rows]`
        outside = (away >= self.window)[:, None]
        sink = block.first_weight * outside
        counts = block.counts if block.call.sinks is None else block.counts + 1
        self.add_rows(
            block,
            **{
                "sink share": sink,
                "local share": local,
                "global share": (block.mass - local - sink).clamp_min(0),
                "uniformity": block.entropy.exp() / counts[:, None],
            },
        )
        rows = diagonals if block.valid is None else diagonals * block.valid[:, None, :, None]
        key = block.site.key
        self.accumulate("bands", key, rows.sum((0, 2)) * block.share)
        if int(away.min()) < self.width:
            inside = sink if block.valid is None else sink * block.valid[:, None]
            at = away.clamp(0, self.width)[:, None].expand(inside.shape)
            sinks = inside.new_zeros(*inside.shape[:2], self.width + 1).scatter_add_(-1, at, inside)
            self.accumulate("sink bands", key, sinks[..., : self.width].sum(0) * block.share)
        valid = len(block.rows) * rows.shape[0] if block.valid is None else float(block.valid.sum())
        rows_stood_for = torch.tensor([valid * block.share], dtype=torch.float64)
        self.accumulate("band rows", key, rows_stood_for)

    def bands(self) -> dict[tuple[str, int], Tensor]:
        """`[heads, width]` for each site: mean attention on the key j tokens back, j = 0 .. width - 1."""
        return {
            key: total / float(self.state["band rows"][key])
            for key, total in self.state["bands"].items()
        }

    def compute(self) -> dict[str, HeadMeasure]:
        found = super().compute()
        reach: dict[tuple[str, int], Tensor] = {}
        for key, bands in self.bands().items():
            if key not in found["local share"].values:  # a call that was interrupted
                continue
            sinks = self.state["sink bands"].get(key, torch.zeros_like(bands))
            sinks = sinks / float(self.state["band rows"][key])
            cumulative = (bands.double() - sinks).cumsum(-1)
            beyond = found["local share"].values[key] + found["global share"].values[key]
            wanted = 0.9 * beyond.double()[:, None]
            inside = cumulative >= wanted
            radius = torch.where(inside.any(-1), inside.to(torch.uint8).argmax(-1), self.width)
            reach[key] = radius.float()
        found["reach"] = HeadMeasure(
            "reach",
            "tokens",
            reach,
            {},
            f"distance that holds 90 % of the attention beyond the sink (at most {self.width})",
        )
        return found
