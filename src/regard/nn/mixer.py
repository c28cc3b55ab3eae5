"""What mixes information between the tokens of one layer: the contract that every mixer of this room keeps.

    output = mixer(hidden, valid=..., state=...)          [batch, tokens, width] -> [batch, tokens, width]

* Causal: the output of a token depends on that token and earlier ones only.
* `valid` marks the tokens that are no padding. Padding never changes the output of a valid token.
* `state` is a dict that the mixer fills: called again with it, the mixer goes on after the tokens it has seen, and gives what
  one call on all tokens gives. Every tensor in it has the batch first. Recurrent mixers keep it at one size; softmax
  attention keeps all keys and values there.
* `losses` holds what training adds to the loss (load balance, commitment), by name and already weighted; made anew by each call.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

State = dict[str, Tensor]
"""What a mixer remembers of the tokens it has seen; empty before the first."""


class Mixer(nn.Module):
    """Base of the modules that mix tokens. Subclasses define `forward`; the module docstring has the contract.

    Attributes:
        positional: whether the mixer itself tells positions apart (rotary angles, recurrence, convolution). A model of mixers
            that do not adds position embeddings to its tokens.
        losses: scalars that the last call in training adds to the loss.
    """

    positional: bool = False

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[str, Tensor] = {}

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        raise NotImplementedError
