"""A sparse directed network as brains have them, skewed and small-world with a rich club, and the measures that say so.

N nodes on a ring; out-degrees round(lognormal(ln 8, 0.6)) within [2, 80]; each node points at its nearest neighbours, and each
edge
is rewired with probability 0.15 to a node drawn in proportion to its degree; the 25 largest hubs point at each other with
probability 0.35; weights are lognormal(0, 1), whose Gini coefficient is 2 Phi(1 / sqrt 2) - 1 = 0.52.

Clustering, paths and the rich club are read from the undirected network and compared with shuffles that keep every degree:
against
other random networks they would be inflated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from regard._errors import InputError

Links = Bool[np.ndarray, "nodes nodes"]


def sparse_brain_graph(
    nodes: int = 500,
    seed: int = 0,
    *,
    degree: float | int = 8.0,
    spread: float | int = 0.6,
    rewired: float | int = 0.15,
    hubs: int = 25,
    club: float | int = 0.35,
) -> tuple[Links, Float[np.ndarray, "nodes nodes"]]:
    """Who points at whom, and with what weight.

    >>> links, weights = sparse_brain_graph(100)
    >>> bool(links.diagonal().any()), bool((weights[links] > 0).all()), bool(weights[~links].any())
    (False, True, False)
    """
    if not 0 < hubs < nodes:
        raise InputError.of("hubs", given=hubs, expected=f"1 to {nodes - 1}")
    rng = np.random.default_rng(seed)
    drawn = np.rint(rng.lognormal(np.log(degree), spread, nodes)).astype(int)
    out = drawn.clip(2, min(80, nodes - 1))
    links = np.zeros((nodes, nodes), bool)
    for i, count in enumerate(out):
        offsets = np.arange(1, count + 1)
        near = (i + np.where(offsets % 2, (offsets + 1) // 2, -(offsets // 2))) % nodes
        moved = rng.random(count) < rewired
        near[moved] = rng.choice(nodes, moved.sum(), p=out / out.sum())
        links[i, near] = True
    largest = np.argsort(-out, kind="stable")[:hubs]
    links[np.ix_(largest, largest)] |= rng.random((hubs, hubs)) < club
    np.fill_diagonal(links, False)
    return links, np.where(links, rng.lognormal(0, 1, links.shape), 0.0)


def random_graph(nodes: int, density: float | int, seed: int = 0) -> Links:
    """A uniform random network: each edge with the same probability."""
    links = np.random.default_rng(seed).random((nodes, nodes)) < density
    np.fill_diagonal(links, False)
    return links


def undirected(links: Links) -> Links:
    """An edge where there is one in either direction."""
    return links | links.T


def shuffled(links: Links, seed: int = 0, swaps: int = 10) -> Links:
    """The undirected network with its edges exchanged in pairs, `swaps` attempts an edge; every degree stays.

    Cost: a Python loop over the attempts.
    """
    rng = np.random.default_rng(seed)
    edges = np.argwhere(np.triu(links, 1)).tolist()
    there = {(min(a, b), max(a, b)) for a, b in edges}
    picks = rng.integers(len(edges), size=(swaps * len(edges), 2)).tolist()
    turns = (rng.random(len(picks)) < 0.5).tolist()
    for (one, two), turn in zip(picks, turns, strict=True):
        (a, b), (c, d) = edges[one], edges[two]
        if turn:
            c, d = d, c
        if len({a, b, c, d}) < 4:
            continue
        new, other = (min(a, d), max(a, d)), (min(c, b), max(c, b))
        if new in there or other in there:
            continue
        there -= {(min(a, b), max(a, b)), (min(c, d), max(c, d))}
        there |= {new, other}
        edges[one], edges[two] = [a, d], [c, b]
    found = np.zeros_like(links)
    rows, columns = np.array(sorted(there)).T
    found[rows, columns] = found[columns, rows] = True
    return found


def clustering(links: Links) -> float:
    """Mean over nodes of the share of pairs of neighbours that are linked; 0 for fewer than two neighbours."""
    a = links.astype(float)
    degree = a.sum(1)
    triangles = ((a @ a) * a).sum(1)
    pairs = degree * (degree - 1)
    return float(np.divide(triangles, pairs, out=np.zeros_like(pairs), where=pairs > 0).mean())


def path_length(links: Links) -> float:
    """Mean number of edges on the shortest path, over the pairs that are joined by one."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import shortest_path

    distance = shortest_path(csr_array(links), unweighted=True, directed=False)
    pairs = np.isfinite(distance) & (distance > 0)
    return float(distance[pairs].mean())


def rich_club(links: Links, top: float | int = 0.1) -> float:
    """Density of the edges among the `top` share of nodes of the largest degrees."""
    count = max(2, round(top * len(links)))
    rich = np.argsort(-links.sum(1), kind="stable")[:count]
    among = links[np.ix_(rich, rich)]
    return float(among.sum() / (count * (count - 1)))


def gini(values: Float[np.ndarray, "values"]) -> float:
    """0 when all are equal, towards 1 when one has everything.

    >>> round(gini(np.array([1.0, 1.0])), 3), round(gini(np.array([0.0, 1.0])), 3)
    (0.0, 0.5)
    """
    ordered = np.sort(values)
    rank = np.arange(1, len(ordered) + 1)
    return float(((2 * rank - len(ordered) - 1) * ordered).sum() / (len(ordered) * ordered.sum()))


@dataclass(frozen=True, slots=True)
class GraphMeasures:
    """What is said of a network.

    Attributes:
        density: share of the possible directed edges.
        small_world: clustering over path length, each over that of degree-preserving shuffles; above 1 is small-world.
        club: rich-club coefficient of the top decile over that of the shuffles.
        degrees: coefficient of variation of the out-degrees.
    """

    density: float
    small_world: float
    club: float
    degrees: float


def graph_measures(links: Links, shuffles: int = 3, seed: int = 0) -> GraphMeasures:
    """The measures of a directed network, against the mean of `shuffles` of its undirected form."""
    both = undirected(links)
    others = [shuffled(both, seed + i) for i in range(shuffles)]
    ratio = lambda measure: measure(both) / np.mean([measure(other) for other in others])  # noqa: E731
    out = links.sum(1)
    nodes = len(links)
    return GraphMeasures(
        density=float(links.sum() / (nodes * (nodes - 1))),
        small_world=float(ratio(clustering) / ratio(path_length)),
        club=float(ratio(rich_club)),
        degrees=float(out.std() / out.mean()),
    )
