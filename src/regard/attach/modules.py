"""The seam for `regard`'s own attention modules: the same hooks as in a pretrained model."""

from __future__ import annotations

from torch import Tensor, nn

from regard.attach.session import dispatch
from regard.engine import AttentionCall


class HookedAttention(nn.Module):
    """Base of attention modules written for `regard`: call `self.attend(...)` where the softmax attention happens."""

    attends_through_regard = True
    is_causal = True

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool | None = None,
        scaling: float | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Attention through the engine: `[batch, heads, tokens, dim]` in, the head outputs in the same layout out."""
        causal = self.is_causal if causal is None else causal
        call = AttentionCall.make(
            query,
            key,
            value,
            mask=mask,
            causal=causal,
            scaling=scaling,
            module=self,
            valid=valid,
            key_valid=valid,
        )
        return dispatch(self, call)
