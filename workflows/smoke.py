"""`--smoke`: any recipe shrunk to seconds, on the same code path.

Images are generated; a pretrained SigLIP or language model is replaced by a tiny random one of the
same classes, saved in the output folder and loaded from there like any other. Kinds, losses, phases
and switches stay as the recipe says.
"""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from smalti.config import with_overrides
from smalti.schema import EncoderTrain, Recipe
from smalti.storage import atomic_local_dir, exists, join, write_atomic, write_json
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.systems import smoke_sizes
from smalti.workflows.systems.base import System
from smalti.workflows.systems.registry import system_of

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

_NUM_PATCHES_A_SIDE = 4


def shrink(recipe: Recipe) -> Recipe:
    """The recipe at toy size, in `<out>-smoke`.

    Creates the tiny models that replace pretrained ones.
    """
    out = recipe.out.rstrip("/") + "-smoke"
    values: dict[str, object] = {"out": out, "name": f"{recipe.name}-smoke", "share": []}
    system = system_of(recipe)
    values |= (
        _data(recipe, system)
        | system.smoke(recipe)
        | _model(recipe, system, out)
        | _resources(recipe)
    )
    if recipe.bridge:
        values |= smoke_sizes.train("bridge.train", recipe.bridge.train) | {"bridge.steps": 2}
        values |= {"bridge.width": 16, "bridge.layers": 1, "bridge.heads": 2}
        values["bridge.decoder"] = _tiny_diffuser(join(out, "stand-ins", "diffuser"))
    return with_overrides(recipe, values)


