"""When does a sink emerge? Small language models trained side by side, one factor changed at a time (arXiv 2410.10781).

A key k is a sink of a head when the queries that see it give it much:

    a_k = 1 / (T - k + 1) sum_{i >= k} A[i, k],        Sink_k = 100 x share of (head, sequence) pairs with a_k > eps.

Attention that spreads evenly has a_1 = H_T / T, so nothing is a sink at the start. The paper trains Llama-shaped models of 60
million parameters and finds that the sink appears once a model has learnt enough (a larger learning rate and some weight decay
make more of it, little text none), that data and loss decide where it is (a token fixed at a position takes it there), and that
it serves as a learnt key bias which softmax's sum-to-one rule makes necessary: a learnt key with value zero takes it over, and
attention without normalisation has none.

`ARMS` lists the settings, `train` runs those of one architecture at once from all seeds, `Course` is what was seen on the way,
`film` and `animate` draw it, and `SinkEmergence` puts the paper's statements beside it.

Deviations: three layers and 160,000 parameters on 700,000 characters instead of ten layers on five billion tokens, with a higher
rate for it; sequences are windows at random places; in the prefix arm a_k counts the rows from k on; no kernel with a learnt map,
no ALiBi, no absolute positions.

The paper's sink appears after a billion tokens, and no setting tried here comes near: the first token was no sink after 4 million
bytes at a rate of 0.004 (4 layers, one seed), nor after 1.3 million at 0.01 (3 seeds, recorded for `attention-sink-emerges`).
In that run a token fixed at the second position was a sink in more than 5 % of the heads by step 300 in each of three seeds (2.7
to 16.7 % at the end), and a learnt key with value 0 in 0, 6.5 and 30 %: seeds differ too much for a verdict.

Source: Gu, Pang, Du, Liu, Zhang, Du, Wang, Lin 2024, "When Attention Sink Emerges in Language Models: An Empirical View".
"""

from __future__ import annotations

from regard.labs.sink_emergence.arms import ARMS, FACTORS, Arm, arms_of
from regard.labs.sink_emergence.attention import (
    OPERATIONS,
    Operation,
    attention_weights,
    fused_softmax,
)
from regard.labs.sink_emergence.course import Course, join, side_by_side
from regard.labs.sink_emergence.data import Corpus, batch, corpus, probes, windows
from regard.labs.sink_emergence.film import animate, film
from regard.labs.sink_emergence.laboratory import SinkEmergence, SinkResult
from regard.labs.sink_emergence.metric import (
    causal_mask,
    even_importance,
    prefix_mask,
    proxy_weights,
    relative_importance,
    sink_rate,
    token_importance,
    window_mask,
)
from regard.labs.sink_emergence.models import Models, Size
from regard.labs.sink_emergence.predictions import PREDICTIONS, Prediction, compare
from regard.labs.sink_emergence.training import AdamW, Recipe, losses, masks, repeated_rate, train

__all__ = [
    "ARMS",
    "AdamW",
    "Arm",
    "Corpus",
    "Course",
    "FACTORS",
    "Models",
    "OPERATIONS",
    "Operation",
    "PREDICTIONS",
    "Prediction",
    "Recipe",
    "SinkEmergence",
    "SinkResult",
    "Size",
    "animate",
    "arms_of",
    "attention_weights",
    "batch",
    "causal_mask",
    "compare",
    "corpus",
    "even_importance",
    "film",
    "fused_softmax",
    "join",
    "losses",
    "masks",
    "prefix_mask",
    "probes",
    "proxy_weights",
    "relative_importance",
    "repeated_rate",
    "side_by_side",
    "sink_rate",
    "token_importance",
    "train",
    "window_mask",
    "windows",
]
