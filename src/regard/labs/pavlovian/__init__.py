"""Attention as classical conditioning: keys are cues, values are outcomes, queries ask what a cue predicts (arXiv 2508.08289).

A memory M in R^{d_v x d_k} holds associations and is read by r(q) = M q. Learning rules (`rules`), one trial (k, v) at a time:

    Hebbian (linear attention)       M <- M + b v k^T
    decaying trace (retention)       M <- g M + b v k^T
    Rescorla-Wagner (delta rule)     M <- M + b (v - M k) k^T
    Oja                              M <- M + b (v k^T - |v|^2 M)
    BCM                              M <- M + b v * (v - theta) k^T,     theta <- theta + b (v^2 - theta)

Causal linear attention without normalisation is the Hebbian rule read by q_t. Oja's and BCM's rules are stated for one neuron
with its outcome given, forms that the abstracts leave open.

What follows (`theory`), each with its experiment:

* capacity (`capacity`): n associations disturb each other by (n - 1) / d_k on average, and in the worst case once n reaches
  about sqrt(d_k); a chain of D memories compounds to (1 + (n - 1) / d)^D - 1; heads with key codes of their own share the
  noise, heads with projections of one code do not;
* conditioning (`conditioning`): acquisition, extinction, blocking, overshadowing, inhibition, generalisation, delays and
  second-order conditioning, which tell the rules apart;
* learnt readers (`learned`): one-layer models trained to predict outcomes, put through the same protocols in context;
* heads (`heads`): the effective dimension of real keys, and with it how many associations are safe.

Source: "Understanding Transformers through the Lens of Pavlovian Conditioning", 2025; its third version is called "Attention
as Conditioning: What Classical Learning Theory Predicts About Linear Transformers".
"""

from __future__ import annotations

from regard.labs.pavlovian.capacity import (
    chain_errors,
    cleaned_chain,
    cross_talk,
    first_overload,
    projected_heads,
    redundant_heads,
)
from regard.labs.pavlovian.conditioning import Phenomena, phenomena
from regard.labs.pavlovian.heads import (
    HeadCapacity,
    KeyReader,
    centred,
    head_capacity_report,
    participation_ratio,
    safe_associations,
)
from regard.labs.pavlovian.laboratory import Pavlovian
from regard.labs.pavlovian.learned import (
    DeltaReader,
    HebbianReader,
    Reader,
    SoftmaxReader,
    conditioned_responses,
    draw_streams,
    train_reader,
)
from regard.labs.pavlovian.rules import (
    BCM,
    Decaying,
    Hebbian,
    Oja,
    RescorlaWagner,
    Rule,
    memories,
    responses,
)
from regard.labs.pavlovian.theory import (
    blocked_response,
    chain_error,
    chain_success,
    cross_talk_error,
    delta_acquisition,
    majority_failure,
    overshadowed_response,
    worst_case_count,
)

__all__ = [
    "BCM",
    "Decaying",
    "DeltaReader",
    "HeadCapacity",
    "Hebbian",
    "HebbianReader",
    "KeyReader",
    "Oja",
    "Pavlovian",
    "Phenomena",
    "Reader",
    "RescorlaWagner",
    "Rule",
    "SoftmaxReader",
    "blocked_response",
    "centred",
    "chain_error",
    "chain_errors",
    "chain_success",
    "cleaned_chain",
    "conditioned_responses",
    "cross_talk",
    "cross_talk_error",
    "delta_acquisition",
    "draw_streams",
    "first_overload",
    "head_capacity_report",
    "majority_failure",
    "memories",
    "overshadowed_response",
    "participation_ratio",
    "phenomena",
    "projected_heads",
    "redundant_heads",
    "responses",
    "safe_associations",
    "train_reader",
    "worst_case_count",
]