def _resources(recipe: Recipe) -> dict[str, object]:
    """At most two workers.

    Where Ray sees a GPU, and the recipe does not keep to the CPU, the workers have as many as it
    wants (one where it wants none, fewer where there are), and are no more than these GPUs allow:
    CUDA and nccl are tried wherever they can be.
    """
    wanted = recipe.resources.gpus_per_worker or float(recipe.resources.device == "auto")
    workers = min(recipe.resources.max_workers, 2)
    gpus = wanted
    if gpus:
        seen = _gpus_in_sight(recipe)
        gpus = min(gpus, seen)
        workers = min(workers, max(1, int(seen // gpus))) if gpus else workers
    return {
        "resources.workers": workers,
        "resources.gpus_per_worker": gpus,
        "resources.cpus_per_worker": 1,
        "resources.actors": 1,
        "resources.readers": 1,
    }


def _gpus_in_sight(recipe: Recipe) -> float:
    """GPUs of the connected cluster, else of this machine."""
    if os.environ.get("RAY_ADDRESS"):
        import ray

        with ensure_ray(recipe, placed=False):  # to count the GPUs: what runs is smaller
            return ray.cluster_resources().get("GPU", 0)
    import torch

    return torch.cuda.device_count()


def _data(recipe: Recipe, system: System) -> dict[str, object]:
    clustering = {} if {"features", "codebook"} & {*system.ignores} else _clustering(recipe)
    return clustering | {
        "corpus.source": "generated:48",
        "corpus.val_source": "generated:16:val",
        "corpus.format": "generated",
        "corpus.image_size": 32,
        "corpus.shard_images": 16,
        "corpus.limit": None,
        "tokens.batch_size": 8,
        "evaluate.images": 16,
        "evaluate.questions": 8,
        "evaluate.vrr_images": 16,
        "evaluate.drawings": min(recipe.evaluate.drawings, 1),
        "evaluate.prompts": ["a red circle", "a blue rectangle"],
        "evaluate.batch_size": 8,
    }


def _clustering(recipe: Recipe) -> dict[str, object]:
    return {
        "features.batch_size": 8,
        "features.source": None,
        "features.patches": "all"
        if recipe.features.patches == "all"
        else min(recipe.features.patches, 8),
        "codebook.size": 16,
        "codebook.coarse": min(recipe.codebook.coarse, 4),
        "codebook.iterations": 2,
        "codebook.sample": None,
    }


def _model(recipe: Recipe, system: System, out: str) -> dict[str, object]:
    values: dict[str, object] = {
        "mllm.max_length": 128,
        "mllm.loss_chunk": 64,
        "mllm.adapter_hidden": None,
    }
    values |= smoke_sizes.train("mllm.train", recipe.mllm.train)
    begun = zip(range(1, smoke_sizes.STEPS), recipe.mllm.stages, strict=False)
    values["mllm.stages"] = [
        stage.model_dump(exclude_none=True) | {"from_step": step} for step, stage in begun
    ]
    if recipe.mllm.whole_mixture.text:
        values["mllm.text_source"] = _some_text(join(out, "stand-ins", "text.txt"))
    if recipe.encoder.train:
        layers = system.smoke_layers or 1
        tiny = {
            "patch_size": 32 // _NUM_PATCHES_A_SIDE,
            "hidden_size": 16,
            "layers": layers,
            "heads": 2,
            "text_layers": 1,
        }
        values |= {f"encoder.train.{key}": value for key, value in tiny.items()}
        values |= smoke_sizes.train("encoder.train.train", recipe.encoder.train.train)
    else:
        layers = system.smoke_layers or 2
        values["encoder.pretrained"] = _tiny_siglip(join(out, "stand-ins", "siglip"), layers)
    if recipe.mllm.config:
        tiny = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 64}
        values |= {
            f"mllm.config.{key}": value for key, value in (tiny | {"text_vocab_size": 300}).items()
        }
    else:
        values["mllm.pretrained"] = _tiny_qwen2(join(out, "stand-ins", "qwen2"))
    return values


def _tiny_diffuser(path: str) -> str:
    """A random Stable Diffusion with a text encoder of width 16 at `path`.

    The whole pipeline if diffusers is installed.
    """
    if exists(join(path, "model_index.json")):
        return path
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from smalti.mllm.bpe import train_bpe

    tokenizer = train_bpe(_words(), 300)
    tokenizer.model_max_length = 12
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(), atomic_local_dir(path) as folder:
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(config)
        if find_spec("diffusers"):
            _save_tiny_pipeline(text_encoder, tokenizer, folder)
        else:
            text_encoder.save_pretrained(os.path.join(folder, "text_encoder"))
            tokenizer.save_pretrained(os.path.join(folder, "tokenizer"))
            kinds = {
                "_class_name": "StableDiffusionPipeline",
                "text_encoder": ["transformers", "CLIPTextModel"],
            }
            write_json(os.path.join(folder, "model_index.json"), kinds)
    return path


def _save_tiny_pipeline(
    text_encoder: CLIPTextModel, tokenizer: PreTrainedTokenizerBase, folder: str
) -> None:
    """Save a Stable Diffusion of 32 px on this text encoder."""
    diffusers = importlib.import_module("diffusers")
    channels = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        cross_attention_dim=16,
        attention_head_dim=4,
        **channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        **channels,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def _words() -> list[str]:
    """Text enough for a byte-level BPE of some hundred tokens."""
    return [
        f"a {colour} {shape}"
        for colour in ("red", "green", "blue")
        for shape in ("circle", "rectangle", "triangle")
    ]


def _some_text(path: str) -> str:
    """A file of text, a line each."""
    write_atomic(path, "\n".join(_words()).encode())
    return path


def _tiny_siglip(path: str, layers: int) -> str:
    """A random SigLIP with its tokenizer at `path`.

    32 px, 4 x 4 patches, width 16, `layers` blocks.
    """
    if exists(join(path, "config.json")):
        return path
    import torch

    from smalti.mllm.bpe import train_bpe
    from smalti.tokenizers.siglip import build_siglip

    size = EncoderTrain(
        patch_size=32 // _NUM_PATCHES_A_SIDE, hidden_size=16, layers=layers, heads=2, text_layers=1
    )
    tokenizer = train_bpe(_words(), 300)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_siglip(
            size, 32, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id
        )
    with atomic_local_dir(path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return path


def _tiny_qwen2(path: str) -> str:
    """A random Qwen2 with its tokenizer at `path`.

    Width 32, 2 layers, and a tied head as in the small Qwen2.5 models.
    """
    if exists(join(path, "config.json")):
        return path
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from smalti.mllm.bpe import train_bpe

    tokenizer = train_bpe(_words(), 300)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 16,  # padded past the tokenizer, as the published ones are
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    with atomic_local_dir(path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return path
