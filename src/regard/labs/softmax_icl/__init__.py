"""Multi-head softmax attention learns in-context linear regression as debiased gradient descent (arXiv 2503.12734).

The task: x_l, x_q ~ N(0, I_d), beta ~ N(0, I_d / d), y_l = <beta, x_l> + noise of variance s2, the query's label too. Tokens are
z_l = (x_l; y_l), the query is (x_q; 0) and does not see itself:

    y_hat = sum_h O_h V_h Z softmax(Z^T K_h^T Q_h z_q / sqrt(d + 1)).

Training makes K_h^T Q_h a multiple of the identity on x (omega_h sqrt(d + 1)) and O_h V_h read the label alone (mu_h), so that

    y_hat = sum_h mu_h sum_l softmax_l(omega_h <x_l, x_q>) y_l.

For large d and L the loss of that reduced model is

    1 + s2 - 2 mu . omega + mu^T A mu,      A = omega omega^T + ((1 + s2) / L) exp(d omega omega^T)   (exp entry by entry).

One head is a kernel smoother with a finite omega. Two heads of opposite sign cancel the mean of the labels and, as omega shrinks
at fixed 2 omega mu = eta, become a step of debiased gradient descent, `(eta / L) sum_l y_l <x_l - mean x, x_q>`, with the smaller
loss 1 + s2 - eta*, eta* = 1 / (1 + (1 + s2) d / L). More heads do not help; other input covariances give preconditioned descent;
with several labels, heads can be shared between them.

`theory` has the predictions, `predictors` the predictors it names, `experiment` the networks, and `SoftmaxICL` puts them side by
side. Errors are E (y_hat - y)^2 with the noise of the query's label.

Source: He, Pan, Chen, Yang 2025, "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of
Multi-Head Softmax Attention".
"""

from __future__ import annotations

from regard.labs.softmax_icl.experiment import (
    Networks,
    Prompts,
    Task,
    Trained,
    draw,
    effective_matrix,
    heads_of,
    measured_errors,
    pattern_scores,
    scales,
    task_scales,
    train,
)
from regard.labs.softmax_icl.laboratory import SoftmaxICL
from regard.labs.softmax_icl.predictors import debiased_gd, kernel_heads, plain_gd, ridge
from regard.labs.softmax_icl.theory import (
    best_preconditioner,
    debiased_risk,
    debiased_step,
    optimal_mu,
    plain_risk,
    preconditioned_risk,
    reduced_loss,
    reduced_velocity,
    single_head,
    task_risks,
)

__all__ = [
    "Networks",
    "Prompts",
    "SoftmaxICL",
    "Task",
    "Trained",
    "best_preconditioner",
    "debiased_gd",
    "debiased_risk",
    "debiased_step",
    "draw",
    "effective_matrix",
    "heads_of",
    "kernel_heads",
    "measured_errors",
    "optimal_mu",
    "pattern_scores",
    "plain_gd",
    "plain_risk",
    "preconditioned_risk",
    "reduced_loss",
    "reduced_velocity",
    "ridge",
    "scales",
    "single_head",
    "task_risks",
    "task_scales",
    "train",
]
