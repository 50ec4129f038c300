"""Low-rank updates: nothing changes at first, what they learn is merged into plain weights."""

from __future__ import annotations

import pytest
import torch

from smalti.errors import ConfigError
from smalti.mllm.lora import add_lora, merge_lora, without_lora
from smalti.schema import Lora

LORA = Lora(rank=3, alpha=12, targets=["q_proj", "v_proj", "down_proj"])


def logits(tiny) -> torch.Tensor:
    ids = torch.tensor(
        [[*tiny.text.caption_prompt("a blue circle"), tiny.vocabulary.first_visual + 5]]
    )
    with torch.no_grad():
        return tiny.model.lm(inputs_embeds=tiny.model.inputs_embeds(ids)).logits


def test_updates_start_at_nothing_and_merge_into_plain_weights(tiny) -> None:
    plain = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    before = logits(tiny)
    add_lora(tiny.model, LORA)
    torch.testing.assert_close(logits(tiny), before)
    with torch.no_grad():
        for name, parameter in tiny.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    learned = logits(tiny)
    assert not torch.allclose(learned, before, atol=0.01)
    names = tiny.model.state_dict().keys()
    merged = merge_lora(tiny.model, dict(tiny.model.state_dict()))
    changed = {name for name in plain if not torch.equal(merged[name], plain[name])}
    assert changed == {
        name for name in plain if any(f"{target}.weight" in name for target in LORA.targets)
    }
    with without_lora(tiny.model):
        assert merged.keys() == plain.keys() == tiny.model.state_dict().keys()
        tiny.model.load_state_dict(merged)
        torch.testing.assert_close(logits(tiny), learned, rtol=1e-5, atol=1e-5)
    assert tiny.model.state_dict().keys() == names


def test_new_rows_and_adapter_train_beside_the_updates_and_nothing_else(tiny) -> None:
    add_lora(tiny.model, LORA)
    part_of = tiny.model.parts()
    for name, parameter in tiny.model.named_parameters():
        assert parameter.requires_grad == (
            "lora_" in name or part_of[id(parameter)] != "backbone"
        ), name


def test_a_target_that_no_layer_has_names_the_setting(tiny) -> None:
    with pytest.raises(ConfigError, match=r"mllm\.lora\.targets=\['c_attn'\]"):
        add_lora(tiny.model, Lora(targets=["c_attn"]))
