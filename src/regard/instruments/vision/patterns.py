"""What the map of a head looks like: relative maps, a small autoencoder of them, and their clusters.

The relative map of a head is its attention by offset instead of place: at offset (dr, dc) the mean of `A_ij` over the pairs
of patches that lie so to each other, `(2 rows - 1) x (2 columns - 1)`. Maps of all heads and images are scaled by
`log(1e-6 + A)` and encoded into 16 numbers by a convolutional autoencoder; k-means groups the codes.
Source: Li et al. 2023, arXiv 2303.13731 (the formulas are our reading of its abstract).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from regard._errors import InputError
from regard.instruments.vision.strength import Grid, check_grid


def relative_map(
    maps: Float[Tensor, "*maps tokens tokens"], grid: Grid, *, special: int = 1
) -> Float[Tensor, "*maps offsets_down offsets_across"]:
    """Mean attention at every relative offset; the centre is the patch itself.

    >>> relative_map(torch.eye(4), (2, 2), special=0)[1].tolist()
    [0.0, 1.0, 0.0]
    """
    check_grid(maps.shape[-1], grid, special)
    rows, columns = grid
    row = torch.arange(rows * columns) // columns
    column = torch.arange(rows * columns) % columns
    down = row[None, :] - row[:, None] + rows - 1
    across = column[None, :] - column[:, None] + columns - 1
    index = (down * (2 * columns - 1) + across).flatten().to(maps.device)
    size = (2 * rows - 1) * (2 * columns - 1)
    flat = maps[..., special:, special:].flatten(-2)
    summed = flat.new_zeros(*flat.shape[:-1], size).index_add_(-1, index, flat)
    pairs = torch.bincount(index, minlength=size).to(maps.dtype)
    return (summed / pairs).unflatten(-1, (2 * rows - 1, 2 * columns - 1))


def tiled_map(
    attention: Float[Tensor, "tokens tokens"], grid: Grid, *, special: int = 1
) -> Float[Tensor, "height width"]:
    """One image of all query maps: the tile at (r, c) is where patch (r, c) looks."""
    check_grid(attention.shape[-1], grid, special)
    rows, columns = grid
    tiles = attention[special:, special:].reshape(rows, columns, rows, columns)
    return tiles.permute(0, 2, 1, 3).reshape(rows * rows, columns * columns)


class PatternEncoder(nn.Module):
    """Convolutional autoencoder of square patterns: three convolutions of stride 2, 16 numbers, and the way back."""

    def __init__(self, size: int, code: int = 16) -> None:
        super().__init__()
        self.size = size
        self.padded = -(-size // 8) * 8
        inner = 64 * (self.padded // 8) ** 2
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(inner, code)),
        )
        self.decoder = nn.Sequential(
            *(nn.Linear(code, inner), nn.ReLU(), nn.Unflatten(1, (64, *[self.padded // 8] * 2))),
            *(nn.ConvTranspose2d(64, 32, 3, 2, 1, 1), nn.ReLU()),
            *(nn.ConvTranspose2d(32, 16, 3, 2, 1, 1), nn.ReLU()),
            nn.ConvTranspose2d(16, 1, 3, 2, 1, 1),
        )

    def encode(self, patterns: Float[Tensor, "maps size size"]) -> Float[Tensor, "maps code"]:
        room = self.padded - self.size
        return self.encoder(functional.pad(patterns[:, None], (0, room, 0, room), mode="replicate"))

    def forward(self, patterns: Float[Tensor, "maps size size"]) -> Float[Tensor, "maps size size"]:
        return self.decoder(self.encode(patterns))[:, 0, : self.size, : self.size]


@dataclass
class Patterns:
    """A fitted autoencoder and what is needed to apply it to other maps."""

    encoder: PatternEncoder
    mean: float
    spread: float

    def scaled(self, maps: Float[Tensor, "maps size size"]) -> Float[Tensor, "maps size size"]:
        return (log_scale(maps) - self.mean) / self.spread

    @torch.no_grad()
    def codes(self, maps: Float[Tensor, "maps size size"]) -> Float[Tensor, "maps code"]:
        return self.encoder.encode(self.scaled(maps))

    @torch.no_grad()
    def error(self, maps: Float[Tensor, "maps size size"]) -> float:
        """Mean squared error of the reconstruction, in units of the variance of the fitted maps."""
        scaled = self.scaled(maps)
        return float((self.encoder(scaled) - scaled).square().mean())


def log_scale(maps: Tensor) -> Tensor:
    """`log(1e-6 + A)`: without it only the peaks of self-attention would be fitted."""
    return (1e-6 + maps).log()


def fit_patterns(
    maps: Float[Tensor, "maps down across"],
    *,
    code: int = 16,
    epochs: int = 50,
    batch: int = 128,
    rate: float = 1e-3,
    seed: int = 0,
) -> Patterns:
    """Trains the autoencoder on relative maps (square; log-scaled and standardised here).

    Cost: about 10 s on one core for 2000 maps of 15 x 15 and 50 epochs.
    """
    if maps.shape[-1] != maps.shape[-2]:
        raise InputError(
            f"patterns must be square, got {tuple(maps.shape[-2:])}; use a square grid"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = PatternEncoder(maps.shape[-1], code)
    scaled = log_scale(maps)
    found = Patterns(encoder, float(scaled.mean()), float(scaled.std().clamp_min(1e-6)))
    scaled = found.scaled(maps)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=rate)
    with torch.enable_grad():
        for _ in range(epochs):
            for chosen in torch.randperm(len(scaled), generator=generator).split(batch):
                loss = functional.mse_loss(encoder(scaled[chosen]), scaled[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return found


def pca_error(
    train: Float[Tensor, "maps features"], held: Float[Tensor, "held features"], code: int = 16
) -> float:
    """Mean squared error on `held` of the best linear code of that size on `train` (principal components)."""
    mean = train.mean(0)
    _, _, basis = torch.linalg.svd(train - mean, full_matrices=False)
    basis = basis[:code]
    rest = (held - mean) - (held - mean) @ basis.T @ basis
    return float(rest.square().mean())


@dataclass
class Clusters:
    """Groups of codes: `label` of each, the `silhouette` of the chosen number of groups and of all that were tried."""

    label: Int[Tensor, " maps"]
    silhouette: float
    tried: dict[int, float]


def cluster(
    codes: Float[Tensor, "maps code"], *, groups: range = range(6, 13), seed: int = 0
) -> Clusters:
    """k-means of the codes with the number of groups that has the best silhouette (needs the `experiments` extra)."""
    try:
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score
    except ImportError as error:
        raise InputError("clusters need scikit-learn; pip install 'regard[experiments]'") from error
    points: Any = codes.double().numpy()
    best: tuple[float, Any] = (-2.0, None)
    tried: dict[int, float] = {}
    for count in groups:
        if count >= len(points):
            break
        means: Any = KMeans(count, random_state=seed)
        label = means.set_params(n_init=4).fit_predict(points)
        some = min(len(points), 1500)
        tried[count] = float(silhouette_score(points, label, sample_size=some, random_state=seed))
        best = max(best, (tried[count], label), key=lambda pair: pair[0])
    if best[1] is None:
        raise InputError(f"{len(points)} maps are too few for {groups.start} groups or more")
    return Clusters(torch.tensor(best[1], dtype=torch.long), best[0], tried)


def layout(codes: Float[Tensor, "maps code"]) -> Float[Tensor, "maps 2"]:
    """The first two principal components, for a scatter plot."""
    centred = codes - codes.mean(0)
    _, _, basis = torch.linalg.svd(centred, full_matrices=False)
    return centred @ basis[:2].T
