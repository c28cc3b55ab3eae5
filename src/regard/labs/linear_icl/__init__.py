"""One layer of linear attention learns linear regression in context (arXiv 2306.09927): the flow, its limit, and its risk.

The task: w ~ N(0, I_d); x_1 .. x_N and the query x_q ~ N(0, Lambda); y_i = <w, x_i>. A prompt is the matrix E with columns
(x_i; y_i) and last (x_q; 0). The layer

    f(E) = E + W_PV E (E^T W_KQ E) / N,        y_hat = f(E)[d + 1, N + 1],

is trained on L = 1/2 E (y_hat - <w, x_q>)^2. With Gamma = (1 + 1/N) Lambda + (tr Lambda / N) I, gradient flow from a small
balanced start ends in

    W_KQ = tr(Gamma^-2)^(-1/4) [Gamma^-1 0; 0 0],   W_PV = tr(Gamma^-2)^(1/4) [0 0; 0 1]:

the trained layer predicts x_q^T Gamma^-1 (1/M) sum_i y_i x_i on a prompt of any length M: one step of preconditioned descent.
Every function named `icl_...` is a prediction; `draw_prompts`, `predict` and `train` are the experiment; `LinearICL` puts them
side by side. Of the entries of W_PV only the last row, and of W_KQ only the first d columns, reach the prediction.

Risks are E (y_hat - y)^2 without the factor 1/2.

Source: Zhang, Frei, Bartlett 2024, "Trained Transformers Learn Linear Models In-Context", JMLR 25(49).
"""

from __future__ import annotations

from regard.labs.linear_icl.experiment import (
    Prompts,
    Trained,
    draw_prompts,
    measured_risk,
    predict,
    start,
    train,
)
from regard.labs.linear_icl.laboratory import (
    LinearICL,
)
from regard.labs.linear_icl.theory import (
    icl_gamma,
    icl_largest_scale,
    icl_loss,
    icl_optimum,
    icl_random_covariance_limit,
    icl_random_covariance_risk,
    icl_risk,
    icl_risk_of_labels,
    icl_velocity,
)

__all__ = [
    "LinearICL",
    "Prompts",
    "Trained",
    "draw_prompts",
    "icl_gamma",
    "icl_largest_scale",
    "icl_loss",
    "icl_optimum",
    "icl_random_covariance_limit",
    "icl_random_covariance_risk",
    "icl_risk",
    "icl_risk_of_labels",
    "icl_velocity",
    "measured_risk",
    "predict",
    "start",
    "train",
]
