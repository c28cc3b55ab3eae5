"""The model, without its MLP, and with a low-rank update; one leading axis of independent runs on every weight."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding_bag


def attend(
    attention: Float[Tensor, "runs vocabulary vocabulary"],
    tokens: Int[Tensor, "runs prompts length"],
) -> Float[Tensor, "runs prompts length"]:
    """`softmax_k(x_q^T W x_k)` of the last token over all tokens of its row: embeddings are one-hot, so W holds the scores."""
    places = tokens[..., -1:] * attention.shape[-1] + tokens
    scores = attention.flatten(1).gather(1, places.flatten(1)).view(tokens.shape)
    return scores.softmax(-1)


def mix(
    table: Float[Tensor, "runs vocabulary width"],
    weights: Float[Tensor, "runs prompts length"],
    tokens: Int[Tensor, "runs prompts length"],
) -> Float[Tensor, "runs prompts width"]:
    """`sum_k alpha_k table[token_k]`, which is the table applied to h."""
    runs, vocabulary, width = table.shape
    places = (tokens + vocabulary * torch.arange(runs)[:, None, None]).flatten(0, 1)
    mixed = embedding_bag(
        places, table.flatten(0, 1), mode="sum", per_sample_weights=weights.flatten(0, 1)
    )
    return mixed.view(runs, -1, width)


class AttentionMLP(nn.Module):
    """`W2 relu(W1 h)`: attention filters, the MLP stores.

    Args:
        runs: independent models.
        vocabulary: tokens.
        width: neurons of the MLP.
        generator: draws W1 and W2 from N(0, 0.05^2); W begins at zero.

    Cost: `prompts (length + vocabulary) width` multiplications a run.

    >>> model = AttentionMLP(2, vocabulary=9, width=4, generator=torch.Generator())
    >>> model(torch.zeros(2, 5, 3, dtype=torch.long)).shape
    torch.Size([2, 5, 9])
    """

    def __init__(
        self, runs: int, vocabulary: int, width: int, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.attention = nn.Parameter(torch.zeros(runs, vocabulary, vocabulary))
        self.features = nn.Parameter(
            0.05 * torch.randn(runs, vocabulary, width, generator=generator)
        )
        """W1, a row for each token."""
        self.decoder = nn.Parameter(
            0.05 * torch.randn(runs, width, vocabulary, generator=generator)
        )
        """W2, a row for each neuron."""

    def forward(
        self, tokens: Int[Tensor, "runs prompts length"]
    ) -> Float[Tensor, "runs prompts vocabulary"]:
        """Logits of the token after each row."""
        return self.read(self.features, tokens)

    def read(self, features: Tensor, tokens: Tensor) -> Tensor:
        """The same with other features."""
        hidden = mix(features, attend(self.attention, tokens), tokens)
        return hidden.relu() @ self.decoder


class AttentionOnly(nn.Module):
    """`W_V h`: the same attention without an MLP. W and W_V begin at zero."""

    def __init__(self, runs: int, vocabulary: int) -> None:
        super().__init__()
        self.attention = nn.Parameter(torch.zeros(runs, vocabulary, vocabulary))
        self.values = nn.Parameter(torch.zeros(runs, vocabulary, vocabulary))
        """W_V, a row for each token that is read."""

    def forward(
        self, tokens: Int[Tensor, "runs prompts length"]
    ) -> Float[Tensor, "runs prompts vocabulary"]:
        """Logits of the token after each row."""
        return mix(self.values, attend(self.attention, tokens), tokens)


class LowRank(nn.Module):
    """A trained model whose W1 may move by a product of rank r only (LoRA, Hu et al. 2021, arXiv 2106.09685).

    The token side begins at N(0, 1/r) and the neuron side at zero, so that at first the column of a token moves as fast, on
    average, as in full training.
    """

    def __init__(self, model: AttentionMLP, rank: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        runs, vocabulary, width = model.features.shape
        self.tokens = nn.Parameter(
            torch.randn(runs, vocabulary, rank, generator=generator) / rank**0.5
        )
        self.neurons = nn.Parameter(torch.zeros(runs, rank, width))

    @property
    def features(self) -> Float[Tensor, "runs vocabulary width"]:
        """W1 with its update."""
        return self.model.features + self.tokens @ self.neurons

    def forward(
        self, tokens: Int[Tensor, "runs prompts length"]
    ) -> Float[Tensor, "runs prompts vocabulary"]:
        """Logits of the token after each row."""
        return self.model.read(self.features, tokens)
