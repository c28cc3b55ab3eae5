"""Each mechanism against a loop, a closed form or networkx."""

from __future__ import annotations

import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.labs import brain_basis as lab
from regard.labs.brain_basis import BrainBasis, Walk

DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# latching attention


def test_an_update_is_what_the_equations_say():
    keys = lab.grouped_keys(1, generator(), groups=4, size=6)[0]
    x, h = torch.randn(6, dtype=DOUBLE, generator=generator(1)), torch.rand(4, dtype=DOUBLE)
    a, moved, tired = lab.latching_attention(keys, x, h, 5.0, 0.7, 20.0, 0.25)
    scores = [
        5.0 * (sum(float(k * v) for k, v in zip(keys[m], x, strict=True)) - 0.7 * float(h[m]))
        for m in range(4)
    ]
    total = sum(math.exp(s) for s in scores)
    for m in range(4):
        assert float(a[m]) == pytest.approx(math.exp(scores[m]) / total)
        assert float(tired[m]) == pytest.approx(float(h[m]) + (float(a[m]) - float(h[m])) / 20)
    read = sum(a[m] * keys[m] for m in range(4))
    torch.testing.assert_close(moved, 0.75 * x + 0.25 * read)


@given(seed=st.integers(0, 10**6), step=st.floats(0.05, 1.0), beta=st.floats(0.5, 30.0))
@settings(max_examples=30, deadline=None)
def test_without_fatigue_it_is_retrieval_and_the_energy_never_rises(seed, step, beta):
    keys = lab.grouped_keys(3, generator(seed), groups=7, size=5)
    x = torch.randn(3, 5, dtype=DOUBLE, generator=generator(seed + 1))
    tired = torch.rand(3, 7, dtype=DOUBLE, generator=generator(seed + 2))
    before = lab.retrieval_energy(keys, x, beta)
    for _ in range(10):
        a, x, tired = lab.latching_attention(keys, x, tired, beta, 0.0, 30.0, step)
        after = lab.retrieval_energy(keys, x, beta)
        assert bool((after <= before + 1e-12).all())
        before = after
        torch.testing.assert_close(a.sum(-1), torch.ones(3, dtype=DOUBLE))
    # a full step is attention itself, the keys being their own values
    a, read, _ = lab.latching_attention(keys, x, tired, beta, 0.0, 30.0, 1.0)
    scale = beta * 5**0.5
    reference = torch.nn.functional.scaled_dot_product_attention(
        scale * x.unsqueeze(1), keys, keys
    )[:, 0]
    torch.testing.assert_close(read, reference)


def test_gradients_pass_through_an_update():
    keys = lab.grouped_keys(1, generator(), groups=3, size=4)[0].requires_grad_()
    x = torch.randn(4, dtype=DOUBLE, generator=generator(1)).requires_grad_()
    h = torch.rand(3, dtype=DOUBLE, generator=generator(2)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *z: lab.latching_attention(*z, 4.0, 0.5, 30.0), (keys, x, h)
    )


def test_fatigue_stays_within_its_bounds_and_is_a_leaky_mean():
    keys = lab.grouped_keys(1, generator(), groups=5, size=8)
    x, h, seen = keys[:, 0], torch.zeros(1, 5, dtype=DOUBLE), []
    for _ in range(200):
        a, x, h = lab.latching_attention(keys, x, h, 12.0, 0.5, 10.0)
        seen.append(a)
        assert bool(((h >= 0) & (h <= 1)).all())
    weights = 0.1 * 0.9 ** torch.arange(199, -1, -1, dtype=DOUBLE)
    torch.testing.assert_close(h, (weights[:, None, None] * torch.stack(seen)).sum(0))


def test_runs_walked_together_are_runs_walked_alone():
    keys = lab.grouped_keys(3, generator(), groups=6, size=16)
    gain, tau = (
        torch.tensor([0.0, 0.5, 1.0], dtype=DOUBLE),
        torch.tensor([30.0, 20.0, 30.0], dtype=DOUBLE),
    )
    together = lab.walk(keys, 150, generator(1), gain=gain, tau=tau, sigma=0.0)
    for run in range(3):
        alone = lab.walk(
            keys[run : run + 1],
            150,
            generator(1),
            gain=float(gain[run]),
            tau=float(tau[run]),
            sigma=0.0,
        )
        np.testing.assert_array_equal(together.on[run], alone.on[0])
        np.testing.assert_allclose(together.peak[run], alone.peak[0])


