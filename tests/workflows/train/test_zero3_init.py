"""A language model partitioned from the start under ZeRO-3 on two workers.

Its rows are those of a model that is built whole, and no worker allocates the whole head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CODES, WIDTH, TEXT = 60_000, 64, 290


@dataclass(frozen=True)
class Codes:
    """The language model's view of a visual tokenizer: random vectors of one part."""

    num_codes: int = CODES
    code_shape: tuple[int, ...] = ()
    embed_splits: tuple[int, ...] = (6,)

    def code_vectors(self) -> torch.Tensor:
        return torch.randn(self.num_codes, 6, generator=torch.Generator().manual_seed(0))


def section(folder: Path):
    from smalti.schema import MllmSection, Train

    return MllmSection(
        pretrained=str(folder / "lm"),
        adapter="cascade",
        train=Train(batch_size=2, zero_stage=3, lr=0.01),
    )


def text_tokenizer():
    from smalti.mllm.bpe import train_bpe

    return train_bpe(["a b"] * 3, TEXT)


def batch(model, rows: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[model.vocabulary.boi, model.vocabulary.first_visual + 7, 40, 41]] * rows)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


class Largest(TorchDispatchMode):
    """Bytes of the largest storage of a tensor that was made.

    Resident memory would count the tokenizer's new tokens too.
    """

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(made) if isinstance(t, torch.Tensor) and not t.is_meta]
        self.size = max([self.size, *(t.untyped_storage().nbytes() for t in tensors)])
        return made


def build(folder: Path) -> None:
    """One worker: the partitioned model, what it has, the largest tensor created for it, and its
    whole weights after a step.
    """
    import torch.distributed as dist

    from smalti.mllm.build import build_unified
    from smalti.workflows.train import engines
    from smalti.workflows.train.collectives import Collectives
    from smalti.workflows.train.zero3_init import partitioned_loading

    rank = dist.get_rank()
    made, tokenizer = section(folder), text_tokenizer()
    config = engines.deepspeed_config(made.train, 2)
    with partitioned_loading(config, Collectives()) as matrices, Largest() as largest:
        model = build_unified(made, tokenizer, Codes(), seed=3, matrices=matrices)
    head = model.lm.get_output_embeddings().weight
    held = {
        name: p.ds_tensor.numel() for name, p in model.named_parameters() if hasattr(p, "ds_tensor")
    }
    engine = engines.build_engine(
        model, made.train, lr=0.01, zero_stage=3, world_size=2, device=torch.device("cpu")
    )
    start = engines.full_weights(engine, on_this_rank=rank == 0)
    engine.backward(engine(batch(model, 1))[0])
    engine.step()
    after = engines.full_weights(engine, on_this_rank=rank == 0)
    found = {"held": held, "head": list(head.ds_shape), "largest": largest.size}
    (folder / f"found{rank}.json").write_text(json.dumps(found))
    if start is not None and after is not None:
        save_file({name: t.contiguous() for name, t in start.items()}, folder / "start.safetensors")
        save_file({name: t.contiguous() for name, t in after.items()}, folder / "after.safetensors")
    dist.barrier()


@pytest.fixture(scope="module")
def folder(ranks, tmp_path_factory) -> Path:
    """A tiny published model, and what one worker and two made of it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    root = tmp_path_factory.mktemp("partitioned")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(text_tokenizer()) + 5, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(root / "lm")
    ranks(build, 2, root)
    return root


def test_partitioned_rows_and_their_first_step_are_those_of_a_whole_model(folder: Path) -> None:
    from smalti.mllm.build import build_unified
    from smalti.workflows.train.optimizers import build_optimizer

    made = section(folder)
    model = build_unified(made, text_tokenizer(), Codes(), seed=3)
    found = load_file(folder / "start.safetensors")
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    optimizer = build_optimizer(model, made.train, 0.01, torch.device("cpu"))
    model(batch(model, 2))[0].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), made.train.clip)
    optimizer.step()
    after = load_file(folder / "after.safetensors")
    for name, parameter in model.named_parameters():
        # Adam's first step is of full size even where the gradient is rounding noise: those places
        # are left out
        clear = parameter.grad.abs() > 1e-3 * parameter.grad.abs().max()
        if not name.endswith("k_proj.bias"):  # all noise: softmax cancels it
            torch.testing.assert_close(
                after[name][clear], parameter[clear], rtol=1e-5, atol=2e-5, msg=name
            )
    for name in ("lm.lm_head.weight", "adapter.codes.weight"):
        assert not torch.equal(after[name], found[name])


def test_a_worker_has_its_part_and_never_the_whole_head(folder: Path) -> None:
    found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]
    rows, width = found[0]["head"]
    assert rows > CODES and width == WIDTH
    for worker in found:
        assert worker["held"]["lm.lm_head.weight"] == -(-rows * width // 2)
        assert worker["held"]["adapter.codes.weight"] == CODES * 6 // 2, "the second codebook too"
        assert worker["largest"] == 4 * worker["held"]["lm.lm_head.weight"]
