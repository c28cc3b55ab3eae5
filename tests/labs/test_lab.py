"""Settings, verdicts, results and the solvers that all laboratories share."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from regard._errors import InputError, OutputError
from regard.labs import catalogue
from regard.labs.catalogue import LABS
from regard.labs.flows import descend, flow
from regard.labs.results import Check, Result, Series, interval
from regard.labs.settings import Lab, setting


@dataclass(frozen=True, kw_only=True)
class Toy(Lab):
    name = "toy"
    count: int = setting(3, "a count", low=1, high=9)
    size: float = setting(0.5, "a size", above=0, below=1)
    kind: str = setting("up", "a direction", choices=("up", "down"))
    on: bool = setting(True, "a switch")
    rates: tuple[float, ...] = setting((1.0, 2.0), "rates", above=0, least=2, most=4)

    def run(self) -> Result:
        x = np.arange(1.0, 4)
        one = Series("square", x, x**2 + 0.1, 0 * x + 0.2, x**2, "x", "y")
        two = replace(
            one, name="half", panel="square", measured=x / 2, predicted=np.full(3, np.nan)
        )
        check = Check("close", "x is near", 1.1, 1.0, tolerance=0.2)
        return Result.of(self, ([one], [check]), ([two], []))


def test_texts_become_values_of_the_right_type():
    texts = {"count": "4", "size": "0.25", "kind": "down", "on": "no", "rates": "1, 2.5,3"}
    lab = Toy(**Toy.admit(texts))
    assert (lab.count, lab.size, lab.kind, lab.on, lab.rates) == (
        4,
        0.25,
        "down",
        False,
        (1.0, 2.5, 3.0),
    )
    assert isinstance(lab.count, int) and isinstance(Toy(size=np.float32(0.5)).size, float)
    assert Toy(count=5.0).count == 5  # pyright: ignore


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("count", "many", "count must be a whole number from 1 to 9, got 'many'"),
        ("count", 10, "from 1 to 9, got 10"),
        ("count", 2.5, "whole number"),
        ("count", True, "whole number"),
        ("size", 1.0, "size must be a number above 0 and below 1, got 1.0"),
        ("size", math.nan, "above 0 and below 1, got nan"),
        ("size", "inf", "got 'inf'"),
        ("kind", "left", "one of up, down"),
        ("on", "maybe", "yes or no"),
        ("rates", "1", "2 to 4 numbers above 0, separated by commas, got '1'"),
        ("rates", (1.0, -2.0), "above 0"),
        ("rates", "1,,2", "separated by commas"),
        ("rates", None, "separated by commas"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_range(key, value, said):
    with pytest.raises(InputError, match=said):
        Toy(**{key: value})


def test_every_setting_of_every_laboratory_is_described_and_its_default_admissible():
    for name, listed in LABS.items():
        config = listed.config
        assert config.name == name and listed.line
        lab = catalogue.open(name.upper().replace("-", "_"))
        assert type(lab) is config
        for row in config.settings():
            assert row.help and row.range
            given = getattr(lab, row.key)
            text = ",".join(map(str, given)) if isinstance(given, tuple) else str(given)
            assert getattr(catalogue.open(name, {row.key: text}), row.key) == given


def test_an_unknown_name_or_key_lists_what_there_is():
    with pytest.raises(InputError, match=r"'linear-icf'; did you mean linear-icl\?"):
        catalogue.open("linear-icf")
    with pytest.raises(
        InputError, match=r"setting of linear-icl.*spectrum.*did you mean examples, "
    ):
        catalogue.open("linear-icl", {"example": 3})


@pytest.mark.parametrize(
    ("sense", "measured", "error", "tolerance", "holds"),
    [
        ("=", 1.05, 0.0, 0.1, True),
        ("=", 1.15, 0.0, 0.1, False),
        ("=", 1.15, 0.08, 0.1, None),
        ("=", 1.15, 0.3, 0.1, None),
        ("=", 2.0, 0.3, 0.1, False),
        ("<", 0.9, 0.05, 0.0, True),
        ("<", 0.9, 0.2, 0.0, None),
        ("<", 1.3, 0.2, 0.0, False),
        (">", 1.1, 0.05, 0.0, True),
        (">", 0.5, 0.1, 0.0, False),
        (">", 0.95, 0.0, 0.1, True),
        ("=", math.nan, 0.0, 0.1, None),
        ("=", 1.0, math.nan, 0.1, None),
    ],
)
def test_a_verdict_knows_three_answers(sense, measured, error, tolerance, holds):
    check = Check("a", "", measured, 1.0, tolerance=tolerance, error=error, sense=sense)
    assert check.holds is holds


def test_a_result_is_tidy_and_writes_itself(tmp_path):
    result = Toy().run()
    assert len(result.rows()) == 6
    frame = result.to_frame()
    assert frame.columns == ["series", "x", "measured", "error", "predicted"]
    assert "1 of 1 predictions met" in str(result)
    written = result.write(tmp_path / "out")
    assert [path.name for path in written] == [
        "series.csv",
        "checks.csv",
        "settings.json",
        "figure.svg",
    ]
    with written[0].open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["measured"]) == pytest.approx(4.1)
    assert json.loads(written[2].read_text())["rates"] == [1.0, 2.0]
    assert "experiment" not in written[3].read_text() or written[3].stat().st_size > 1000
    with pytest.raises(OutputError, match="cannot write"):
        result.write(written[0] / "below")


def test_parts_of_one_name_do_not_hide_each_other():
    lab, check = Toy(), Check("close", "x is near", 1.1, 1.0)
    assert list(lab.run().series) == ["square", "half"]
    with pytest.raises(InputError, match="names must differ, got close, close"):
        Result.of(lab, ([], [check]), ([], [check]))


def test_a_picture_has_a_line_of_theory_and_points_of_experiment():
    import matplotlib.pyplot as plt

    figure = Toy().run().plot()
    (ax,) = (ax for ax in figure.axes if ax.axison)
    assert len(ax.containers) == 2  # the points with bars
    assert len(ax.lines) >= 2 and ax.get_xlabel() == "x"
    plt.close(figure)
    with pytest.raises(InputError, match="one of square"):
        Toy().run().plot(["circle"])


def test_a_series_needs_a_number_at_every_point():
    x = np.arange(3.0)
    with pytest.raises(InputError, match="shapes"):
        Series("a", x, x[:2], x, x, "", "")


def test_the_solver_and_descent_follow_a_linear_system_to_its_closed_form():
    rng = np.random.default_rng(0)
    matrix = -np.eye(3) + 0.3 * rng.standard_normal((3, 3))
    begin = rng.standard_normal((5, 3))  # five runs at once
    times = np.array([0.0, 0.5, 2.0])
    values, vectors = np.linalg.eig(matrix)
    exact = np.stack(
        [
            (vectors @ np.diag(np.exp(values * t)) @ np.linalg.inv(vectors) @ begin.T).T.real
            for t in times
        ]
    )
    velocity = lambda state, clock: (state @ matrix.T, np.ones_like(clock))  # noqa: E731
    solved, clock = flow(velocity, (begin, np.zeros(1)), times)
    np.testing.assert_allclose(solved, exact, atol=1e-7)
    np.testing.assert_allclose(clock[:, 0], times, atol=1e-9)
    errors = [
        np.abs(descend(velocity, (begin, np.zeros(1)), times, h)[0] - exact).max()
        for h in (0.01, 0.005)
    ]
    assert errors[0] < 0.02 and errors[1] / errors[0] == pytest.approx(0.5, abs=0.02)


def test_a_flow_that_runs_away_is_an_error():
    with pytest.raises(InputError, match="cannot be integrated"):
        flow(lambda x: (x**2,), (np.ones(1),), np.array([0.0, 2.0]))


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(1).standard_normal((6, 4000))
    mean, half = interval(draws)
    assert np.mean(np.abs(mean) < half) == pytest.approx(0.95, abs=0.012)
    assert np.isnan(interval(draws[:1])[1]).all()
