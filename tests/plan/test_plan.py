from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import regard
from fixtures_models import tiny_llama
from regard._errors import InputError, OutputError
from regard.cache.calibration import FRACTIONS, Calibration
from regard.plan import RULES, SCORERS, Named, Plan, apply, fingerprint

PROMPT = torch.randint(3, 320, (1, 60), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tiny_tokenizer: Any) -> Any:
    found = tiny_llama()
    found.tokenizer = tiny_tokenizer
    return found


def calibration(layers: int = 2, heads: int = 2) -> Calibration:
    shares = [
        [
            [min(1, f * (0.5 + (layer + head) / 2)) for head in range(heads)]
            for layer in range(layers)
        ]
        for f in FRACTIONS[:9]
    ]
    means = [sum(map(sum, table)) / (layers * heads) for table in shares]
    return Calibration(
        "tiny", "made up", 1, 100, tuple(means), tuple(tuple(map(tuple, t)) for t in shares)
    )


def generate(model: Any, **options: Any) -> Any:
    return model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=12, do_sample=False,
        pad_token_id=0, eos_token_id=None, return_dict_in_generate=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("rule", RULES)
def test_every_scorer_and_rule_makes_a_cache(model: Any, scorer: str, rule: str):
    if rule == "cake" and scorer != "cake":
        return  # needs what CAKE's scorer measures; its own error says so
    held = calibration() if rule == "calibrated" else None
    plan = Plan.make(model, f"{scorer}+{rule}", 0.5, held)
    cache = plan.cache(model)
    cache.prefill(PROMPT)
    assert 0 < sum(len(cache.kept(0, h)) + len(cache.kept(1, h)) for h in range(2)) <= 130
    cache.close()


def test_names_are_parsed_and_said_back():
    assert str(Named.parse("SnapKV+uniform")) == "snapkv"
    assert str(Named.parse("cake")) == "cake"
    assert Named.parse("cake").rule == "cake"
    assert str(Named.parse("cake+uniform")) == "cake+uniform"
    assert Named.parse("h2o+calibrated").title == "H2O, calibrated"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("snapkw", "did you mean snapkv"),
        ("h2o+globl", "did you mean global"),
        ("", "one of streaming"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str):
    with pytest.raises(InputError, match=message):
        Named.parse(name)


def test_a_plan_is_saved_and_read_back(model: Any, tmp_path: Any):
    plan = Plan.make(model, "h2o+calibrated", 0.25, calibration(), expected={"kl": 0.01}, every=4)
    path = plan.save(tmp_path / "plan.json")
    assert Plan.load(path) == plan
    assert json.loads(path.read_text())["method"] == "h2o+calibrated"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_saved_plan_keeps_the_same_keys(model: Any, tmp_path: Any):
    plan = Plan.make(model, "expected+calibrated", 0.3, calibration())
    kept = []
    for one in (plan, Plan.load(plan.save(tmp_path / "p.json"))):
        cache = one.cache(model)
        cache.prefill(PROMPT)
        kept.append([cache.kept(layer, head).tolist() for layer in range(2) for head in range(2)])
        cache.close()
    assert kept[0] == kept[1]


def test_a_plan_for_another_model_is_refused(model: Any):
    plan = Plan.make(model, "h2o", 0.2)
    with pytest.raises(InputError, match=r"another model .*other weights"):
        plan.cache(tiny_llama(seed=1))
    with pytest.raises(InputError, match=r"another model .*other weights"):
        apply(tiny_llama(seed=1), plan)
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    with pytest.raises(InputError, match="layers 2, not 3"):
        apply(other, plan)


def test_the_fingerprint_notices_one_changed_weight(model: Any):
    import copy

    twin = copy.deepcopy(model)
    assert fingerprint(twin) == fingerprint(model)
    with torch.no_grad():
        twin.model.layers[1].self_attn.k_proj.weight.add_(1e-3)
    assert fingerprint(twin) != fingerprint(model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a plan of the format"),
        ('{"format": "regard.plan/1", "method": "h2o", "budget": 0.2}', "lacks model"),
        ('{"format": "regard.plan/1", "model": {}, "method": "h2o", "budget": 7.5}', "budget must be"),
        ('{"format": "regard.plan/1", "model": {}, "method": "h3o", "budget": 0.5}', "did you mean h2o"),
        ('{"format": "regard.plan/1", "model": {}, "method": "h2o", "budget": 0.5, "x": 1}', "unknown x"),
        ('{"format": "regard.plan/1", "model": {}, "method": "h2o+calibrated", "budget": 0.5}', "calibration"),
    ],
)  # fmt: skip
def test_damaged_plans_are_refused(tmp_path: Any, text: str, message: str):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Plan.load(path)


def test_files_that_cannot_be_used(model: Any, tmp_path: Any):
    with pytest.raises(InputError, match="cannot read the plan"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(OutputError, match="no directory"):
        Plan.make(model, "h2o", 0.2).save(tmp_path / "no" / "plan.json")


def test_generation_under_a_plan_is_generation_with_its_cache(model: Any):
    plan = Plan.make(model, "h2o", 0.3)
    by_hand = generate(model, past_key_values=plan.cache(model))
    with regard.apply(model, plan):
        planned = generate(model)
    assert planned.sequences.tolist() == by_hand.sequences.tolist()
    cache = planned.past_key_values
    assert type(cache).__module__.startswith("regard.cache")
    assert cache.memory() == by_hand.past_key_values.memory()
    assert cache.kept(0, 0).tolist() == by_hand.past_key_values.kept(0, 0).tolist()
    assert len(cache.kept(0, 0)) == 18 + 11  # 30 % of the prompt, and what was generated


def test_a_plain_call_under_a_plan_is_planned_too(model: Any):
    with torch.no_grad(), apply(model, Plan.make(model, "streaming", 10)):
        first = model(PROMPT)
        assert len(first.past_key_values.kept(1, 1)) == 10
        assert model(PROMPT, use_cache=False).past_key_values is None


def test_caches_that_hold_something_are_left_alone(model: Any):
    from transformers import DynamicCache

    own = DynamicCache()
    with torch.no_grad():
        model(PROMPT, past_key_values=own)
        with apply(model, Plan.make(model, "streaming", 10)):
            output = model(PROMPT[:, :3], past_key_values=own)
    assert output.past_key_values is own
    assert own.get_seq_length() == 63


def test_the_model_is_as_before(model: Any):
    before = generate(model)
    implementation = model.config._attn_implementation
    hooks = len(model._forward_pre_hooks)
    with pytest.raises(ZeroDivisionError), regard.apply(model, Plan.make(model, "h2o", 0.2)):
        generate(model)
        raise ZeroDivisionError
    after = generate(model)
    assert after.sequences.tolist() == before.sequences.tolist()
    assert not type(after.past_key_values).__module__.startswith("regard")
    assert model.config._attn_implementation == implementation
    assert len(model._forward_pre_hooks) == hooks


def test_beams_and_padding_under_a_plan(model: Any):
    batch = PROMPT.repeat(2, 1)
    mask = torch.ones_like(batch)
    mask[0, :20] = 0
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": 2,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    with regard.apply(model, Plan.make(model, "h2o", 1.0)):
        planned = model.generate(batch, attention_mask=mask, **options)
    assert planned.tolist() == model.generate(batch, attention_mask=mask, **options).tolist()


def test_apply_takes_a_path_and_refuses_other_things(model: Any, tmp_path: Any):
    path = Plan.make(model, "h2o", 0.2).save(tmp_path / "plan.json")
    apply(model, path).close()
    with pytest.raises(InputError, match="plan must be"):
        apply(model, 0.2)
