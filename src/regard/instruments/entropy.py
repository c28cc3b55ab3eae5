"""Attention entropy: how many keys a head spreads over.

H_t = -sum_s A[t,s] ln A[t,s] in nats. The normalised form divides by the largest possible value, ln n_t, where n_t is the
number of keys that query t may see; rows that see one key have no normalised entropy and are left out. exp(H_t) is the
effective number of keys.

The engine gets H from quantities that the softmax has already made: ln Z - E_A[score] (see `Block.entropy`). A learned sink
(GPT-OSS) counts as one more key.
"""

from __future__ import annotations

from regard.engine import Block
from regard.instruments.base import RowInstrument


class Entropy(RowInstrument):
    """Mean entropy of attention rows for each head, raw, normalised and as an effective number of keys.

    Cost: one pass over each block of weights; memory O(heads).

    >>> import torch, regard
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> entropy, zeros = Entropy(), torch.zeros(1, 2, 4, 8)
    >>> _ = attend(AttentionCall.make(zeros, zeros, zeros), Pipeline([entropy]))  # uniform rows
    >>> entropy.compute()["normalised entropy"].values["", 0]
    tensor([1., 1.])
    """

    quantities = {
        "entropy": ("nats", "mean over query rows of -sum A ln A"),
        "effective keys": ("keys", "mean over query rows of exp(entropy)"),
        "normalised entropy": (
            "share",
            "mean over query rows of entropy / ln(visible keys); 1 is uniform, 0 looks at one key",
        ),
    }

    def weights(self, block: Block) -> None:
        entropy, counts = block.entropy, block.counts
        if block.call.sinks is not None:
            counts = counts + 1
        normalised = entropy / counts.clamp_min(2).log()[:, None]
        self.add_rows(block, entropy=entropy, **{"effective keys": entropy.exp()})
        self.add_rows(block, counts > 1, **{"normalised entropy": normalised})
