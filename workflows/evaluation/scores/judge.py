"""The judge of drawings: a small convolutional classifier that has only ever seen real training
images.

A label of several words (`blue circle`) is scored as the sum of its words' logits, each word with
its place, so that a colour learns from every shape; right means the whole label. B images, W words,
L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.progress import Progress
from smalti.workflows.evaluation.scores.pixels import to_model

BATCH = 64
EPOCHS = 5
# few images: more epochs, up to this many steps
STEPS_OF_SMALL_SETS = 300
EPOCHS_OF_SMALL_SETS = 40
NOISE, SHIFT = 0.06, 4  # drawn images are never as clean and as centred as real ones


class Judge(nn.Module):
    """Classifier of float pixels (B, 3, S, S) in [-1, 1]: logits (B, L).

    Images of other sizes are resized to S by averaging.
    """

    def __init__(self, labels: Sequence[str], size: int, width: int = 32) -> None:
        super().__init__()
        self.labels = list(labels)
        self.size = size
        words = [
            [(place, word) for place, word in enumerate(label.split())] for label in self.labels
        ]
        names = sorted({word for label in words for word in label})
        members_LW = torch.tensor([[float(name in label) for name in names] for label in words])
        self.register_buffer("members_LW", members_LW)
        layers: list[nn.Module] = []
        channels = 3
        for step in range(max(2, min(4, size.bit_length() - 3))):
            out = width * 2 ** min(step, 2)
            layers += [
                nn.Conv2d(channels, out, 3, stride=2, padding=1),
                nn.BatchNorm2d(out),
                nn.ReLU(),
            ]
            channels = out
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Linear(2 * channels, 128), nn.ReLU(), nn.Linear(128, len(names))
        )

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        if pixels_BCHW.shape[-1] != self.size:
            pixels_BCHW = F.interpolate(pixels_BCHW, (self.size, self.size), mode="area")
        features_BDHW = self.body(pixels_BCHW)
        pooled = torch.cat([features_BDHW.mean((2, 3)), features_BDHW.amax((2, 3))], dim=1)
        return self.head(pooled) @ self.members_LW.T

    @torch.no_grad()
    def classify(self, pixels_BCHW: Tensor) -> list[str]:
        """The most likely label of each image."""
        self.eval()
        device = next(self.parameters()).device
        ids: list[int] = []
        for start in range(0, len(pixels_BCHW), 4 * BATCH):
            ids += self(pixels_BCHW[start : start + 4 * BATCH].to(device)).argmax(1).tolist()
        return [self.labels[index] for index in ids]


def train_judge(
    bhwc: np.ndarray, labels: Sequence[str], *, seed: int, device: str = "cpu"
) -> Judge:
    """Train a judge on uint8 (n, S, S, 3) with a label each.

    AdamW with one cosine, `training_steps(n)` steps of `BATCH` images. Shifts and noise keep it
    from using details that no drawing has. The result depends on the images and the seed; the
    caller's random state does not change.
    """
    classes = sorted(set(labels))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(classes, bhwc.shape[1]).to(device)
    targets = torch.tensor([classes.index(label) for label in labels])
    generator = torch.Generator().manual_seed(seed)
    steps = training_steps(len(labels))
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-5)
    order = torch.empty(0, dtype=torch.int64)
    judge.train()
    with Progress(steps, "steps", "evaluate: training the judge") as progress:
        for _ in range(steps):
            while len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(labels), generator=generator)])
            chosen = order[:BATCH]
            order = order[BATCH:]
            pixels = _augment(to_model(bhwc[chosen.numpy()]), generator).to(device)
            loss = F.cross_entropy(judge(pixels), targets[chosen].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
    return judge.eval()


def training_steps(num_images: int) -> int:
    """Training steps for `num_images` images: five epochs.

    For small sets up to forty epochs, but at most 300 steps.
    """
    batches = num_images / BATCH
    return math.ceil(
        max(EPOCHS * batches, min(STEPS_OF_SMALL_SETS, EPOCHS_OF_SMALL_SETS * batches), 1)
    )


def _augment(pixels_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Shift the batch at random (edges repeated) and add Gaussian noise."""
    dy, dx = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator).tolist()
    height, width = pixels_BCHW.shape[2:]
    shifted = F.pad(pixels_BCHW, (SHIFT,) * 4, mode="replicate")[
        :, :, dy : dy + height, dx : dx + width
    ]
    strength = NOISE * torch.rand(len(pixels_BCHW), 1, 1, 1, generator=generator)
    return shifted + strength * torch.randn(shifted.shape, generator=generator)