def test_keys_of_a_group_overlap_by_the_correlation():
    keys = lab.grouped_keys(200, generator(), groups=5, each=4, correlation=0.3)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(200, 20, dtype=DOUBLE))
    overlap = (keys @ keys.mT).mean(0).numpy()
    same = np.kron(np.eye(5), np.ones((4, 4))).astype(bool) & ~np.eye(20, dtype=bool)
    assert overlap[same].mean() == pytest.approx(0.3, abs=0.02)
    assert overlap[~same & ~np.eye(20, dtype=bool)].mean() == pytest.approx(0, abs=0.01)


def test_a_walk_counts_tokens_dwells_and_transitions():
    on = np.array([[0, 0, 0, -1, 1, 1, -1, 1, 4, 4, 4, 4], [-1] * 12])
    walk = Walk(on, np.zeros((2, 12)))
    assert walk.distinct.tolist() == [3, 0]
    assert walk.share.tolist() == [10 / 12, 0]
    # runs 000, 11, 1, 4444
    assert walk.dwell.tolist() == [2.5, 0.0]
    assert walk.tokens(0) == [0, 1, 4]
    assert walk.staying(2)[0] == 0.5 and math.isnan(walk.staying(2)[1])


# phase gates


def test_no_gate_is_plain_attention_and_the_leak_is_exact():
    q, k, v = torch.randn(3, 2, 5, 4, dtype=DOUBLE, generator=generator())
    phase = 7 * torch.rand(2, 5, dtype=DOUBLE, generator=generator(1))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(lab.phase_gated_attention(q, k, v, phase, phase.flip(1), 0), plain)
    same = k[:, :1].expand(-1, 2, -1)
    for kappa in (0.3, 2, 5.0):
        pair = torch.tensor([0.4, 0.4 + math.pi], dtype=DOUBLE).expand(2, -1)
        own = torch.full((2, 5), 0.4, dtype=DOUBLE)
        weights = lab.phase_gated_attention(
            q, same, torch.eye(2, dtype=DOUBLE).expand(2, 2, 2), own, pair, kappa
        )
        leak = weights[..., 1] / weights[..., 0]
        torch.testing.assert_close(leak, torch.full_like(leak, lab.phase_leak(kappa)))


def test_gated_scores_are_those_of_a_loop_and_turn_with_all_phases():
    q, k, v = torch.randn(3, 1, 4, 3, dtype=DOUBLE, generator=generator(2))
    mine, theirs = 7 * torch.rand(2, 1, 4, dtype=DOUBLE, generator=generator(3))
    found = lab.phase_gated_attention(q, k, v, mine, theirs, 1.3)
    for i in range(4):
        scores = [
            float(q[0, i] @ k[0, j]) / math.sqrt(3)
            + 1.3 * math.cos(float(mine[0, i] - theirs[0, j]))
            for j in range(4)
        ]
        total = sum(math.exp(s) for s in scores)
        expected = sum(math.exp(s) / total * v[0, j] for j, s in enumerate(scores))
        torch.testing.assert_close(found[0, i], expected)
    torch.testing.assert_close(
        lab.phase_gated_attention(q, k, v, mine + 1.1, theirs + 1.1, 1.3), found
    )
    assert torch.autograd.gradcheck(
        lambda *z: lab.phase_gated_attention(*z, 1.3),
        tuple(t.requires_grad_() for t in (q, k, v, mine, theirs)),
    )


def test_a_carrier_opens_the_gate_at_its_peak_and_shuts_it_in_its_trough():
    q, k, v = torch.randn(3, 1, 2, 3, dtype=DOUBLE, generator=generator(4))
    phase = torch.tensor([[0.0, math.pi]], dtype=DOUBLE)

    def at(carrier):
        return lab.nested_attention(
            q, k, v, phase, phase, torch.full((1, 2), carrier, dtype=DOUBLE), 2
        )

    torch.testing.assert_close(at(0.0), lab.phase_gated_attention(q, k, v, phase, phase, 2))
    torch.testing.assert_close(
        at(math.pi), torch.nn.functional.scaled_dot_product_attention(q, k, v)
    )
    torch.testing.assert_close(at(math.pi / 2), lab.phase_gated_attention(q, k, v, phase, phase, 1))
    bands = [lab.band_frequency(6, m) for m in range(4)]
    np.testing.assert_allclose(np.diff(np.log(bands)), 1)


def test_the_receiver_turns_to_the_other_sender():
    right, turn = lab.switch_sender(
        torch.tensor([0.0, 6.0], dtype=DOUBLE), 200, generator(), cycle=8, cycles=4
    )
    assert right.shape == (2, 32) and int(turn) == 16
    assert right[1, :16].min() > 0.99 and right[1, 24:].min() > 0.99
    assert right[1, 16] < 0.2
    assert float(right[0].mean()) == pytest.approx(0.5, abs=0.1)


# a phase code


