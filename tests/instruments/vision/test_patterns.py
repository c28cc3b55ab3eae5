"""The pattern code: principal components against numpy, the autoencoder, clusters of planted patterns, and the page."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from regard._errors import InputError, OutputError
from regard.instruments.vision import ViTAnalyzer, cluster, fit_patterns, layout, pca_error
from regard.instruments.vision.page import colours, png
from regard.papers._digits_vit import new_vit


def planted(kinds: int = 3, each: int = 30):
    """Noisy maps of a few kinds: a bright place for each kind."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(kinds * each, 15, 15, generator=generator) * 2e-4 + 1e-3
    for kind in range(kinds):
        maps[kind * each : (kind + 1) * each, 2 + 4 * kind, 3 : 3 + 3 * (kind + 1)] += 0.2
    return maps, torch.arange(kinds).repeat_interleave(each)


def test_pca_equals_numpy():
    train, held = torch.randn(40, 12).double(), torch.randn(15, 12).double()
    centre = train.numpy().mean(0)
    _, _, basis = np.linalg.svd(train.numpy() - centre, full_matrices=False)
    rest = held.numpy() - centre
    rest = rest - rest @ basis[:5].T @ basis[:5]
    assert pca_error(train, held, 5) == pytest.approx((rest**2).mean())
    assert pca_error(train, train, 12) == pytest.approx(0, abs=1e-12)


def test_the_autoencoder_learns_and_repeats_itself():
    maps, _ = planted()
    short = fit_patterns(maps, epochs=1)
    long = fit_patterns(maps, epochs=15, batch=16)
    assert long.error(maps) < 0.7 * short.error(maps)
    again = fit_patterns(maps, epochs=1)
    torch.testing.assert_close(short.codes(maps), again.codes(maps))
    assert long.codes(maps).shape == (90, 16)
    scaled = long.scaled(maps)
    assert float(scaled.mean()) == pytest.approx(0, abs=1e-4)


def test_clusters_find_planted_kinds():
    maps, kind = planted()
    codes = fit_patterns(maps, epochs=10).codes(maps)
    found = cluster(codes, groups=range(2, 6))
    assert found.silhouette == max(found.tried.values())
    for label in found.label.unique():  # no group mixes two kinds
        assert len(kind[found.label == label].unique()) == 1
    assert layout(codes).shape == (90, 2)


def test_patterns_must_be_square_and_enough():
    with pytest.raises(InputError, match="square"):
        fit_patterns(torch.rand(4, 5, 7))
    with pytest.raises(InputError, match="too few"):
        cluster(torch.rand(4, 16))


def test_png_is_a_picture():
    import base64
    import io

    from PIL import Image

    pixels = colours(torch.rand(5, 7))
    data = base64.b64decode(png(pixels).split(",")[1])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels.numpy())


@pytest.fixture(scope="module")
def analyzer():
    torch.manual_seed(0)
    model = new_vit(0, width=32, layers=2, heads=3 + 1).eval()
    return ViTAnalyzer(model, torch.randn(12, 1, 32, 32), torch.arange(12) % 10)


def test_the_page_has_every_view_and_no_network(analyzer, tmp_path):
    view = analyzer.patterns(epochs=1, groups=range(2, 4))
    path = analyzer.report(tmp_path / "heads.html", patterns=view)
    text = path.read_text()
    assert not re.findall(r"(?:href|src)=\"(?!data:)", text), "something is fetched"
    assert "<script" not in text
    assert text.count("<svg") == 4 + 1 + 1  # importance by four metrics, strength, patterns
    for head in analyzer.heads():
        assert f"<td>{head}</td>" in text
    assert len(text) < 300_000
    assert [p.name for p in tmp_path.iterdir()] == ["heads.html"]


def test_the_table_has_one_row_for_each_head(analyzer):
    frame = analyzer.to_frame()
    assert frame.shape[0] == 8
    assert {"pattern", "mean_hop", "content_dependence", "divergence"} <= set(frame.columns)


def test_a_page_that_cannot_be_written(analyzer, tmp_path):
    view = analyzer.patterns(epochs=1, groups=range(2, 4))
    with pytest.raises(OutputError, match="cannot write"):
        analyzer.report(tmp_path / "missing" / "heads.html", patterns=view)
