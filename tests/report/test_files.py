from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
from synthetic import make_report

from regard._errors import InputError, OutputError
from regard.report import check_writable, pool_levels, read_data, to_frame, write_data
from regard.report.codec import decode, encode
from regard.report.files import from_json, to_json, write_atomic
from regard.report.schema import Measure, Sequence, pooled_shares


def test_json_round_trip_keeps_every_number_to_seven_digits() -> None:
    report = make_report(90, layers=4, heads=3, stacks=("vision",))
    again = from_json(to_json(report))
    assert to_json(again) == to_json(report)
    assert again.header == report.header
    assert again.findings[0].title == report.findings[0].title
    before, after = report.stacks[0], again.stacks[0]
    for left, right in zip(before.measures, after.measures, strict=True):
        np.testing.assert_allclose(right.values, left.values, rtol=1e-6)
        assert right.definition == left.definition
    assert before.budget is not None and after.budget is not None
    np.testing.assert_array_equal(after.budget.levels[0].kept, before.budget.levels[0].kept)
    assert before.cards[5].map is not None and after.cards[5].map is not None
    np.testing.assert_array_equal(after.cards[5].map, before.cards[5].map)
    assert after.cards[5].map.dtype == np.uint8
    assert before.sequence is not None and after.sequence is not None
    assert after.sequence.tokens == before.sequence.tokens


def test_values_that_were_not_measured_come_back_as_nan() -> None:
    report = make_report(40, layers=2, heads=2)
    report.stacks[0].measures[0].values[1, 1] = np.nan
    again = from_json(to_json(report))
    assert math.isnan(again.stacks[0].measures[0].values[1, 1])
    assert "NaN" not in to_json(report)


def test_a_patch_grid_survives_as_a_tuple() -> None:
    sequence = Sequence(tokens=[], received=np.ones(6), grid=(2, 3))
    assert decode(Sequence, encode(sequence)).grid == (2, 3)


def test_other_json_is_refused() -> None:
    with pytest.raises(InputError, match="schema 1, got None"):
        from_json("{}")
    with pytest.raises(TypeError, match="got set"):
        encode({1, 2})


def test_frame_has_one_row_for_each_measured_number() -> None:
    report = make_report(40, layers=3, heads=2, sampled=True, stacks=("vision",))
    report.stacks[0].measures[0].values[0, 1] = np.nan
    frame = to_frame(report)
    assert frame.columns == ["stack", "layer", "head", "measure", "value", "se"]
    expected = sum(np.isfinite(m.values).sum() for s in report.stacks for m in s.measures)
    assert frame.height == expected
    sink: Measure = report.stacks[0].measures[0]
    row = frame.filter(stack="", layer=2, head=1, measure="sink")
    assert row["value"].item() == pytest.approx(float(sink.values[2, 1]))
    assert sink.error is not None
    assert row["se"].item() == pytest.approx(float(sink.error[2, 1]))
    assert frame.filter(measure="induction")["se"].null_count() == 8 - 2 + 16


def test_data_files_are_written_side_by_side(tmp_path: Path) -> None:
    import polars as pl

    report = make_report(40, layers=3, heads=2)
    written = write_data(report, tmp_path / "report.v2")
    assert [path.name for path in written] == ["report.v2.json", "report.v2.parquet"]
    assert to_json(read_data(written[0])) == to_json(report)
    assert pl.read_parquet(written[1]).equals(to_frame(report))
    assert [path.name for path in write_data(report, tmp_path, parquet=False)] == ["report.json"]


@pytest.mark.parametrize("kind", ["directory", "missing folder", "closed folder"])
def test_unwritable_paths_are_named_before_any_work(tmp_path: Path, kind: str) -> None:
    if kind == "directory":
        target, message = tmp_path, "is a directory"
    elif kind == "missing folder":
        target, message = tmp_path / "no" / "report.html", "there is no directory"
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        (tmp_path / "closed").mkdir(mode=0o500)
        target, message = tmp_path / "closed" / "report.html", "closed"
    with pytest.raises(OutputError, match=message):
        check_writable(target)
    assert not list(tmp_path.glob("**/.regard-*"))


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.html"
    write_atomic(target, "old")

    def broken(source: str, destination: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_new_files_get_the_usual_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        assert write_atomic(tmp_path / "a", "x").stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(mask)


def test_pooled_maps_come_back_within_a_step() -> None:
    shares = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    np.testing.assert_allclose(pooled_shares(pool_levels(shares)), shares, atol=0.006)
    assert pool_levels(np.array([[0.0, np.nan], [1.0, 2.0]])).tolist() == [[0, 0], [255, 255]]
