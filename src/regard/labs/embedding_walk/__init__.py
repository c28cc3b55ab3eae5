"""A decoder as a walk in embedding space (arXiv 2308.10874): its steps, what it aggregates, and whether vectors add up concepts.

The view: each layer moves the state of a token, h_{l+1} = h_l + a_l + m_l; the last state is a context vector C, whose products
with the output embeddings give the law of the next token. Attention aggregates over tokens; how much of that needs its
association of queries and keys is an open question of the source, as is whether vectors are sums of concepts.

The laboratory compares with theory what can be computed:

* an untrained model's steps do not depend on one another: it is sqrt(sum |step|^2) from its start (`walk`);
* sums of random vectors: how often the choice that shares a word with a context scores highest, by the words that are summed, and
  how much one constant vector in front of every text spoils (`concepts`);
* the loss as attention is mixed with a running mean: where counts are enough it costs nothing, where a pair must be found it
  costs all (`aggregation`).

The walk of a model of your own: `regard.instruments.embedding_walk`. `UniformWeights`, `layer_states`, `prefix_scores` and the
others read pretrained decoders as well. Measures of the walk and the mixtures of weights are ours: the source describes them in
words.
"""

from __future__ import annotations

from regard.labs.embedding_walk.aggregation import (
    DistanceMeans,
    DistanceWeights,
    ReplacedWeights,
    SelfWeights,
    UniformWeights,
    mean_by_distance,
)
from regard.labs.embedding_walk.concepts import (
    activated,
    aggregate,
    average,
    choose,
    counted,
    layer_states,
    normalise,
    padded,
    parameterless_logits,
    prefix_scores,
    soft_cluster,
)
from regard.labs.embedding_walk.experiment import (
    MixingCurve,
    bags,
    best_bag_nats,
    displacements,
    lookups,
    measured_choices,
    mixing_curve,
    trained,
    untrained_walks,
)
from regard.labs.embedding_walk.laboratory import EmbeddingWalk
from regard.labs.embedding_walk.theory import (
    bag_nats,
    choice_accuracy,
    rising_weights,
    superposition_signal,
    unrelated_displacement,
    unrelated_tortuosity,
)

__all__ = [
    "DistanceMeans",
    "DistanceWeights",
    "EmbeddingWalk",
    "MixingCurve",
    "ReplacedWeights",
    "SelfWeights",
    "UniformWeights",
    "activated",
    "aggregate",
    "average",
    "bag_nats",
    "bags",
    "best_bag_nats",
    "choice_accuracy",
    "choose",
    "counted",
    "displacements",
    "layer_states",
    "lookups",
    "mean_by_distance",
    "measured_choices",
    "mixing_curve",
    "normalise",
    "padded",
    "parameterless_logits",
    "prefix_scores",
    "rising_weights",
    "soft_cluster",
    "superposition_signal",
    "trained",
    "unrelated_displacement",
    "unrelated_tortuosity",
    "untrained_walks",
]
