"""The parts of the experiment against independent computations."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from regard.labs import tasks
from regard.ops import conserved_flows, flow_attention
from regard.papers import Run
from regard.papers import _flowformer_runs as runs
from regard.papers import flowformer as paper


def test_the_class_is_which_two_events_in_which_order():
    data = runs.order_of_events(count=300, noise=0.0)
    shapes = torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    series = torch.cat([data.train, data.test])
    blank = series.flatten(0, 1).mode(0).values
    for row, label in zip(series, torch.cat([data.train_labels, data.test_labels]), strict=True):
        places = ((row - blank).abs().sum(-1) > 1e-3).nonzero().flatten()
        assert len(places) == 2
        first, second = ((row[places] - blank).sign() @ shapes.T).argmax(-1).tolist()
        rest = [event for event in range(3) if event != first]
        assert int(label) == 2 * first + rest.index(second)
    assert set(data.train_labels.tolist()) == set(range(6))


def test_digits_are_cut_into_squares_of_two_by_two():
    from sklearn.datasets import load_digits

    data = runs.digits()
    images = torch.tensor(load_digits().images, dtype=torch.float32)
    assert data.train.shape == (1198, 16, 4) and data.test.shape == (599, 16, 4)
    squares = images[0].unfold(0, 2, 2).unfold(1, 2, 2).reshape(16, 4)
    found = data.test[0]
    for channel in range(4):  # standardised: equal up to one scale and shift a channel
        both = torch.stack([found[:, channel], squares[:, channel]])
        assert float(torch.corrcoef(both)[0, 1]) > 0.99999
    torch.testing.assert_close(data.train.flatten(0, 1).std(0), torch.ones(4))


def test_ablations_leave_out_one_part_each():
    query, key, value = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)
    flows = conserved_flows(query, key)
    share = torch.sigmoid(flows.conserved_incoming)[..., None]
    whole = flow_attention(query, key, value)
    torch.testing.assert_close(share * runs.without_allocation(query, key, value), whole)
    strength = (flows.conserved_outgoing.softmax(-1) * 9)[..., None]
    torch.testing.assert_close(runs.without_competition(query, key, strength * value), whole)
    torch.testing.assert_close(runs.by_matrix(query, key, value), whole)


@pytest.mark.parametrize("name", list(runs.CAUSAL))
def test_effective_weights_give_the_output_up_to_each_row_scale(name: str):
    mixer, hidden = runs.CAUSAL[name](12, 2), torch.randn(2, 10, 12)
    weights = runs.effective_weights(mixer, hidden)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 10))
    assert not weights.triu(1).any() and (weights >= 0).all()
    inner = mixer.inner if isinstance(mixer, runs.AbsoluteSoftmax) else mixer
    outputs = []
    inner.o_proj.register_forward_pre_hook(lambda module, inputs: outputs.append(inputs[0]))
    mixer(hidden)
    mixed = outputs[0].unflatten(-1, (2, 6)).transpose(1, 2)
    again = weights @ inner.v_proj(hidden).unflatten(-1, (2, 6)).transpose(1, 2)
    scale = (mixed * again).sum(-1, keepdim=True) / again.square().sum(-1, keepdim=True)
    torch.testing.assert_close(scale * again, mixed, atol=1e-5, rtol=1e-4)


def test_flatness_of_uniform_weights_is_one():
    task = tasks.characters(24)
    model = runs.language_model(runs.CAUSAL["softmax"], task, width=16)
    for block in model.layers:
        torch.nn.init.zeros_(block.self_attn.inner.q_proj.weight)
        torch.nn.init.zeros_(block.self_attn.inner.q_proj.bias)
    ids = task.draw(2, 0).ids
    assert runs.flatness(model, ids) == pytest.approx(1)
    torch.nn.init.normal_(model.layers[0].self_attn.inner.q_proj.weight, std=20)
    assert runs.flatness(model, ids) < 0.9


def test_softmax_by_matrix_is_softmax_attention():
    query, key, value = torch.randn(3, 1, 2, 9, 4)
    expected = scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(runs.softmax_by_matrix(query, key, value), expected)


def test_memory_is_counted_once_for_each_tensor():
    one, other = (torch.randn(1000, requires_grad=True) for _ in range(2))
    assert runs.kept_for_backward(lambda: one * other) == pytest.approx(0.008)
    assert runs.kept_for_backward(lambda: one * one) == pytest.approx(0.004)


def test_slope_is_the_exponent():
    sizes = [10, 100, 1000]
    assert runs.slope(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_classifiers_learn():
    data = runs.order_of_events(count=600, tokens=8, noise=0.1)
    torch.manual_seed(0)
    model = runs.Encoder(data, runs.ENCODERS["flow"], width=16)
    assert runs.classify(model, data, 150, 0, rate=3e-3) > 60


def test_sources_are_clipped_as_conservation_says():
    share = runs.clipped_share()
    assert 35 < share["n = m"] < 65


@pytest.mark.slow
def test_quick_scale_records_every_claim(tmp_path):
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    paper.experiment(run)
    assert set(run.records) == {claim.id for claim in paper.PAPER.claims if not claim.beyond}
    assert run.records["conservation"]["holds"] and run.records["exact"]["holds"]
    assert sorted(run.figures) == ["classification.svg", "cost.svg"]
