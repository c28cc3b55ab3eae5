"""Saved caches go on exactly where they were; what does not belong is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache.held import Received, Slanted, padded, positions_of, small_llama
from regard._errors import InputError, OutputError
from regard.cache import Cache, Full, Ragged, load
from regard.cache.budgets import Ada, Global
from regard.cache.quantised import Quantised
from regard.cache.scorers import H2O, SnapKV


def again(model: Any, cache: Cache) -> torch.Tensor:
    new = torch.tensor([[5, 6, 7]] * cache.held[0].rows.batch)
    return model(new, past_key_values=cache).logits


@pytest.mark.parametrize("store", [Ragged(growth=0.5), Quantised("fp8", residual=4)], ids=repr)
def test_goes_on_where_it_was(tmp_path: Path, store: Any) -> None:
    model = small_llama()
    text, mask = padded([40, 25], "left")
    with Cache(model, H2O(window=3), Ada(0.3), store, every=2, sinks=2) as cache:
        cache.prefill(text, mask)
        cache.tokens = text
        path = cache.save(tmp_path / "deep" / "talk.safetensors")
        found = load(path, model)
        assert (found.scorer, found.budget, found.store) == (
            cache.scorer,
            cache.budget,
            cache.store,
        )
        assert (found.every, found.sinks) == (2, 2)
        assert found.tokens is not None and torch.equal(found.tokens, text)
        assert found.get_seq_length() == 40
        for layer in range(3):
            assert positions_of(found, layer) == positions_of(cache, layer)
        if isinstance(store, Ragged):
            assert torch.equal(again(model, found), again(model, cache))
        else:  # quantised once more
            torch.testing.assert_close(again(model, found), again(model, cache), atol=0.3, rtol=0.1)
        found.close()
    assert [file.name for file in path.parent.iterdir()] == ["talk.safetensors"]


def test_full_caches_and_queries(tmp_path: Path) -> None:
    model, text = small_llama(), torch.randint(3, 64, (1, 30))
    with Full(model) as full, Cache(model, SnapKV(window=4), Global(0.4), every=1) as cache:
        for one in (full, cache):
            one.prefill(text)
            found = load(one.save(tmp_path / "cache.safetensors"), model)
            for _ in range(3):
                assert torch.equal(again(model, found), again(model, one))
            found.close()


def test_own_scorers_must_be_given(tmp_path: Path) -> None:
    model = small_llama()
    with Cache(model, Received(), Slanted(9)) as cache:
        cache.prefill(torch.randint(3, 64, (1, 30)))
        path = cache.save(tmp_path / "cache.safetensors")
        with pytest.raises(InputError, match="none of regard's"):
            load(path, model)
        found = load(path, model, scorer=Received(), budget=Slanted(9))
        assert torch.equal(again(model, found), again(model, cache))
        found.close()
    assert model.config._attn_implementation == "sdpa"


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = small_llama()
    with Full(model) as cache:
        cache.prefill(torch.randint(3, 64, (1, 9)))
        path = cache.save(tmp_path / "cache.safetensors")
    for other, what in (
        (small_llama(1), "weights"),
        (small_llama(num_hidden_layers=2), "num_hidden_layers"),
        (small_llama().double(), "dtype"),
    ):
        with pytest.raises(InputError, match=f"another model: {what}"):
            load(path, other)
        assert other.config._attn_implementation == "sdpa"


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model = small_llama()
    with Cache(model, H2O(), Ada(0.3)) as cache:
        cache.prefill(torch.randint(3, 64, (1, 60)))
        good = cache.save(tmp_path / "good.safetensors").read_bytes()
        head = json.loads(good[8 : 8 + int.from_bytes(good[:8], "little")])["__metadata__"]
    bad = tmp_path / "bad.safetensors"
    for content in (b"", b"nothing of the kind", good[:40], good[: len(good) // 2]):
        bad.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            load(bad, model)
    tensors = load_file(tmp_path / "good.safetensors")
    save_file({**tensors, "1.value": tensors["1.value"][:-1].clone()}, bad, metadata=head)
    with pytest.raises(InputError, match="layer 1 has"):
        load(bad, model)
    save_file({k: v for k, v in tensors.items() if k != "2.key"}, bad, metadata=head)
    with pytest.raises(InputError, match=r"damaged.*2\.key"):
        load(bad, model)
    save_file(tensors, bad, metadata={**head, "format": "other/1"})
    with pytest.raises(InputError, match="no saved cache"):
        load(bad, model)
    with pytest.raises(InputError, match="a file that"):
        load(tmp_path / "none", model)
    assert model.config._attn_implementation == "sdpa"


def test_a_crash_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_llama()
    with Full(model) as cache:
        cache.prefill(torch.randint(3, 64, (1, 9)))
        path = cache.save(tmp_path / "cache.safetensors")
        before = path.read_bytes()

        def fail(tensors: Any, name: str, metadata: Any) -> None:
            Path(name).write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr("regard.cache.files.save_file", fail)
        with pytest.raises(OutputError, match="disk full"):
            cache.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
