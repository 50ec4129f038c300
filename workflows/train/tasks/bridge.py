"""Train UniCode²'s bridge on token shards with captions.

The bridge maps codes to the conditioning of a diffusion decoder.

Axes as in `smalti.mllm.bridge`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from smalti import storage
from smalti.mllm.bridge import CODES, SETTINGS, WEIGHTS, Bridge, BridgeLoss, save_bridge
from smalti.mllm.diffusion import PromptSide
from smalti.mllm.sequences import caption_of
from smalti.schema import BridgeSection, Mixture
from smalti.workflows.train.task import Batch, Context, Metrics, Row, Source, Task
from smalti.workflows.train.tasks.mllm import UsableRows

if TYPE_CHECKING:
    from smalti.workflows.train.deepspeed_compat import Engine

CAPTIONED = Mixture(caption_to_image=0.0, image_to_caption=1.0, qa=0.0)


class BridgeTask(Task):
    """Trains a bridge to the conditioning that frozen text encoders give.

    Args:
        section: the recipe's `bridge` section.
        tokens: folder of the token shards.
        keys: its training shards.
        sizes: their numbers of rows with a caption.
        num_tokens: T.
        path: the stage's folder, with the code vectors.
    """

    together = "InfoNCE"

    def __init__(
        self,
        section: BridgeSection,
        tokens: str,
        keys: list[str],
        sizes: list[int],
        num_tokens: int,
        path: str,
    ) -> None:
        self.section = section
        self.tokens = tokens
        self.keys = keys
        self.sizes = sizes
        self.num_tokens = num_tokens
        self.path = path

    def source(self) -> Source:
        rows = UsableRows(self.tokens, self.keys, self.sizes)
        rows.mixture = CAPTIONED
        return rows

    def setup(self, context: Context) -> None:
        with storage.local_copy(storage.join(self.path, CODES)) as file:
            codes_VC = load_file(file)["codes"]  # mapped: the workers of a node share it
        text = PromptSide.from_pretrained(self.section.decoder).to(context.device)
        self.build(context, codes_VC, text, context.device)

    def build(
        self, context: Context, codes_VC: Tensor, text: PromptSide, device: torch.device
    ) -> None:
        """Build the bridge between code vectors and text encoders on `device`."""
        super().setup(context)
        self.codes_VC = codes_VC
        self.text = text
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            given = text({name: ids.to(device) for name, ids in text.tokenize([""]).items()})
            self.bridge = Bridge(self.section, given.shape(self.num_tokens, codes_VC.shape[1]))

    def modules(self) -> dict[str, nn.Module]:
        return {"model": BridgeLoss(self.bridge)}

    def make_batch(self, rows: Sequence[Row]) -> Batch:
        """`vectors` float32 (B, T, C); `ids_NAME` int64 (B, L) of the captions per text encoder."""
        codes_BT = torch.from_numpy(
            np.stack([row.values["codes"] for row in rows]).astype(np.int64)
        )
        ids = self.text.tokenize([caption_of(row.values) for row in rows])
        return {
            "vectors": self.codes_VC[codes_BT],
            **{f"ids_{name}": ids_BL for name, ids_BL in ids.items()},
        }

    def planned_batch(self, num: int) -> Batch:
        ids = self.text.tokenize([""] * num)
        return {
            "vectors": torch.zeros(num, self.num_tokens, self.codes_VC.shape[1]),
            **{f"ids_{name}": ids_BL for name, ids_BL in ids.items()},
        }

    def frozen_modules(self) -> dict[str, nn.Module]:
        return {"text": self.text}

    def loss(
        self,
        name: str,
        engines: Mapping[str, Engine],
        batch: Batch,
        step: int,
        share: Tensor | None,
    ) -> tuple[Tensor, Metrics] | None:
        ids = {
            key.removeprefix("ids_"): value
            for key, value in batch.items()
            if key.startswith("ids_")
        }
        workers = self.context.collectives
        gather = workers.all_gather if workers.world_size > 1 else None
        first = workers.rank * len(batch["vectors"])
        return engines[name](
            batch["vectors"], self.text(ids), torch.cat([*ids.values()], -1), gather, first
        )

    def save(self, path: str, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """Write `bridge.safetensors` and `bridge.json` beside the code vectors.

        `smalti.mllm.bridge.load_bridge` reads them.
        """
        state = {name.removeprefix("bridge."): tensor for name, tensor in weights["model"].items()}
        with tempfile.TemporaryDirectory(prefix="smalti-") as folder:
            save_bridge(folder, self.bridge, state)
            for file in (WEIGHTS, SETTINGS):
                storage.put_file(storage.join(folder, file), storage.join(path, file))
        return {}
