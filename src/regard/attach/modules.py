"""The seam for `regard`'s own attention modules: the same hooks as in a pretrained model."""

from __future__ import annotations

from torch import Tensor, nn

from regard.attach.session import dispatch
from regard.engine import AttentionCall, Mask


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
        mask: Tensor | Mask | None = None,
        causal: bool | None = None,
        scaling: float | None = None,
        valid: Tensor | None = None,
        key_valid: Tensor | None = None,
    ) -> Tensor:
        """Attention through the engine: `[batch, heads, tokens, dim]` in, the head outputs in the same layout out.

        `valid` and `key_valid` mark the queries and keys that are no padding, for what reads attention; hiding padding is
        the mask's work. Without `key_valid` the keys are the queries' own tokens.
        """
        causal = self.is_causal if causal is None else causal
        queries, keys = query.shape[2], key.shape[2]
        if key_valid is None and keys == queries:
            key_valid = valid
        call = AttentionCall.make(
            query,
            key,
            value,
            mask=mask,
            causal=causal,
            scaling=scaling,
            module=self,
            valid=valid,
            key_valid=key_valid,
            query_offset=max(keys - queries, 0) if causal else 0,
        )
        return dispatch(self, call)
