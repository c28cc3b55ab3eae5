"""The parts of the experiment against independent computations."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.papers import Run
from regard.papers import _sinklora_characters as characters
from regard.papers import _sinklora_smollm2 as smollm2
from regard.papers import sinklora as paper
from regard.sparse.shifted import S2Attention, SFAttention


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def test_no_paragraph_is_both_trained_on_and_held_out():
    data = characters.corpus()
    lines = {name: set() for name in ("train", "held")}
    for name, found in lines.items():
        text, start = getattr(data, name).tolist(), 0
        pairs = [a for a, b in pairwise(text) if a == b]
        newline = next(i for i in sorted(set(pairs)) if pairs.count(i) > 50)  # sorts before letters
        for at, (a, b) in enumerate(pairwise(text)):
            if a == b == newline:
                found.add(tuple(text[start:at]))
                start = at + 2
    shared = {line for line in lines["train"] & lines["held"] if len(line) > 20}
    assert len(lines["held"]) > 50 and not shared
    assert len(data.train) > 10 * len(data.held) > 100_000
    assert int(data.train.min()) >= 1 and int(data.train.max()) < data.vocabulary


def test_rows_open_with_zero_and_continue_the_text():
    text = torch.arange(1, 100)
    rows = characters.consecutive(text, 10)
    assert rows.shape == (11, 10) and not rows[:, 0].any()
    assert torch.equal(rows[:, 1:].flatten(), text)
    rows = characters.drawn(text, 10, 200, torch.Generator().manual_seed(0))
    assert torch.equal(rows[:, 2:], rows[:, 1:-1] + 1)
    assert int(rows[:, 1].min()) == 1 and int(rows[:, -1].max()) == 99


def test_attention_on_the_first_token_is_that_of_eager_maps():
    model, rows = tiny(), torch.randint(64, (3, 64))
    with torch.no_grad():
        maps = torch.stack(model(input_ids=rows, output_attentions=True).attentions)
    expected = maps[..., 0].mean((0, 1, 2)).view(16, 4).mean(1)
    torch.testing.assert_close(torch.tensor(characters.first_token(model, rows)), expected)


def test_groups_without_sinks_never_see_the_first_token():
    model, rows = tiny(), torch.randint(64, (1, 64))
    block_local = SFAttention(restore=1, sinks=0)
    seen = characters.first_token(model, rows, block_local)
    assert min(seen[:4]) > 0 and max(seen[4:]) == 0
    assert min(characters.first_token(model, rows, SFAttention())) > 0


def test_the_leak_is_measured_only_where_there_is_one():
    model, rows = tiny(), torch.randint(64, (2, 64))
    assert characters.leaked(model, rows, S2Attention()) > 1e-3
    assert characters.leaked(model, rows, S2Attention(leak=False)) == 0


@pytest.mark.parametrize("pattern", [S2Attention(), SFAttention(), SFAttention(leak=False)])
def test_operations_count_the_visible_pairs_of_all_heads(pattern):
    from regard.ops.grouped_attention import group_visible

    positions, pairs = torch.arange(64), 0
    for head in range(9):
        pairs += int(
            group_visible(
                positions[:, None],
                positions,
                64,
                16,
                shifted=head >= 9 - pattern.shifted(9),
                sinks=pattern.sinks,
                leak=pattern.leak,
            ).sum()
        )
    assert smollm2.operations(pattern, 64, 9) == pytest.approx(pairs / (9 * 64 * 65 / 2))


def test_an_arm_trains_under_its_pattern_and_runs_with_full_attention():
    data = characters.corpus()
    scale = characters.Scale(base=2, extend=2, rows=1, batch=4)
    base = characters.base_model(data, scale, 0)
    kept = {name: value.clone() for name, value in base.state_dict().items()}
    full, grouped = (
        characters.extended(base, data, scale, name, 0, 1e-3) for name in ("full", "block-local")
    )
    rows = characters.consecutive(data.held, characters.LONG)[:1]
    assert characters.losses(full, rows)["loss"] != characters.losses(grouped, rows)["loss"]
    assert all(torch.equal(value, kept[name]) for name, value in base.state_dict().items())
    assert base.config.max_position_embeddings == characters.KNOWN
    assert full.config.max_position_embeddings == characters.LONG
    alone = characters.extended(base, data, scale, "full, adapters alone", 0, 1e-3)
    names = [name for name, value in alone.named_parameters() if value.requires_grad]
    assert names and all("lora_" in name for name in names)


def test_the_implementation_check_is_exact(tmp_path):
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    assert paper.largest_difference(run) < 1e-12