@pytest.mark.parametrize("drive", [1.2, 1.5, 2.0, 4.0])
def test_the_rate_without_rhythm_is_the_closed_form(drive):
    found = lab.simulate(np.array([drive]), 30, depth=0.0, noise=0.0)
    assert found.steady_rate[0] == pytest.approx(lab.lif_rate(drive), rel=0.02)
    assert found.rate[0] == pytest.approx(lab.lif_rate(drive), rel=0.02)


def test_no_neuron_spikes_below_threshold_or_within_its_refractory_time():
    found = lab.simulate(np.array([0.95, 6.0]), 5, depth=0.0, noise=0.0)
    assert found.rate[0] == 0 == lab.lif_rate(0.95) and np.isnan(found.first_phase[0]).all()
    times = np.flatnonzero(found.raster[1].ravel()) * found.step
    assert np.diff(times).min() >= 4.0


def test_the_first_spike_is_read_from_the_peak_of_inhibition():
    raster = np.zeros((1, 3, 100), bool)
    raster[0, 0, [25, 80]] = True
    raster[0, 2, 50] = True
    spikes = lab.Spikes(raster, 0.1)
    np.testing.assert_allclose(spikes.first_phase[0, [0, 2]], [math.pi / 2, math.pi])
    assert math.isnan(spikes.first_phase[0, 1]) and spikes.counts.tolist() == [[2, 0, 1]]
    # inhibition is strongest at phase 0: a neuron that it holds back spikes in the other half
    found = lab.simulate(np.array([1.4]), 6, noise=0.0).first_phase
    assert (np.abs(found - math.pi) < math.pi / 2).all()


def test_decoding_tests_on_cycles_it_has_not_seen():
    rng = np.random.default_rng(0)
    assert lab.decode(rng.normal(0, 1, 4000), rng.normal(2, 1, 4000)) == pytest.approx(
        0.841, abs=0.02
    )
    assert lab.decode(rng.normal(0, 1, 4000), rng.normal(0, 1, 4000)) == pytest.approx(
        0.5, abs=0.03
    )
    assert lab.decode(np.ones(6), np.ones(6)) == 0.5
    # the odd cycles say the opposite of the even ones
    assert lab.decode(np.array([0.0, 1, 0, 1]), np.array([1.0, 0, 1, 0])) == 0.0
    assert lab.decode(np.array([1.0, np.nan]), np.array([2.0, 2.0])) == 0.75


# networks


@pytest.fixture(scope="module")
def network() -> np.ndarray:
    return lab.undirected(lab.sparse_brain_graph(150, 1)[0])


def test_measures_agree_with_networkx(network):
    graph = nx.from_numpy_array(network)
    assert lab.clustering(network) == pytest.approx(nx.average_clustering(graph))
    assert lab.path_length(network) == pytest.approx(nx.average_shortest_path_length(graph))
    top = sorted(graph, key=lambda node: -graph.degree(node))[:15]
    assert lab.rich_club(network) == pytest.approx(nx.density(graph.subgraph(top)))


def test_paths_are_counted_over_joined_pairs_only():
    links = np.zeros((5, 5), bool)
    for a, b in ((0, 1), (1, 2), (3, 4)):
        links[a, b] = links[b, a] = True
    assert lab.path_length(links) == pytest.approx((1 + 1 + 2 + 1) / 4)


def test_a_shuffle_keeps_every_degree_and_loses_the_clusters(network):
    other = lab.shuffled(network, 3)
    np.testing.assert_array_equal(other.sum(1), network.sum(1))
    np.testing.assert_array_equal(other, other.T)
    assert not other.diagonal().any() and (other != network).mean() > 0.05
    assert lab.clustering(other) < 0.5 * lab.clustering(network)
    np.testing.assert_array_equal(other, lab.shuffled(network, 3))


