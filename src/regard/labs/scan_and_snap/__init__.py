"""One layer of attention first scans, then snaps: which tokens it comes to look at, and when it stops (arXiv 2305.16380).

A transformer with one layer, one head and no positions predicts the next token n from a sequence whose last token m asks. Its
reparametrised weights are Z (attention logits, a row for each last token) and Y (decoder, logits from token masses):

    b_t = softmax_t(Z[m, x_t]) over the tokens before the last,   c = sum_t b_t e_{x_t},   f = c / ||c||,   logits = Y f.

With g = e_n - softmax(Y f) and q = Y^T g, gradient ascent on the log-likelihood is

    dY = eta_Y g f^T,        dZ[m] = eta_Z f * (q - f (f . q))     elementwise

(the softmax's own projection drops out, since c is orthogonal to the bracket).

Each class n has a last token and draws its sequence from P(l | n). A token is DISTINCT when one class uses it, COMMON when
several do. For long sequences c_l is proportional to P(l | n) exp(z_l). Theory, for a decoder much faster than attention and
Y = Z = 0 at the start:

1. the decoder's residual 1 - alpha_n falls like 1/t;
2. every distinct z_l rises; the sum over common tokens falls;
3. r = c_l^2 / c_l'^2 - 1 grows by a factor chi(t) that does not depend on l', and for the class's most frequent token
   exp(2 f_l(0)^2 B) <= chi <= exp(2 B), where B = eta_Z integral of xi, and xi is the distinct tokens' growth dz_l/dt per f_l^2;
4. B = 1/4 ln(1 + (4 eta_Z / C0) Gamma(t)): Gamma ~ t^2 before t0' = K ln M / eta_Y (scanning), ~ ln^2 t after
   t0 = 2 K ln M / eta_Y (snapping). A faster decoder therefore freezes attention earlier, and leaves it more spread out.

Two things follow from the equation above without any approximation and are checked as well: sum_l z_{m,l} never changes, and
with one common token dz_c/dt = -eta_Z xi (1 - f_c^2).

Source: Tian, Wang, Chen, Du 2023, "Scan and Snap: Understanding Training Dynamics and Token Composition in 1-layer Transformer".
"""

from __future__ import annotations

from regard.labs.scan_and_snap.dynamics import (
    Classes,
    Course,
    Motion,
    crossing,
    decoder_time,
    early_growth,
    entropy,
    follow,
    growth,
    late_exponent,
    local_exponent,
    make_classes,
    motion,
    relative_growth,
    token_mass,
)
from regard.labs.scan_and_snap.laboratory import (
    ScanAndSnap,
)
from regard.labs.scan_and_snap.sampled import (
    Sampled,
    sample_gradient,
    train_sampled,
)

__all__ = [
    "Classes",
    "Course",
    "Motion",
    "Sampled",
    "ScanAndSnap",
    "crossing",
    "decoder_time",
    "early_growth",
    "entropy",
    "follow",
    "growth",
    "late_exponent",
    "local_exponent",
    "make_classes",
    "motion",
    "relative_growth",
    "sample_gradient",
    "token_mass",
    "train_sampled",
]
