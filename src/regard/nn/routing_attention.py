"""Routing attention as a mixer: half of the heads look at their neighbours, half at tokens of the same k-means cluster.

    local heads:    softmax attention with rotary positions within a window
    routing heads:  x = LayerNorm(W_q h), which is query and key at once;  cluster c takes the w tokens with the largest
                    mu_c . x;  softmax attention inside clusters;  mean over the clusters that took a token, 0 without one
    training:       mu follows the tokens by online k-means (no gradient), and beta |x - mu_n(x)|^2 draws tokens to mu

Source: Roy et al. 2020, Routing Transformer (arXiv 2003.05997); k-means by moving counts and sums as in the authors' release.
Deviations: membership by the prefix rule unless told otherwise (`regard.ops.kmeans_routing`); scores over sqrt(d), where the
release leaves dot products of normed vectors unscaled (`scale=1`); a sliding window where the release attends to its own and
the previous block; no relative embeddings in routing heads, which compare content alone; counts start at 1, not at 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from regard._errors import InputError, at_least_one
from regard.attach.modules import HookedAttention
from regard.nn._visible import causal_rule
from regard.nn.mixer import Mixer, State
from regard.nn.projections import check_heads, merge_heads, split_heads
from regard.nn.rotary import rotate
from regard.nn.softmax_attention import remember
from regard.ops.kmeans_routing import (
    ClusterMemory,
    balanced_topk_routing,
    cluster_scores,
    kmeans_ema_statistics,
    nearest_centroid,
    prefix_routed_attention,
    routed_attention,
    smoothed_centroids,
)


class RoutingAttention(Mixer, HookedAttention):
    """Local heads and routing heads side by side, strictly causal.

    A token attends in a cluster when it is among the cluster's `window` best tokens so far, to the others of them. Instruments
    and interventions attach to the local heads, which come first; `maps` gives the attention of all heads.

    Args:
        width: of the tokens.
        heads: must divide `width`, with an even quotient.
        clusters: of each routing head.
        window: tokens that a cluster holds; tokens / clusters makes every token a member of one cluster on average.
        local_heads: half of the heads by default.
        local_window: keys that a local head sees, `window` by default.
        decay: of the moving counts and sums that centroids are made of.
        commitment: beta, the weight of the squared distance to the own centroid in the loss.
        scale: of scores in routing heads, 1 / sqrt(d) by default.

    Cost: 4 width^2 multiplications a token at most, 2 local_window d for each local head, and for each routing head
    clusters x d to route and what `prefix_routed_attention` takes. The state keeps one size: `local_window` tokens and
    clusters x window.

    Raises:
        InputError: heads that do not divide, more local heads than heads, a window or clusters below 1.

    >>> mixer = RoutingAttention(width=32, heads=4, clusters=4, window=8)
    >>> mixer(torch.randn(2, 30, 32)).shape
    torch.Size([2, 30, 32])
    """

    positional = True
    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        clusters: int = 8,
        window: int = 64,
        local_heads: int | None = None,
        local_window: int | None = None,
        decay: float = 0.999,
        commitment: float = 1e-4,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        check_heads(width, heads, even=True)
        local_heads = heads // 2 if local_heads is None else local_heads
        if not 0 <= local_heads < heads:
            raise InputError.of("local_heads", given=local_heads, expected=f"0 to {heads - 1}")
        at_least_one(clusters=clusters)
        self.heads, self.local_heads, self.clusters, self.window = (
            heads,
            local_heads,
            clusters,
            window,
        )
        self.local_window = window if local_window is None else local_window
        at_least_one(window=window, local_window=self.local_window)
        dim = width // heads
        self.decay, self.commitment = decay, commitment
        self.scale = dim**-0.5 if scale is None else scale
        self.q_proj = nn.Linear(width, width, bias=False)
        if local_heads:
            self.k_proj = nn.Linear(width, local_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        start = layer_norm(torch.randn(heads - local_heads, clusters, dim), (dim,))
        self.register_buffer("sums", start)
        self.register_buffer("counts", torch.ones(start.shape[:2]))

    @property
    def centroids(self) -> Float[Tensor, "routing_heads clusters dim"]:
        """Where the clusters are: moving sums over moving counts."""
        precise = torch.promote_types(self.sums.dtype, torch.float32)
        return smoothed_centroids(self.counts.to(precise), self.sums.to(precise))

    @property
    def occupancy(self) -> Float[Tensor, "routing_heads clusters"]:
        """The share of tokens whose nearest centroid each one is, as a moving mean; a cluster near 0 is dead."""
        return self.counts / self.counts.sum(-1, keepdim=True)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        value = split_heads(self.v_proj(hidden), self.heads)
        mixed = self._mix(hidden, value, valid, state)
        return self.o_proj(merge_heads(mixed))

    @torch.no_grad()
    def maps(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch heads tokens tokens"]:
        """Attention weights of every head, local heads first: dense, for short texts.

        A row of a routing head is the mean over the clusters that took its token; it sums to 1, or to 0 for a token in none.
        """
        batch, tokens, _ = hidden.shape
        eye = torch.eye(tokens, dtype=hidden.dtype, device=hidden.device)
        training, self.training = self.training, False
        try:
            return self._mix(hidden, eye.expand(batch, self.heads, tokens, tokens), valid, None)
        finally:
            self.training = training

    def _mix(
        self, hidden: Tensor, value: Tensor, valid: Tensor | None, state: State | None
    ) -> Float[Tensor, "batch heads tokens value_dim"]:
        query = split_heads(self.q_proj(hidden), self.heads)
        local = self._local(
            hidden, query[:, : self.local_heads], value[:, : self.local_heads], valid, state
        )
        precise = torch.promote_types(hidden.dtype, torch.float32)
        content = layer_norm(query[:, self.local_heads :].to(precise), query.shape[-1:])
        scores = self.route(content.detach())
        self.losses = {}
        if self.training:
            self._learn(content, valid)
        routed = self._attend_in_clusters(
            content.to(value.dtype), value[:, self.local_heads :], scores, valid, state
        )
        return routed if local is None else torch.cat([local, routed], dim=1)

    def route(
        self, content: Float[Tensor, "batch routing_heads tokens dim"]
    ) -> Float[Tensor, "batch routing_heads clusters tokens"]:
        """How much each cluster wants each token: `mu_c . x`."""
        return cluster_scores(content, self.centroids.to(content.dtype))

    def _attend_in_clusters(
        self,
        content: Tensor,
        value: Tensor,
        scores: Tensor,
        valid: Tensor | None,
        state: State | None,
    ) -> Tensor:
        if state and "cluster_score" in state:
            memory = ClusterMemory(
                state["cluster_key"], state["cluster_value"], state["cluster_score"]
            )
        else:
            memory = ClusterMemory.empty(content, value, scores, self.window)
        mixed, memory = prefix_routed_attention(
            content, content, value, scores, memory, scale=self.scale, valid=valid
        )
        if state is not None:
            state.update({f"cluster_{name}": part for name, part in memory._asdict().items()})
        return mixed

    def _local(
        self,
        hidden: Tensor,
        query: Tensor,
        value: Tensor,
        valid: Tensor | None,
        state: State | None,
    ) -> Tensor | None:
        if not self.local_heads:
            return None
        batch, tokens, _ = hidden.shape
        seen = int(state["seen"][0]) if state else 0
        positions = torch.arange(seen, seen + tokens, device=hidden.device)
        query = rotate(query, positions)
        key = rotate(split_heads(self.k_proj(hidden), self.local_heads), positions)
        known = valid
        if state is not None:
            key, value, known = remember(state, key, value, valid, keep=self.local_window)
        mask = causal_rule(
            tokens, known, key.shape[2], window=self.local_window, batch=batch, device=hidden.device
        )
        return self.attend(query, key, value, mask=mask, valid=valid, key_valid=known)

    def _learn(self, content: Tensor, valid: Tensor | None) -> None:
        """Sets the commitment loss, then moves the centroids."""
        centroids = self.centroids.to(content.dtype)
        with torch.no_grad():
            own = nearest_centroid(content, centroids)
            place = own[..., None].expand(content.shape)
            target = centroids.expand(len(content), -1, -1, -1).gather(2, place)
        distance = (content - target).square().mean((1, 3))
        if valid is not None:
            distance = distance[valid]
        self.losses = {"commitment": self.commitment * distance.mean()}
        with torch.no_grad():
            counts, sums, _ = kmeans_ema_statistics(
                self.counts,
                self.sums,
                content.detach().to(self.sums.dtype),
                decay=self.decay,
                valid=valid,
            )
            self.counts.copy_(counts)
            self.sums.copy_(sums)


class WholeTextRoutingAttention(RoutingAttention):
    """The published membership: a cluster takes its best tokens of the whole text, so later tokens change earlier outputs.

    No token attends forward, but which tokens are in a cluster depends on the future. Without a state only: a call with one
    uses the prefix rule, as step-by-step decoding of the release does. Not in `MIXERS`, because it is not causal.
    """

    def _attend_in_clusters(
        self,
        content: Tensor,
        value: Tensor,
        scores: Tensor,
        valid: Tensor | None,
        state: State | None,
    ) -> Tensor:
        if state is not None:
            return super()._attend_in_clusters(content, value, scores, valid, state)
        known = None if valid is None else valid[:, None, None]
        members = balanced_topk_routing(scores, self.window, known)
        return routed_attention(content, content, value, members, members, scale=self.scale)
