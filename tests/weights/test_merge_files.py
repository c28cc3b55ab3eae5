"""Models and moments on disk: the same merge as in memory, a result that loads, and nothing written when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from regard._errors import InputError, OutputError
from regard.cli import app
from regard.labs.tasks import recall
from regard.labs.training import train
from regard.nn import LanguageModel, LanguageModelConfig
from regard.weights import (
    StoredWeights,
    capture_second_moments,
    compress_rank_one,
    graft_threshold_of,
    load_second_moments,
    merge_files,
    merge_linear,
    merge_ota,
    save_second_moments,
)


def model(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(LanguageModelConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, one/ and two/ as `save_pretrained` writes them, and their moments."""
    place = tmp_path_factory.mktemp("house")
    model().save_pretrained(place / "base")
    for seed, name in enumerate(("one", "two")):
        tuned = model()
        ids = torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(seed))
        optimiser = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
        for _ in range(3):
            optimiser.zero_grad()
            tuned(ids, labels=ids).loss.backward()
            optimiser.step()
        tuned.save_pretrained(place / name)
        save_second_moments(capture_second_moments(optimiser, tuned), place / f"{name}.safetensors")
    return place


def names(house: Path) -> tuple[Path, list[Path], list[Path]]:
    both = ("one", "two")
    return house / "base", [house / n for n in both], [house / f"{n}.safetensors" for n in both]


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")


def everything(place: Path) -> dict[str, bytes]:
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


