"""Inputs of the unified model, its loss and where gradients go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from smalti.errors import VocabularyError
from smalti.mllm.adapters import SingleAdapter
from smalti.mllm.bpe import train_bpe
from smalti.mllm.losses import IGNORE
from smalti.mllm.model import UnifiedModel
from smalti.mllm.vocabulary import VisualVocabulary


def make_batch(tiny, *, batch: int = 3, length: int = 20, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random text and visual ids, right-padded, the first half of each row not predicted in row 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.vocabulary.size, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 6 :] = 0
    labels = ids.masked_fill(mask == 0, IGNORE)
    labels[0, : length // 2] = IGNORE
    answers = torch.zeros_like(mask, dtype=torch.bool)
    answers[:, -3:] = True
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "answer_mask": answers}


def full_logits(model: UnifiedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.lm(
        inputs_embeds=model.inputs_embeds(batch["input_ids"]),
        attention_mask=batch["attention_mask"],
    ).logits


def test_inputs_are_embedding_rows_for_text_and_adapter_outputs_for_codes(tiny) -> None:
    v, model = tiny.vocabulary, tiny.model
    ids = torch.tensor(
        [[v.bos, v.boi, v.first_visual + 5, v.eoi], [v.first_visual, 7, v.first_visual + 23, v.eos]]
    )
    found = model.inputs_embeds(ids)
    for row, column in ((0, 0), (0, 1), (0, 3), (1, 1), (1, 3)):
        assert torch.equal(
            found[row, column], model.lm.get_input_embeddings().weight[ids[row, column]]
        )
    for row, column, code in ((0, 2, 5), (1, 0, 0), (1, 2, 23)):
        torch.testing.assert_close(found[row, column], model.adapter(model.code_vectors_VC[code]))


def test_scales_of_text_and_visual_inputs_match(tiny) -> None:
    visual = tiny.model.adapter(tiny.model.code_vectors_VC).pow(2).mean().sqrt()
    text = (
        tiny.model.lm.get_input_embeddings().weight[: tiny.vocabulary.num_text].pow(2).mean().sqrt()
    )
    torch.testing.assert_close(visual, text, rtol=0.05, atol=0)


@pytest.mark.parametrize(("image_weight", "answer_weight"), [(1.0, 1.0), (0.25, 1.0), (0.0, 10.0)])
def test_loss_is_the_weighted_mean_over_full_logits(
    tiny, image_weight: float, answer_weight: float
) -> None:
    model, batch = tiny.model, make_batch(tiny)
    model.image_loss_weight, model.answer_loss_weight, model.loss_chunk = (
        image_weight,
        answer_weight,
        7,
    )
    loss, metrics = model(batch)
    logits, labels = (
        full_logits(model, batch)[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
    )
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    image, text = (
        tiny.vocabulary.is_visual(labels),
        (labels != IGNORE) & ~tiny.vocabulary.is_visual(labels),
    )
    answers = batch["answer_mask"][:, 1:].flatten() & text
    weights = text.float() + image_weight * image.float() + (answer_weight - 1) * answers.float()
    torch.testing.assert_close(loss, (losses * weights).sum() / weights.sum())
    torch.testing.assert_close(metrics["loss_text"], losses[text].mean())
    torch.testing.assert_close(metrics["loss_image"], losses[image].mean())
    assert metrics["tokens_text"] == text.sum()
    assert metrics["tokens_image"] == image.sum()
    assert answers.any()
    right = (logits.argmax(-1) == labels)[answers].float().mean()
    torch.testing.assert_close(metrics["answer_accuracy"], right)


def test_two_micro_batches_with_a_shared_weight_equal_one_batch(tiny) -> None:
    """Rows of unequal label counts, summed as gradient accumulation and ranks do: mean of the
    parts' losses.
    """
    model, batch = tiny.model, make_batch(tiny, batch=4)
    model.image_loss_weight, model.answer_loss_weight = 0.5, 3.0
    model(batch)[0].backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    share = model.loss_weight(batch) / 2
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        (model({**part, "loss_weight": share})[0] / 2).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_gradients_reach_everything_and_padding_changes_nothing(tiny) -> None:
    model, batch = tiny.model, make_batch(tiny)
    loss, _ = model(batch)
    loss.backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)}
    torch.testing.assert_close(model(other)[0], loss)


def test_text_alone_still_runs_the_adapter_without_effect(tiny) -> None:
    model = tiny.model
    ids = torch.randint(3, tiny.vocabulary.num_text, (2, 8))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    loss, metrics = model(batch)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.adapter.parameters())
    torch.testing.assert_close(loss, model.lm(input_ids=ids, labels=ids).loss)
    assert metrics["tokens_image"] == 0
    assert metrics["loss_image"] == 0


def test_a_batch_without_labels_gives_zero(tiny) -> None:
    batch = make_batch(tiny)
    loss, _ = tiny.model({**batch, "labels": torch.full_like(batch["labels"], IGNORE)})
    loss.backward()
    assert loss.item() == 0


def test_wrong_number_of_code_vectors_is_refused(tiny) -> None:
    with pytest.raises(VocabularyError, match="25 code vectors"):
        UnifiedModel(tiny.model.lm, tiny.model.adapter, torch.randn(25, 9), tiny.vocabulary)


def test_another_architecture_with_learned_positions_works() -> None:
    hf_tokenizer = train_bpe(["a b"], 260)
    config = GPT2Config(
        vocab_size=len(hf_tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32
    )
    lm = GPT2LMHeadModel(config)
    vocabulary = VisualVocabulary.extend(hf_tokenizer, 6)
    model = UnifiedModel(lm, SingleAdapter((4,), 8, 16), torch.randn(6, 4), vocabulary).eval()
    ids = torch.tensor([[5, 6, vocabulary.first_visual + 2, 7]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    logits = full_logits(model, batch)
    assert logits.shape[-1] == vocabulary.size
    torch.testing.assert_close(model(batch)[0], F.cross_entropy(logits[0, :-1], ids[0, 1:]))


def test_every_parameter_is_of_one_part_and_parts_freeze_for_good_or_for_a_time(tiny) -> None:
    model, v = tiny.model, tiny.vocabulary
    part_of = model.parts()
    names = {name: part_of[id(parameter)] for name, parameter in model.named_parameters()}
    assert {name for name, part in names.items() if part == "new_rows"} == {
        "lm.model.embed_tokens.weight",
        "lm.lm_head.weight",
    }
    assert all((part == "adapter") == name.startswith("adapter.") for name, part in names.items())
    assert model.rate_parts() == {}
    model.freeze(["new_rows"])
    model.split_rates()
    ids = torch.tensor([[v.boi, v.first_visual, v.first_visual + 3, v.eoi]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    for frozen in (["backbone"], []):
        model.set_frozen(frozen)
        model.zero_grad()
        model(batch)[0].backward()
        for name, parameter in model.named_parameters():
            if names[name] == "new_rows":
                assert parameter.grad is None
            else:
                assert bool(parameter.grad.any()) == (names[name] not in frozen), name
