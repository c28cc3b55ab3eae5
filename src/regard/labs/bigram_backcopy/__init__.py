"""Bigram-Backcopy: how a sink, a drained value and a residual peak come about together (arXiv 2410.13835).

The language: x_0 = <s>; x_1 is drawn from the marginal without the triggers; then, for i >= 1,

    x_(i+1) = x_(i-1)        if x_i is a trigger        (copy back: a head has to be active)
    x_(i+1) ~ P[x_i, .]      otherwise                  (a bigram: the MLP knows it, the head has nothing to add).

A head that must attend somewhere parks on <s> at ordinary queries and drains the value of <s>. With the logits of a query being
alpha to <s> and 0 to the W other visible tokens, values beta (of <s>) and xi_j, and log p supplied by the MLP,

    o = (e^alpha beta + sum_j xi_j) / (e^alpha + W),    loss = KL(p || softmax(log p + o)),

gradient flow has alpha = 1/2 log t + O(1) while beta is held, and beta -> c 1 - e^-alpha sum_j xi_j while alpha is held
(`theory`). `Backcopy` is the language, `Models` are transformers of one or more layers with softmax or ReLU attention, `train`
watches them with the library's instruments, and `BigramBackcopy` puts both beside each other.

Differences from the paper's setting, for size: English in lower case with its most frequent characters, narrower models,
shorter sequences and a larger learning rate; no delimiter in the vocabulary.

Source: Guo et al. 2024, "Active-Dormant Attention Heads".
"""

from __future__ import annotations

from regard.labs.bigram_backcopy.data import Backcopy, backcopy, transitions
from regard.labs.bigram_backcopy.laboratory import BackcopyResult, BigramBackcopy
from regard.labs.bigram_backcopy.models import Models, Size
from regard.labs.bigram_backcopy.theory import (
    drain_limit,
    drain_rate,
    extreme_loss,
    extreme_velocity,
    sink_logit,
    sink_logit_ode,
)
from regard.labs.bigram_backcopy.training import Course, Recipe, intervene, train

__all__ = [
    "Backcopy",
    "BackcopyResult",
    "BigramBackcopy",
    "Course",
    "Models",
    "Recipe",
    "Size",
    "backcopy",
    "drain_limit",
    "drain_rate",
    "extreme_loss",
    "extreme_velocity",
    "intervene",
    "sink_logit",
    "sink_logit_ode",
    "train",
    "transitions",
]
