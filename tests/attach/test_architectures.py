"""Every architecture that can be built small: attached equals untouched, and methods see what the model computes.

The families come from the installed transformers, so a new one is proven, or named here with the reason, before it lands.
"""

from __future__ import annotations

import re

import architectures
import pytest
import tiny_models
import torch

from regard._errors import InputError
from regard.attach import attach
from regard.attach.verification import verify
from regard.engine import Block, Method

# In the oldest transformers that is tested; newer ones may have moved to the interface (GPT-J did in 5.24), and are proven then.
NO_INTERFACE = {
    *(
        "big_bird",
        "bloom",
        "codegen",
        "cpmant",
        "falcon",
        "git",
        "gpt_neo",
        "gpt_neox_japanese",
        "gptj",
    ),
    *("megatron-bert", "mpt", "mvp", "openai-gpt", "prophetnet", "reformer", "rembert", "roformer"),
    *("trocr", "xglm", "xlm", "xlnet"),
}
NO_SOFTMAX = {"falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"}
LISTED = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "gemma3",
        "phi3",
        "olmo2",
        "gpt2",
        "gpt_neox",
    ),
    *("gpt_oss", "bert", "modernbert", "vit", "clip", "whisper", "t5", "llava", "doge"),
)
TRAITS = {
    "gemma2": {"windowed", "softcap", "grouped"},
    "gemma3_text": {"windowed", "grouped"},
    "gpt_oss": {"windowed", "sinks", "grouped"},
    "inkling2_text": {"windowed", "sinks", "grouped"},
    "llama": {"grouped"},
    "mistral": {"windowed", "grouped"},
    "modernbert": {"windowed"},
    "deepseek_v32": {"windowed"},
    "minimax_m3_vl_text": {"windowed", "grouped"},
    "t5": set(),
}
"""What a tiny model must exercise for its row to mean something."""

FAMILIES = architectures.families()


def test_every_family_asked_for_is_among_them() -> None:
    assert set(LISTED) <= {family.name for family in FAMILIES}
    assert len(FAMILIES) > 150


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_family(family: architectures.Family) -> None:
    outcome = architectures.prove(family)
    if outcome.status == "out of reach":
        assert family.name in NO_INTERFACE | NO_SOFTMAX, outcome.reason
        expected = (
            "has no attention layers"
            if family.name in NO_SOFTMAX
            else "attention inside|its attention is in"
        )
        assert re.search(expected, outcome.reason), outcome
        return
    assert family.name not in NO_SOFTMAX or outcome.status == "not built"
    if outcome.status == "not built" and family.name not in LISTED:
        pytest.skip(outcome.reason)
    assert outcome.status == "equal", outcome.reason
    proof = outcome.proof
    assert proof is not None and proof.restored and proof.sites
    assert proof.mapped > 0 and proof.maps is not None, "no eager map to compare with"
    if family.name in TRAITS:
        found = {
            name for name in ("windowed", "softcap", "sinks", "grouped") if getattr(proof, name)
        }
        assert found == TRAITS[family.name]


def test_verify_finds_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof must be able to fail: a softmax with another scale is noticed everywhere."""
    from regard.engine import blockwise

    attend = blockwise.attend

    def wrong(call, *args, **rest):  # type: ignore[no-untyped-def]
        call.scaling *= 1.01
        return attend(call, *args, **rest)

    monkeypatch.setattr(blockwise, "attend", wrong)
    outcome = architectures.prove(architectures.Family("llama", "LlamaForCausalLM"))
    assert outcome.status == "differs" and outcome.proof is not None
    for what in ("outputs (unpadded)", "maps (left padding)", "logits of generate()"):
        assert what in outcome.reason
    assert "NOT equal" in str(outcome.proof)


def test_verify_refuses_what_would_prove_nothing() -> None:
    model = tiny_models.build("llama")
    with pytest.raises(InputError, match="at least one input"):
        verify(model, {})
    with pytest.raises(InputError, match="dropout must be off"):
        verify(model.train(), {"a": {"input_ids": torch.ones(1, 3, dtype=torch.long)}})


def test_several_seeds_and_lengths() -> None:
    family = architectures.Family("gemma2", "Gemma2ForCausalLM")
    for seed in range(3):
        model = architectures.make(family, seed)
        for tokens in (5, 9, 40):
            assert verify(model, architectures.inputs(family, model, tokens)).holds


class _Reads(Method):
    reads_only = True

    def weights(self, block: Block) -> None:
        assert block.weights.isfinite().all()


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2"])
def test_nan_weights_are_seen(name: str) -> None:
    """Methods see the NaN; the fused kernel makes zeros of it, so that Llama's logits alone would not show it."""
    model = tiny_models.randomise(tiny_models.build(name), 0)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "q_proj.weight" in n).fill_(float("nan"))
        ids = torch.ones(1, 4, dtype=torch.long)
        with pytest.raises(AssertionError), attach(model, _Reads()):
            model(input_ids=ids)
        assert model(input_ids=ids).logits.isnan().any() == (name != "llama")
