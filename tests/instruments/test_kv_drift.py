from __future__ import annotations

import pytest
import torch

import regard
from regard._errors import InputError
from regard.cache.diffusion import ElasticCache
from regard.instruments.kv_drift import KVDrift
from regard.models.language import MaskedDiffusionConfig, MaskedDiffusionLM


@pytest.fixture
def model() -> MaskedDiffusionLM:
    built = MaskedDiffusionLM(MaskedDiffusionConfig(layers=3, width=32, heads=4, hidden=48)).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return built


@torch.no_grad()
def dense(model, canvases, window):
    """Drift, tracked, below and far mass for one sequence, from keys, values and whole attention maps in float64."""
    model = model.double()
    out = {
        name: [[] for _ in model.layers]
        for name in ("drift", "tracked", "below", "far", "far_keys")
    }
    before = None
    for canvas in canvases:
        tokens, decided = canvas.tokens[0], canvas.decoded[0]
        places = canvas.open[0].nonzero()[:window, 0]
        behind = ~decided
        behind[places] = False
        positions = torch.arange(len(tokens))[None]
        hidden, states = model.embed(tokens[None]), []
        for layer, block in enumerate(model.layers):
            q, k, v = block.project(hidden, positions)
            maps = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)[0]
            hidden = block.finish(hidden, maps[None] @ v)
            alpha = maps[:, places].sum((0, 1))
            states.append((k[0], v[0], decided, int(alpha.masked_fill(~decided, 0).argmax())))
            if before is not None:
                old = before[layer]
                moved = (k[0] - old[0]).pow(2).sum((0, 2)).sqrt()
                moved = moved + (v[0] - old[1]).pow(2).sum((0, 2)).sqrt()
                both = decided & old[2]
                out["drift"][layer].append(moved[both].mean())
                out["tracked"][layer].append(moved[old[3]])
                out["below"][layer].append((moved[old[3]] < moved[both].mean()).double())
                out["far_keys"][layer].append(behind.double().mean())
                out["far"][layer].append(maps[:, places][..., behind].sum(-1).mean())
        before = states
    return {name: [torch.stack(x).mean() for x in rows] for name, rows in out.items()}


def test_equals_dense_float64_maps_for_every_sequence_and_batch(model):
    canvases: dict[str, list] = {}
    prompts = ["k3a9xw", "0b1c2d4e5f"]
    for prompt in prompts:
        seen = canvases[prompt] = []
        model.generate([prompt], length=24, threshold=0.3, before_step=seen.append)
    drift = KVDrift(window=5)
    with regard.attach(model, drift):
        model.generate(prompts, length=24, threshold=0.3, before_step=drift.before_step)
        model.generate(prompts[:1], length=24, threshold=0.3, before_step=drift.before_step)
    profile = drift.compute()
    assert profile.drift.shape == (3, 3)
    for sequence, prompt in enumerate([*prompts, prompts[0]]):
        expected = dense(model, canvases[prompt], 5)
        for name, values in expected.items():
            torch.testing.assert_close(
                getattr(profile, name)[:, sequence],
                torch.stack(values).float(),
                atol=1e-4,
                rtol=1e-4,
            )
    assert bool((profile.drift[0] == 0).all())  # a decided token's first key depends on itself only


def test_needs_the_canvas_and_fresh_keys(model):
    with pytest.raises(InputError, match="before_step"), regard.attach(model, KVDrift()):
        model.generate(["abc"], length=12)
    drift = KVDrift()
    with pytest.raises(InputError, match="fresh keys"), regard.attach(model, drift):
        model.generate(["abc"], ElasticCache(window=4), length=12, before_step=drift.before_step)
    with pytest.raises(InputError, match="no two steps"):
        KVDrift().compute()
    with pytest.raises(InputError, match="window must be"):
        KVDrift(window=0)
