"""Merging whole models: grafts, moments from optimisers, tied weights, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regard._errors import InputError
from regard.nn import LanguageModel, LanguageModelConfig
from regard.weights import (
    capture_second_moments,
    compress_low_rank,
    compress_rank_one,
    estimate_fisher_diagonal,
    fast_fisher_graft,
    graft_masks,
    graft_threshold_of,
    merge_dare,
    merge_linear,
    merge_ota,
    merge_ties,
)


def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(LanguageModelConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1))


def state(of: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in of.state_dict().items()}


def expert(seed: int, steps: int = 3) -> tuple[LanguageModel, dict[str, torch.Tensor]]:
    tuned, ids = model(), torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(seed))
    optimiser = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        tuned(ids, labels=ids).loss.backward()
        optimiser.step()
    return tuned, capture_second_moments(optimiser, tuned)


@pytest.fixture(scope="module")
def trained() -> tuple[dict, list[dict], list[dict]]:
    pairs = [expert(seed) for seed in (1, 2)]
    return state(model()), [state(tuned) for tuned, _ in pairs], [v for _, v in pairs]


def distance(first: dict, second: dict) -> float:
    return max(float((first[n].float() - second[n].float()).abs().max()) for n in first)


def test_moments_are_adams_own():
    torch.manual_seed(0)
    layer, gradients = nn.Linear(3, 2), []
    optimiser = torch.optim.Adam(layer.parameters(), betas=(0.9, 0.5))
    for _ in range(2):
        optimiser.zero_grad()
        layer(torch.randn(4, 3)).square().sum().backward()
        gradients.append(layer.weight.grad.clone())
        optimiser.step()
    expected = 0.25 * gradients[0] ** 2 + 0.5 * gradients[1] ** 2
    torch.testing.assert_close(capture_second_moments(optimiser, layer)["weight"], expected)
    with pytest.raises(InputError, match="exp_avg_sq"):
        capture_second_moments(torch.optim.SGD(layer.parameters(), lr=0.1), layer)


def test_a_graft_of_everything_is_the_expert_and_of_nothing_the_base(trained):
    base, experts, moments = trained
    assert distance(fast_fisher_graft(base, experts[0], moments[0], 1.0), experts[0]) == 0
    assert distance(fast_fisher_graft(base, experts[0], moments[0], 0.0), base) == 0


def test_a_graft_keeps_the_most_salient_edits_of_the_whole_model(trained):
    base, experts, moments = trained
    masks = graft_masks(base, experts[0], moments[0], 0.3)
    saliency = {n: moments[0][n] * (experts[0][n] - base[n]) ** 2 for n in masks}
    kept = torch.cat([saliency[n][masks[n]] for n in masks])
    dropped = torch.cat([saliency[n][~masks[n]] for n in masks])
    assert kept.min() >= dropped.max()
    total = sum(mask.numel() for mask in masks.values())
    assert len(kept) == int(0.3 * total)
    shares = {n: float(mask.float().mean()) for n, mask in masks.items()}
    assert max(shares.values()) - min(shares.values()) > 0.2  # not a share of each tensor


def test_one_expert_merges_to_its_own_graft(trained):
    base, experts, moments = trained
    merged = merge_ota(base, experts[:1], moments[:1], densities=[0.3])
    grafted = fast_fisher_graft(base, experts[0], moments[0], 0.3)
    assert distance(merged, grafted) < 1e-6
    assert distance(merge_ota(base, experts[:1], moments[:1]), experts[0]) < 1e-6


def test_a_merge_by_its_definition(trained):
    base, experts, moments = trained
    merged = merge_ota(base, experts, moments, densities=[0.5, 0.2])
    masks = [
        graft_masks(base, e, v, d) for e, v, d in zip(experts, moments, (0.5, 0.2), strict=True)
    ]
    for name in moments[0]:
        weights = [
            (v[name].double() ** 0.5 + 1e-26) * m[name] for v, m in zip(moments, masks, strict=True)
        ]
        top = sum(
            w * (e[name] - base[name]).double() for w, e in zip(weights, experts, strict=True)
        )
        total = sum(weights)
        change = torch.where(total > 0, top / total.clamp_min(1e-300), 0.0)
        torch.testing.assert_close(
            merged[name].double(), base[name].double() + change, atol=1e-6, rtol=1e-5
        )


def test_tied_weights_stay_tied(trained):
    base, experts, moments = trained
    assert "lm_head.weight" in base and "lm_head.weight" not in moments[0]
    for merged in (
        merge_ota(base, experts, moments, densities=[0.4, 0.4]),
        fast_fisher_graft(base, experts[0], moments[0], 0.4),
    ):
        assert torch.equal(merged["lm_head.weight"], merged["embed_tokens.weight"])
        assert not torch.equal(merged["lm_head.weight"], base["lm_head.weight"])
        model().load_state_dict(merged)


def test_baselines(trained):
    base, experts, _ = trained
    mean = {n: (experts[0][n] + experts[1][n]) / 2 for n in base}
    assert distance(merge_linear(base, experts), mean) < 1e-6
    assert distance(merge_ties(base, [experts[0]] * 2, density=1.0), experts[0]) < 1e-6
    assert distance(merge_dare(base, experts, density=1.0, elect=False), mean) < 1e-6
    one, two = merge_dare(base, experts, seed=0), merge_dare(base, experts, seed=1)
    assert distance(one, merge_dare(base, experts, seed=0)) == 0 < distance(one, two)
    alone = [merge_ties(base, [e], density=d) for e, d in zip(experts, (0.1, 1.0), strict=True)]
    both = merge_ties(base, experts, density=[0.1, 1.0])
    assert distance(both, merge_ties(base, alone, density=1.0)) < 1e-6
    assert distance(merge_dare(base, experts, density=[1.0, 1.0], elect=False), mean) < 1e-6
    with pytest.raises(InputError, match="one for each of 2 experts"):
        merge_dare(base, experts, density=[0.5])
    sparse = merge_ties(base, experts, density=0.1)
    changed = sum(int((sparse[n] != base[n]).sum()) for n in base)
    assert 0 < changed <= 0.21 * sum(t.numel() for t in base.values())


def test_scale_of_the_moments_matters_unless_it_is_divided_out(trained):
    base, experts, moments = trained
    louder = [moments[0], {n: 1e6 * v for n, v in moments[1].items()}]
    assert distance(merge_ota(base, experts, louder), merge_ota(base, experts, moments)) > 1e-3
    free = [merge_ota(base, experts, v, scale_free=True) for v in (louder, moments)]
    assert distance(*free) < 1e-5


def test_half_precision_models_merge_in_float32(trained):
    base, experts, moments = trained
    half = [{n: t.bfloat16() for n, t in weights.items()} for weights in (base, *experts)]
    merged = merge_ota(half[0], half[1:], moments)
    assert all(t.dtype == torch.bfloat16 for t in merged.values())
    exact = merge_ota(
        {n: t.float() for n, t in half[0].items()},
        [{n: t.float() for n, t in weights.items()} for weights in half[1:]],
        moments,
    )
    assert all(torch.equal(merged[n], exact[n].bfloat16()) for n in moments[0])


def test_thresholds_give_the_merge_of_their_densities(trained):
    base, experts, moments = trained
    pairs = list(zip(experts, moments, (0.5, 0.2), strict=True))
    thresholds = [graft_threshold_of(base, e, v, density) for e, v, density in pairs]
    by_density = merge_ota(base, experts, moments, densities=[0.5, 0.2])
    assert distance(by_density, merge_ota(base, experts, moments, thresholds=thresholds)) == 0
    with pytest.raises(InputError, match="got both"):
        merge_ota(base, experts, moments, densities=[0.5, 0.2], thresholds=thresholds)


def test_compressed_moments(trained):
    _, _, (moments, _) = trained
    for small in (compress_rank_one(moments), compress_low_rank(moments, 2)):
        assert {n: v.shape for n, v in small.items()} == {n: v.shape for n, v in moments.items()}
        assert torch.equal(small["norm.weight"], moments["norm.weight"])
        assert all((v >= 0).all() for v in small.values())
    rank_two = compress_low_rank(moments, 2)
    assert torch.equal(rank_two["embed_tokens.weight"], moments["embed_tokens.weight"])
    name = "layers.0.mlp.up_proj.weight"
    left, sizes, right = torch.linalg.svd(moments[name].double())
    expected = ((left[:, :2] * sizes[:2]) @ right[:2]).relu()
    torch.testing.assert_close(rank_two[name].double(), expected, atol=1e-9, rtol=1e-3)


def test_a_fisher_diagonal_without_an_optimiser():
    torch.manual_seed(0)
    layer = nn.Linear(3, 1, bias=False)
    batches = [torch.randn(1, 3) for _ in range(5)]
    found = estimate_fisher_diagonal(layer, batches, lambda m, x: m(x).sum())
    expected = torch.stack(batches).square().mean(0)
    torch.testing.assert_close(found["weight"], expected)
    assert layer.weight.grad is None
    with pytest.raises(InputError, match="at least one batch"):
        estimate_fisher_diagonal(layer, [], lambda m, x: m(x).sum())


def test_what_does_not_fit_is_named(trained):
    base, experts, moments = trained
    with pytest.raises(InputError, match="second_moments"):
        merge_ota(base, experts, moments[:1])
    with pytest.raises(InputError, match="at least one"):
        merge_linear(base, [])
    with pytest.raises(InputError, match=r"differ in norm\.weight"):
        merge_linear(base, [{n: t for n, t in experts[0].items() if n != "norm.weight"}])
    with pytest.raises(InputError, match="no second moment"):
        merge_ota(base, experts[:1], [{n: v for n, v in moments[0].items() if "q_proj" not in n}])
    wrong = {**experts[0], "norm.weight": torch.ones(3)}
    with pytest.raises(InputError, match=r"\(16,\) in the base and \(3,\)"):
        merge_linear(base, [wrong])
    fewer = {n: v for n, v in moments[1].items() if "q_proj" not in n}
    with pytest.raises(InputError, match=r"differ in .*q_proj"):
        merge_ota(base, experts, [moments[0], fewer])
    with pytest.raises(InputError, match="named as the base's tensors"):
        merge_ota(base, experts, [{f"model.{n}": v for n, v in m.items()} for m in moments])
    holed = {**experts[0], "norm.weight": torch.full((16,), torch.inf)}
    with pytest.raises(InputError, match=r"norm\.weight must be finite.*16 of 16"):
        merge_linear(base, [holed])
