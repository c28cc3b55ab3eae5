"""The four linear maps of multi-head attention, and how states are split into heads and put together again."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from regard._errors import InputError, at_least_one


class Projections(nn.Module):
    """Base of attention modules: `q_proj`, `k_proj`, `v_proj`, `o_proj`.

    Args:
        width: of the tokens.
        heads: query heads; must divide `width`.
        kv_heads: key and value heads, `heads` by default; must divide `heads`.
        state_size: numbers of a query and a key of a head, as memories of their products call them; `width / heads` by default.
        even: the head size must be even, as rotary positions need it.
        bias: whether the maps add one.

    Raises:
        InputError: heads that do not divide, or a size below 1.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        state_size: int | None = None,
        even: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(width, heads, even=even)
        if kv_heads < 1 or heads % kv_heads:
            raise InputError.of("kv_heads", given=kv_heads, expected=f"a divisor of {heads} heads")
        dim = width // heads
        state_size = dim if state_size is None else state_size
        at_least_one(state_size=state_size)
        self.heads, self.kv_heads, self.state_size = heads, kv_heads, state_size
        self.q_proj = nn.Linear(width, heads * state_size, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * state_size, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def query_key_of(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[batch, heads, tokens, state_size]` and keys `[batch, kv_heads, tokens, state_size]`."""
        query, key = self.q_proj(states), self.k_proj(states)
        return split_heads(query, self.heads), split_heads(key, self.kv_heads)

    def value_of(self, states: Tensor) -> Tensor:
        """Values `[batch, kv_heads, tokens, dim]`."""
        return split_heads(self.v_proj(states), self.kv_heads)

    def output_of(self, mixed: Float[Tensor, "batch heads tokens dim"], like: Tensor) -> Tensor:
        """Head outputs, merged and projected, in the dtype of `like`."""
        return self.o_proj(merge_heads(mixed).to(like.dtype))


def check_heads(width: int, heads: int, *, even: bool = False) -> None:
    """Raises InputError unless `heads` divides `width`, into an even size when `even`."""
    if heads < 1 or width % heads or (even and width // heads % 2):
        size = "an even head size" if even else "a whole head size"
        raise InputError(
            f"width {width} and heads {heads} must give {size}, got {width / max(heads, 1):g}"
        )


def split_heads(states: Tensor, heads: int) -> Float[Tensor, "batch heads tokens dim"]:
    """`[batch, tokens, heads * dim]` to `[batch, heads, tokens, dim]`."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(states: Float[Tensor, "batch heads tokens dim"]) -> Tensor:
    """`[batch, heads, tokens, dim]` to `[batch, tokens, heads * dim]`."""
    return states.transpose(1, 2).flatten(2)
