"""Measures: pure functions of logits and samples, no model, no state."""

from regard.metrics.agreement import kl_divergence, negative_log_likelihood, top1_agreement
from regard.metrics.bootstrap import Estimate, bootstrap, paired, student

__all__ = [
    "Estimate",
    "bootstrap",
    "kl_divergence",
    "negative_log_likelihood",
    "paired",
    "student",
    "top1_agreement",
]
