"""Independent references: a cache-free decoder, and Elastic-Cache for one sequence, written as plain loops."""

from __future__ import annotations

import torch
from torch import Tensor


def decode(forward, tokens: Tensor, mask: int, eos: int, window: int, threshold: float):
    """Cache-free decoding of one sequence `[N]`; yields (logits of the window, positions, tokens after the step)."""
    x = tokens.clone()
    todo = [i for i, t in enumerate(x.tolist()) if t == mask]
    steps = []
    while todo:
        active = todo[:window]
        logits = forward(x[None])[0][active].double()
        open_logits = logits.clone()
        open_logits[:, mask] = float("-inf")
        p = torch.softmax(open_logits, -1)
        best = p.max(-1).values
        limit = min(threshold, best.max().item())
        done = [q for q, b in zip(active, best.tolist(), strict=True) if b >= limit]
        for q, row in zip(active, p, strict=True):
            if q in done:
                x[q] = int(row.argmax())
        todo = [q for q in todo if q not in done]
        ends = [q for q in range(len(x)) if tokens[q] == mask and x[q] == eos]
        if ends:
            todo = [q for q in todo if q < ends[0]]
        steps.append((logits, active, x.clone()))
    return steps


def elastic(model, tokens: Tensor, window: int, gamma: float, threshold: float, track: int = 1):
    """The paper's steps a to f for one sequence `[N]`, dense, one layer at a time; returns (tokens, r of each step, sigmas)."""
    mask, eos, blocks = model.mask_token_id, model.eos_token_id, model.blocks
    x, N, L = tokens.clone(), len(tokens), len(model.blocks)
    prompt_masks = tokens == mask
    todo = [i for i in range(N) if prompt_masks[i]]
    committed: list[int] = []
    X, Q, K, V = ([None] * L for _ in range(4))
    t: list[list[int]] = [[] for _ in range(L)]
    rs, sigmas = [], []
    step = 0
    while todo:
        active = todo[:window]
        if step == 0:
            R, r = list(range(N)), -1
        else:
            R = sorted({i for ts in t for i in ts} | set(committed) | set(active))
            r = L
        r_of_step = r
        rows = torch.tensor(R)
        h = model.embed(x[rows][None])
        sig = []
        fresh_t = []
        for n in range(L):
            if n > r:
                if X[n] is None:
                    X[n] = h.clone()
                X[n] = h.clone()
            else:
                X[n] = X[n].clone()
                X[n][:, rows] = h
                if n == r:
                    h, rows = X[n].clone(), torch.arange(N)
            q, k, v = blocks[n].project(h, rows[None])
            if n >= r:
                Q[n], K[n], V[n] = q.clone(), k.clone(), v.clone()
                changed = False
            else:
                K_old, q_old = K[n].clone(), Q[n][:, :, t[n]].clone()
                Q[n][:, :, rows], K[n][:, :, rows], V[n][:, :, rows] = q, k, v
                changed = True
            S = torch.softmax(
                q @ K[n].transpose(-1, -2) / q.shape[-1] ** 0.5, -1
            )  # [1, H, rows, N]
            place = {int(p): i for i, p in enumerate(rows.tolist())}
            if changed:
                S_old = torch.softmax(q_old @ K_old.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
                S_new = S[:, :, [place[i] for i in t[n]]]
                dots = (S_old * S_new).sum(-1) / (S_old.norm(dim=-1) * S_new.norm(dim=-1))
                sigma = float(dots.mean())
                sig.append(sigma)
                if sigma < gamma:
                    r = r_of_step = n + 1
            alpha = S[0][:, [place[i] for i in active]].sum((0, 1))
            alpha[x == mask] = 0
            fresh_t.append(alpha.topk(track).indices.tolist())
            h = blocks[n].finish(h, S @ V[n])
        t = fresh_t
        place = {int(p): i for i, p in enumerate(rows.tolist())}
        logits = model.logits(h)[0][[place[i] for i in active]].double()
        logits[:, mask] = float("-inf")
        p = torch.softmax(logits, -1)
        best = p.max(-1).values
        limit = min(threshold, best.max().item())
        committed = []
        for q_, b, row in zip(active, best.tolist(), p, strict=True):
            if b >= limit:
                x[q_] = int(row.argmax())
                committed.append(q_)
        todo = [q_ for q_ in todo if q_ not in committed]
        ends = [q_ for q_ in range(N) if prompt_masks[q_] and x[q_] == eos]
        if ends:
            todo = [q_ for q_ in todo if q_ < ends[0]]
        rs.append(r_of_step)
        sigmas.append(sig)
        step += 1
    return x, rs, sigmas
