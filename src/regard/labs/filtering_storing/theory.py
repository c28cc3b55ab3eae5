"""What the paper predicts of acquisition and extraction; the setting is in `regard.labs.filtering_storing`."""

from __future__ import annotations

import math

Number = float | int


def pretraining_floor(multiplicity: int) -> float:
    """The least loss after the subject, `log K` nats: K templates are equally likely. After the template it is 0."""
    return math.log(multiplicity)


def theory_exponent(finetuned: Number, multiplicity: Number, templates: int) -> float:
    """`x = N K^2 log|R| / (2 |R|^2)`, with N the effective number of fine-tuning samples (all of them here).

    >>> round(theory_exponent(16, 3, 24), 3)
    0.397
    """
    return finetuned * multiplicity**2 * math.log(templates) / (2 * templates**2)


def extraction_error_bound(finetuned: Number, multiplicity: Number, templates: int) -> float:
    """`exp(-x)`: how the error on untouched facts is bounded, up to constants that the abstracts do not name."""
    return math.exp(-theory_exponent(finetuned, multiplicity, templates))


def template_coverage(finetuned: Number, multiplicity: Number, templates: int) -> float:
    """Expected share of the templates that some fine-tuned subject was stored with: `1 - (1 - K/|R|)^N`.

    >>> template_coverage(2, 4, 8)
    0.75
    """
    return 1 - (1 - multiplicity / templates) ** finetuned
