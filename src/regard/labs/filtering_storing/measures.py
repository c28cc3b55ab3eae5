"""What is read off trained models: where attention goes, what can be extracted, and the shape of the update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.labs.filtering_storing.facts import Facts, Prompts
from regard.labs.filtering_storing.models import attend
from regard.labs.filtering_storing.training import loss


def attention_shares(
    attention: Float[Tensor, "runs vocabulary vocabulary"], prompts: Prompts
) -> dict[str, Float[Tensor, " runs"]]:
    """Where the last token of `s, ..., r` looks: mean weight on the subject, on all tokens between, and on itself."""
    weights = attend(attention.detach(), prompts.tokens).mean(1)
    return {
        "subject": weights[:, 0],
        "between": weights[:, 1:-1].sum(-1),
        "itself": weights[:, -1],
    }


@dataclass(frozen=True, slots=True)
class Extraction:
    """Answers to the questions of fine-tuned subjects (`seen`) and of all others (`unseen`); a number a run.

    Accuracies take the likeliest of all tokens; losses are nats.
    """

    seen: Float[Tensor, " runs"]
    unseen: Float[Tensor, " runs"]
    seen_loss: Float[Tensor, " runs"]
    unseen_loss: Float[Tensor, " runs"]


@torch.no_grad()
def extraction(model: nn.Module, facts: Facts, count: int) -> Extraction:
    """Asks about all subjects, of which the first `count` were fine-tuned on."""
    asked = facts.questions()
    right = (model(asked.tokens).argmax(-1) == asked.targets[..., 0]).float()
    rest = Prompts(asked.tokens[:, count:], asked.targets[:, count:])
    return Extraction(
        right[:, :count].mean(1),
        right[:, count:].mean(1),
        loss(model, asked.first(count)),
        loss(model, rest),
    )


def update_rank_profile(
    before: Float[Tensor, "*runs rows columns"], after: Float[Tensor, "*runs rows columns"]
) -> Float[Tensor, "*runs ranks"]:
    """Shares of the squared norm of `after - before` in its singular values, largest first.

    >>> update_rank_profile(torch.zeros(2, 2), torch.diag(torch.tensor([3.0, 1.0])))
    tensor([0.9000, 0.1000])
    """
    energy = torch.linalg.svdvals(after - before).square()
    return energy / energy.sum(-1, keepdim=True)


def token_share(
    before: Float[Tensor, "*runs vocabulary width"],
    after: Float[Tensor, "*runs vocabulary width"],
    token: int,
) -> Float[Tensor, "*runs"]:
    """Norm of the update of one token's features over the norm of the whole update.

    >>> token_share(torch.zeros(2, 2), torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 1)
    tensor(0.8000)
    """
    moved = after - before
    return moved[..., token, :].norm(dim=-1) / moved.flatten(-2).norm(dim=-1)


def span_share(
    direction: Float[Tensor, "*runs width"],
    features: Float[Tensor, "*runs vocabulary width"],
    tokens: Int[Tensor, " tokens"],
) -> Float[Tensor, "*runs"]:
    """Share of the squared norm of a direction that lies in the span of some tokens' features.

    A random direction has (rank of these features) / width on average.

    >>> span_share(torch.tensor([3.0, 4.0, 0.0]), torch.eye(3), torch.tensor([1, 2]))
    tensor(0.6400)
    """
    basis = torch.linalg.qr(features[..., tokens, :].mT).Q
    inside = (direction[..., None, :] @ basis).squeeze(-2)
    return inside.square().sum(-1) / direction.square().sum(-1)
