"""A one-layer transformer learns facts and is taught to answer questions about them (arXiv 2508.00901).

Facts: each of S subjects s has an answer a(s), and K of the |R| relation templates r, drawn without replacement. The model
reads `s, r, a(s)` in pre-training, and is trained on the next token after s and after r; the least loss is log K + 0. It is
fine-tuned on questions `s, p` of N subjects, p a token that pre-training never showed, and asked about the other S - N.

The model has one-hot embeddings x, one merged attention matrix W and an MLP:

    alpha = softmax_k(x_q^T W x_k),    h = sum_k alpha_k x_k,    logits = W2 relu(W1 h).

What the paper says happens, and `FilteringStoring` checks:

1. pre-training reaches the least loss; attention at the template stays on subject and template and leaves other tokens out
   (filtering), the MLP stores directions of templates;
2. fine-tuning teaches p to trigger these directions: W1 moves mostly by one direction, in the column of p. Facts that
   fine-tuning never touched can then be extracted, with an error that falls like exp(-N K^2 log|R| / (2 |R|^2));
3. with too few templates touched, facts are stored and cannot be extracted.

Theorems of the paper are about a data distribution that only its abstracts describe; the world, the model and the training
here are a reconstruction. With as many answers as subjects, an untouched fact has an answer that fine-tuning never named, so
that it can only be extracted through the trigger.

Functions of `theory` are predictions; `facts`, `models`, `training` and `measures` the experiment.

Source: "Filtering with Self-Attention and Storing with MLP: One-Layer Transformers Can Provably Acquire and Extract
Knowledge", 2025; its fourth version is called "Provable Knowledge Acquisition and Extraction in One-Layer Transformers".
"""

from __future__ import annotations

from regard.labs.filtering_storing.facts import Facts, Prompts, draw_facts
from regard.labs.filtering_storing.laboratory import FilteringStoring
from regard.labs.filtering_storing.measures import (
    Extraction,
    attention_shares,
    extraction,
    span_share,
    token_share,
    update_rank_profile,
)
from regard.labs.filtering_storing.models import AttentionMLP, AttentionOnly, LowRank
from regard.labs.filtering_storing.theory import (
    extraction_error_bound,
    pretraining_floor,
    template_coverage,
    theory_exponent,
)
from regard.labs.filtering_storing.training import finetune, loss, pretrain

__all__ = [
    "AttentionMLP",
    "AttentionOnly",
    "Extraction",
    "Facts",
    "FilteringStoring",
    "LowRank",
    "Prompts",
    "attention_shares",
    "draw_facts",
    "extraction",
    "extraction_error_bound",
    "finetune",
    "loss",
    "pretrain",
    "pretraining_floor",
    "span_share",
    "template_coverage",
    "theory_exponent",
    "token_share",
    "update_rank_profile",
]