def test_the_network_is_drawn_as_described():
    links, weights = lab.sparse_brain_graph(300, 0, rewired=0.0, hubs=1)
    for node in (0, 7, 299):
        targets = np.flatnonzero(links[node])
        around = np.minimum((targets - node) % 300, (node - targets) % 300)
        count = len(targets)
        assert sorted(around.tolist()) == sorted([(i + 2) // 2 for i in range(count)])
    assert links.sum(1).min() >= 2 and links.sum(1).max() <= 80
    assert np.log(weights[links]).mean() == pytest.approx(0, abs=0.1)
    clubbed = lab.sparse_brain_graph(300, 0, rewired=0.0, hubs=25, club=1.0)[0]
    hubs = np.argsort(-links.sum(1), kind="stable")[:25]
    assert clubbed[np.ix_(hubs, hubs)].sum() == 25 * 24
    with pytest.raises(InputError, match="hubs must be 1 to 9"):
        lab.sparse_brain_graph(10, hubs=10)


def test_gini_is_that_of_its_definition_and_of_the_lognormal():
    values = np.random.default_rng(0).lognormal(0, 1, 200)
    brute = np.abs(values[:, None] - values).mean() / (2 * values.mean())
    assert lab.gini(values) == pytest.approx(brute)
    large = np.random.default_rng(1).lognormal(0, 1, 200_000)
    assert lab.gini(large) == pytest.approx(math.erf(0.5), abs=0.01)


def test_a_random_network_is_not_small_world():
    found = lab.graph_measures(lab.random_graph(200, 0.05), 2)
    assert found.density == pytest.approx(0.05, abs=0.005)
    assert found.small_world == pytest.approx(1, abs=0.25)
    assert found.club == pytest.approx(1, abs=0.25)


# gated learning


def test_learning_at_every_step_is_least_mean_squares():
    stream = lab.make_stream(2, 40, 0, size=3, change=20)
    found = lab.learn_always(stream, 0.05)
    weight = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
    for t in range(40):
        x = torch.as_tensor(stream.inputs[1, t])
        loss = 0.5 * (float(stream.targets[1, t]) - weight @ x) ** 2
        assert found.errors[1, t] == pytest.approx(
            (float(stream.clean[1, t]) - float((weight @ x).detach())) ** 2
        )
        (slope,) = torch.autograd.grad(loss, weight)
        weight = (weight - 0.05 * slope).detach().requires_grad_()
    assert found.updates.all()


def test_the_map_changes_when_it_should_and_has_the_spread_it_should():
    stream = lab.make_stream(400, 60, 0, size=20, change=30)
    first = [
        np.linalg.lstsq(x[:30], y[:30], rcond=None)[0]
        for x, y in zip(stream.inputs, stream.clean, strict=True)
    ]
    later = [
        np.linalg.lstsq(x[30:], y[30:], rcond=None)[0]
        for x, y in zip(stream.inputs, stream.clean, strict=True)
    ]
    assert np.var(first) == pytest.approx(4 / 20, rel=0.05)
    assert abs(np.corrcoef(np.ravel(first), np.ravel(later))[0, 1]) < 0.05
    assert (stream.targets - stream.clean).std() == pytest.approx(0.3, rel=0.02)


def test_a_gate_opens_on_errors_above_the_running_mean():
    stream = lab.make_stream(1, 30, 0, size=3, change=10)
    found = lab.event_gated_learning(stream, 0.5, 0.05, 0.9)
    weight, mean = np.zeros(3), float(stream.targets[0, 0]) ** 2
    second = mean**2
    for t in range(30):
        x = stream.inputs[0, t]
        miss = float(stream.targets[0, t]) - weight @ x
        opened = miss**2 > mean + 0.5 * math.sqrt(max(second - mean**2, 0))
        assert bool(found.updates[0, t]) == opened
        if opened:
            weight = weight + 0.05 * miss * x
        mean, second = 0.9 * mean + 0.1 * miss**2, 0.9 * second + 0.1 * miss**4
    assert 0 < found.updates.sum() < 30


def test_random_updates_are_as_many_as_asked():
    stream = lab.make_stream(3, 4000, 0)
    found = lab.learn_at_random(stream, np.array([0.1, 0.5, 0.9]))
    np.testing.assert_allclose(found.updates.mean(1), [0.1, 0.5, 0.9], atol=0.03)
    assert found.errors[0].mean() > found.errors[2].mean()


# the laboratory


def test_a_small_laboratory_measures_everything_and_meets_what_is_exact():
    small = BrainBasis(
        steps=400,
        seeds=2,
        trials=40,
        cycles=6,
        drives=(1.2, 1.4, 2.0),
        nodes=120,
        networks=2,
        shuffles=1,
        updates=1000,
    )
    result = small.run()
    for name in ("leak", "retrieval", "warm", "closed form", "advance"):
        assert result.checks[name].holds is True, str(result)
    assert len(result.checks) >= 25
    assert all(math.isfinite(row["measured"]) for row in result.rows())
    again = small.run()
    assert [row["measured"] for row in again.rows()] == [row["measured"] for row in result.rows()]
    result.plot(["leak", "learning", "turning to the other sender"])


def test_how_far_outside_a_range_is_said_as_a_share():
    from regard.labs.brain_basis.states import outside

    assert outside(np.array([3.0, 5.0]), (2, 10)) == 0
    assert outside(np.array([1.0, 5.0]), (2, 10)) == 0.5
    assert outside(np.array([3.0, 12.0]), (2, 10)) == pytest.approx(0.2)
