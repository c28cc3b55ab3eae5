"""Next-token prediction makes one layer of linear causal attention a step of gradient descent (arXiv 2405.16845).

The task: each sequence has its own W = diag(lambda_1 .. lambda_d), lambda_j = exp(i theta_j) with uniform angles, and
x_{t+1} = W x_t from a random real x_1. With e_t = (x_t; x_{t-1}), x_0 = 0, E_t = [e_1 .. e_t], the layer

    y_t = W_PV E_t E_t^* W_KQ e_t / (t - 1)

is trained on L = 1/2 sum_{t=2}^{T-1} E ||y_t - x_{t+1}||^2 from W_KQ = a0 I in the block that takes x_t to x_{t-1}, and
W_PV = [b0 I, 0]. If every mixed moment of x_1 with an odd exponent vanishes, gradient flow keeps that form, a^2 - b^2 is
conserved, and

    a b -> kappa1 / (kappa2 + kappa3 / (T - 2) sum_{t=2}^{T-1} 1 / (t - 1)),

kappa1 = E x_{1j}^4, kappa2 = E x_{1j}^6, kappa3 = sum_{r != j} E x_{1j}^2 x_{1r}^4. The trained layer then predicts

    y_t = (a b / (t - 1)) sum_{i<t} x_{i+1} x_i^* x_t,

one step of size a b from zero on the squared error of x_{i+1} = W x_i in its context: a mesa-optimiser. For long contexts
y_t -> a b diag(|x_{1j}|^2) x_{t+1}, which is x_{t+1} only where a b x_{1j}^2 = 1: one-hot starts are predicted exactly,
Gaussian ones come out at a fifth of their size.

`theory` has the predictions, `experiment` the layer and its training, and `MesaOptimization` puts them side by side.

Source: Zheng, Huang, Wang, Wang, Li 2024, "On Mesa-Optimization in Autoregressively Trained Transformers: Emergence and
Capability".
"""

from __future__ import annotations

from regard.labs.mesa_optimization.capability import Answers, answers
from regard.labs.mesa_optimization.experiment import (
    Trained,
    begin,
    diagonal_part,
    draw,
    linear_causal_attention,
    one_step_ols_gd,
    train,
)
from regard.labs.mesa_optimization.laboratory import MesaOptimization
from regard.labs.mesa_optimization.theory import (
    Moments,
    balanced_limit,
    diagonal_loss,
    diagonal_velocity,
    inverse_mean,
    mesa_step_size,
    position_error,
    start_moments,
)

__all__ = [
    "Answers",
    "MesaOptimization",
    "Moments",
    "Trained",
    "answers",
    "balanced_limit",
    "begin",
    "diagonal_loss",
    "diagonal_part",
    "diagonal_velocity",
    "draw",
    "inverse_mean",
    "linear_causal_attention",
    "mesa_step_size",
    "one_step_ols_gd",
    "position_error",
    "start_moments",
    "train",
]
