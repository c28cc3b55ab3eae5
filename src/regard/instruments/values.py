"""Value-state drains: the first token's value vector is small, so that attention parked on it adds almost nothing.

    drain = ||v_first|| / mean_{other tokens} ||v_j||

for each head, on the values of the same head (Active-Dormant Attention Heads, arXiv 2410.13835). The norms of the keys, taken
after the position encoding, go with it: in a sink the key is small too and works by its direction (arXiv 2410.10781).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.engine import AttentionCall
from regard.instruments._tokens import first_token, prompt_keys, wide
from regard.instruments.base import HeadMeasure, Instrument


def first_and_rest(
    norms: Float[Tensor, "batch heads tokens"], valid: Bool[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "batch heads"], Float[Tensor, "batch heads"], Bool[Tensor, " batch"]]:
    """The number of the first real token, the mean over the other real tokens, and which rows have both.

    >>> import torch
    >>> norms, valid = torch.tensor([[[9.0, 1.0, 4.0, 6.0]]]), torch.tensor([[False, True, True, True]])
    >>> first_and_rest(norms, valid)[:2]
    (tensor([[1.]]), tensor([[5.]]))
    """
    start = first_token(valid, norms.shape[0], norms.device)
    first = norms.gather(-1, start[:, None, None].expand(-1, norms.shape[1], 1))[..., 0]
    total = torch.where(valid[:, None], norms, 0).sum(-1)
    others = valid.sum(-1) - 1
    return first, (total - first) / others.clamp_min(1)[:, None], others > 0


class ValueDrain(Instrument):
    """Norms of the first value and key of every head against those of the other tokens.

    Query heads of a group share the numbers of their KV head. Sequences of one token, which have nothing to compare, and
    decode steps, whose first token was seen before, are left out; every sequence counts the same.

    Results: "value drain" and "key norm ratio" (mean over sequences of the ratio), and the four mean norms behind them.

    Cost: one pass over keys and values, O(tokens x kv_heads x dim); memory O(heads).

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> drain, ones = ValueDrain(), torch.ones(1, 1, 5, 4)
    >>> value = ones.clone()
    >>> value[:, :, 0] = 0.1
    >>> _ = attend(AttentionCall.make(ones, ones, value), Pipeline([drain]))
    >>> round(drain.compute()["value drain"]["L0H0"], 4)
    0.1
    """

    states = dict.fromkeys(("value", "key", "value ratio", "key ratio", "sequences"), "sum")

    def after(self, call: AttentionCall) -> None:
        found = prompt_keys(call)
        if found is None:
            return
        key, value, valid = found
        site = call.site.key
        kept = None
        for name, vectors in (("value", value), ("key", key)):
            first, rest, kept = first_and_rest(wide(vectors).norm(dim=-1), valid)
            first, rest = first[kept].double(), rest[kept].double()
            pair = torch.stack([first.sum(0), rest.sum(0)])
            ratio = (first / rest.clamp_min(1e-30)).sum(0)
            self.accumulate(name, site, pair.repeat_interleave(call.group, -1).cpu())
            self.accumulate(f"{name} ratio", site, ratio.repeat_interleave(call.group, -1).cpu())
        assert kept is not None
        self.accumulate("sequences", site, kept.sum().double().cpu())

    def compute(self) -> dict[str, HeadMeasure]:
        def measure(name: str, unit: str, state: str, row: int | None, meaning: str) -> HeadMeasure:
            table = {}
            for site, total in self.state[state].items():
                count = self.state["sequences"][site]
                mean = (total if row is None else total[row]) / count
                table[site] = mean.float()  # 0 / 0 = NaN where no sequence had two tokens
            return HeadMeasure(name, unit, table, {}, meaning)

        rest = "mean norm over the other tokens"
        found = [
            measure("value drain", "ratio", "value ratio", None, f"||v_first|| / {rest}"),
            measure(
                "key norm ratio", "ratio", "key ratio", None, f"||k_first|| / {rest}, after RoPE"
            ),
            measure("first value norm", "norm", "value", 0, "||v|| of the first token"),
            measure("other value norm", "norm", "value", 1, f"||v||, {rest}"),
            measure("first key norm", "norm", "key", 0, "||k|| of the first token, after RoPE"),
            measure("other key norm", "norm", "key", 1, f"||k||, {rest}, after RoPE"),
        ]
        return {item.name: item for item in found}