def test_a_merge_of_files_is_the_merge_in_memory(house: Path, tmp_path: Path) -> None:
    base, experts, moments = names(house)
    out = merge_files(base, experts, tmp_path / "merged", moments=moments, densities=[0.4, 0.2])
    expected = merge_ota(
        weights(base),
        [weights(e) for e in experts],
        [load_second_moments(m) for m in moments],
        densities=[0.4, 0.2],
    )
    found = weights(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)
    assert not torch.equal(found["norm.weight"], weights(base)["norm.weight"])
    merged = LanguageModel.from_pretrained(out)
    torch.testing.assert_close(merged.state_dict()["norm.weight"], found["norm.weight"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]


def test_without_moments_the_plain_mean_and_from_file_to_file(house: Path, tmp_path: Path) -> None:
    base, experts, _ = names(house)
    files = [e / "model.safetensors" for e in (base, *experts)]
    out = merge_files(files[0], files[1:], tmp_path / "new" / "merged.safetensors")
    expected = merge_linear(weights(base), [weights(e) for e in experts])
    assert all(torch.equal(t, expected[n]) for n, t in load_file(out).items())


def test_thresholds_stand_for_densities(house: Path, tmp_path: Path) -> None:
    base, experts, moments = names(house)
    thresholds = [
        graft_threshold_of(weights(base), weights(e), load_second_moments(m), 0.3)
        for e, m in zip(experts, moments, strict=True)
    ]
    first = merge_files(base, experts, tmp_path / "a", moments=moments, densities=[0.3, 0.3])
    second = merge_files(base, experts, tmp_path / "b", moments=moments, thresholds=thresholds)
    assert everything(first) == everything(second)


def test_weights_in_parts_are_one_model(house: Path, tmp_path: Path) -> None:
    parts = list(weights(house / "base").items())
    where = {}
    for number, chunk in enumerate((parts[:3], parts[3:])):
        save_file(dict(chunk), tmp_path / f"part{number}.safetensors")
        where |= {name: f"part{number}.safetensors" for name, _ in chunk}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    stored = StoredWeights(tmp_path)
    assert len(stored) == len(parts)
    assert all(torch.equal(stored[name], tensor) for name, tensor in parts)


def test_compressed_moments_are_the_rank_one_form_and_smaller(house: Path, tmp_path: Path) -> None:
    moments = load_second_moments(house / "one.safetensors")
    small = save_second_moments(moments, tmp_path / "small.safetensors", compress=True)
    read, expected = load_second_moments(small), compress_rank_one(moments)
    assert read.keys() == moments.keys()
    for name, moment in expected.items():
        torch.testing.assert_close(read[name], moment)
    kept = sum(t.numel() for t in load_file(small).values())
    assert kept == sum(sum(t.shape) if t.ndim == 2 else t.numel() for t in moments.values())


def test_a_moment_of_zeros_is_compressed_to_zeros(tmp_path: Path) -> None:
    path = save_second_moments({"w": torch.zeros(2, 3)}, tmp_path / "v.safetensors", compress=True)
    assert torch.equal(load_second_moments(path)["w"], torch.zeros(2, 3))


def test_moments_of_a_training_checkpoint(tmp_path: Path) -> None:
    task = recall(vocabulary=20, length=12, pairs=2)
    train(model(), task, 2, batch=2, out=tmp_path)
    moments = load_second_moments(tmp_path / "training.safetensors")
    assert moments.keys() == dict(model().named_parameters()).keys()
    assert all((v >= 0).all() for v in moments.values())


def spoil(place: Path, name: str, tensor: torch.Tensor, to: Path) -> Path:
    save_file(load_file(place) | {name: tensor}, to)
    return to


def test_what_does_not_fit_is_named_and_nothing_is_written(house: Path, tmp_path: Path) -> None:
    base, experts, moments = names(house)
    base, experts = base / "model.safetensors", [e / "model.safetensors" for e in experts]
    bad = tmp_path / "bad"
    bad.mkdir()
    short = spoil(experts[0], "norm.weight", torch.ones(3), bad / "short.safetensors")
    holed = spoil(experts[0], "norm.weight", torch.full((16,), torch.nan), bad / "nan.safetensors")
    narrow = spoil(moments[0], "norm.weight", torch.ones(5), bad / "v.safetensors")
    save_second_moments(load_second_moments(moments[0]) | {"norm.weight": torch.ones(5)}, narrow)
    renamed = bad / "renamed.safetensors"
    held = load_second_moments(moments[0])
    save_second_moments({f"model.{n}": v for n, v in held.items()}, renamed)
    broken = bad / "broken.safetensors"
    broken.write_bytes(experts[0].read_bytes()[:50])
    pickled = bad / "optimizer.pt"
    pickled.write_bytes(b"")
    before = everything(tmp_path)
    out = tmp_path / "merged.safetensors"
    for given, said in (
        ({"experts": [short, experts[1]]}, r"\(16,\) in the base and \(3,\) in the expert"),
        ({"experts": [holed, experts[1]]}, r"norm\.weight must be finite.*16 of 16"),
        ({"moments": [narrow, moments[1]]}, r"must have shape \(16,\), got \(5,\)"),
        ({"moments": [renamed, moments[1]]}, r"named as the base's tensors.*model\."),
        ({"moments": moments[:1]}, "one for each of 2 experts"),
        ({"moments": [experts[0], moments[1]]}, "must hold second moments"),
        ({"moments": [pickled, moments[1]]}, "pickled"),
        ({"experts": [broken, experts[1]]}, "damaged"),
        ({"experts": [bad / "no.safetensors", experts[1]]}, "there is none"),
        ({"experts": [bad, experts[1]]}, r"must hold model\.safetensors"),
        ({"densities": [0.5, 1.5]}, "share in"),
        ({"densities": [0.5]}, "densities"),
        ({"densities": [0.5, 0.5], "thresholds": [0.0, 0.0]}, "got both"),
        ({"moments": None, "densities": [0.5, 0.5]}, "need moments"),
    ):
        with pytest.raises(InputError, match=said):
            merge_files(base, **{"experts": experts, "moments": moments, "out": out} | given)
    assert everything(tmp_path) == before


def test_a_place_that_cannot_be_is_refused(house: Path, tmp_path: Path) -> None:
    base, experts, _ = names(house)
    (tmp_path / "mine").write_text("mine")
    for given in (base, base / "model.safetensors"):
        with pytest.raises(OutputError, match="merged model must be"):
            merge_files(given, experts, tmp_path / "mine")
    with pytest.raises(OutputError, match="cannot write"):
        merge_files(base, experts, tmp_path / "mine" / "merged")
    assert everything(tmp_path) == {"mine": b"mine"}


def test_a_crash_while_writing_leaves_the_old_file(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts, _ = names(house)
    files = [e / "model.safetensors" for e in (base, *experts)]
    out = tmp_path / "merged.safetensors"
    out.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("regard.weights.moment_files.os.replace", fail)
    for source, target in ((files[0], out), (base, tmp_path / "merged")):
        with pytest.raises(OutputError, match="disk full"):
            merge_files(source, files[1:], target)
    assert everything(tmp_path) == {"merged.safetensors": b"old"}
    assert [p.name for p in tmp_path.iterdir()] == ["merged.safetensors"]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({}, "at least one tensor"),
        ({"w": torch.tensor([-1.0])}, "at least 0"),
        ({"w": torch.tensor([torch.inf])}, "finite"),
    ],
)
def test_what_is_no_moment_is_not_saved(second: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        save_second_moments(second, tmp_path / "v.safetensors")
    assert list(tmp_path.iterdir()) == []


def call(*args: object) -> Result:
    shell = {"COLUMNS": "200", "TERM": "dumb"}
    return CliRunner().invoke(app, ["merge", *map(str, args)], env=shell)


def test_the_command_merges(house: Path, tmp_path: Path) -> None:
    base, experts, moments = names(house)
    held = [part for path in moments for part in ("--moments", path)]
    result = call(base, *experts, *held, "--density", "0.4,0.2", "--out", tmp_path / "shell")
    assert result.exit_code == 0, result.output
    assert "2 experts merged" in result.stdout
    direct = merge_files(base, experts, tmp_path / "direct", moments=moments, densities=[0.4, 0.2])
    assert everything(tmp_path / "shell") == everything(direct)


@pytest.mark.parametrize("density", ["0.4,0.3,0.2", "much", "1.5", ""])
def test_the_command_refuses(density: str, house: Path, tmp_path: Path) -> None:
    base, experts, moments = names(house)
    held = [part for path in moments for part in ("--moments", path)]
    result = call(base, *experts, *held, "--density", density, "--out", tmp_path / "merged")
    assert result.exit_code == 2 and "--density must be one or 2 shares" in result.stderr
    assert result.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []
