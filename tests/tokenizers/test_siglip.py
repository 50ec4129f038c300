"""SigLIP: the loss against a direct loop, over ranks, and whether it learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smalti.errors import ConfigError
from smalti.schema import EncoderTrain
from smalti.tokenizers.siglip import ContrastiveModel, build_siglip, same_rows, siglip_loss

SMALL = EncoderTrain(patch_size=8, hidden_size=24, layers=1, heads=2, text_layers=1, text_length=4)


def test_loss_equals_a_direct_loop_with_a_repeated_caption() -> None:
    image, text = torch.randn(5, 3), torch.randn(5, 3)
    text[4] = text[1]
    ids = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8], [3, 4]])
    image, text = (torch.nn.functional.normalize(x, dim=-1) for x in (image, text))
    scale, bias = torch.tensor([math.log(7.0)]), torch.tensor([-3.0])
    total = 0.0
    for a in range(5):
        for b in range(5):
            z = 1 if ids[a].tolist() == ids[b].tolist() else -1
            total += math.log(1 + math.exp(-z * (7.0 * float(image[a] @ text[b]) - 3.0)))
    loss = siglip_loss(image, text, scale, bias, same_rows(ids, ids))
    assert float(loss) == pytest.approx(total / 5, rel=1e-5)


def test_starts_with_the_papers_scale_and_bias_and_the_sizes_asked_for() -> None:
    model = build_siglip(SMALL, 32, vocab_size=11, pad_token_id=0, eos_token_id=1)
    assert float(model.logit_scale.detach()) == pytest.approx(math.log(10))
    assert float(model.logit_bias.detach()) == -10
    positions = model.vision_model.embeddings.position_embedding.weight.detach().view(4, 4, 24)
    assert torch.equal(positions[:, 0, :12], positions[:, 3, :12]), "the first half codes the row"
    assert torch.equal(positions[1, :, 12:], positions[2, :, 12:]), (
        "the second half codes the column"
    )
    assert len(positions.view(16, 24).unique(dim=0)) == 16
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (
        32,
        8,
        24,
        1,
    )
    assert (text.vocab_size, text.max_position_embeddings, text.pad_token_id) == (11, 4, 0)


def test_sizes_that_do_not_fit_are_told() -> None:
    with pytest.raises(ConfigError, match="patch_size=8"):
        build_siglip(SMALL, 30, 11, 0, 1)
    with pytest.raises(ConfigError, match="heads=2"):
        build_siglip(SMALL.model_copy(update={"hidden_size": 25}), 32, 11, 0, 1)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(6, 3, 32, 32, generator=generator) * 2 - 1
    ids = torch.randint(2, 11, (6, 4), generator=generator)
    ids[5] = ids[2]
    return pixels, ids


def test_gradients_averaged_over_two_ranks_equal_those_of_the_whole_batch() -> None:
    pixels, ids = batch()
    whole = ContrastiveModel(build_siglip(SMALL, 32, 11, 0, 1))
    loss, _ = whole(pixels, ids)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in whole.named_parameters()}
    image = torch.nn.functional.normalize(
        whole.model.vision_model(pixel_values=pixels).pooler_output, dim=-1
    ).detach()
    text = torch.nn.functional.normalize(
        whole.model.text_model(input_ids=ids).pooler_output, dim=-1
    ).detach()

    def gatherer() -> Callable[[Tensor], Tensor]:
        calls = iter([ids, text, image])
        return lambda own: next(calls)

    summed, losses = {name: torch.zeros_like(g) for name, g in expected.items()}, []
    for part in (slice(0, 3), slice(3, 6)):
        whole.zero_grad()
        part_loss, _ = whole(pixels[part], ids[part], gather=gatherer())
        part_loss.backward()
        losses.append(float(part_loss.detach()))
        for name, p in whole.named_parameters():
            summed[name] += p.grad / 2
    assert sum(losses) / 2 == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_it_learns_to_match() -> None:
    pixels, ids = batch()
    model = ContrastiveModel(build_siglip(SMALL, 32, 11, 0, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss, metrics = model(pixels, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(metrics["match"]) == 1.0
    assert float(metrics["loss"]) < 2
