"""The judge: toy images that it can tell apart, and noise that it cannot."""

from __future__ import annotations

import math

import numpy as np
import torch

from smalti.workflows.evaluation.scores.judge import Judge, train_judge, training_steps
from smalti.workflows.evaluation.scores.pixels import to_model


def toy_images(count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Red or blue discs or bars of 32 px on grey noise, labelled `red disc` and so on."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:32, :32]
    images, labels = [], []
    for _ in range(count):
        color, shape = rng.integers(0, 2, size=2)
        y, x = rng.integers(10, 22, size=2)
        mask = (
            (yy - y) ** 2 + (xx - x) ** 2 < 49 if shape else (abs(yy - y) < 3) & (abs(xx - x) < 9)
        )
        image = rng.integers(110, 140, size=(32, 32, 3))
        image[mask] = (210, 40, 40) if color else (40, 60, 210)
        images.append(image.astype(np.uint8))
        labels.append(f"{'red' if color else 'blue'} {'disc' if shape else 'bar'}")
    return np.stack(images), labels


def test_judge_learns_images_that_can_be_told_apart() -> None:
    judge = train_judge(*toy_images(240, 0), seed=0)
    images, labels = toy_images(80, 1)
    given = judge.classify(to_model(images))
    assert np.mean([one == other for one, other in zip(given, labels, strict=True)]) >= 0.95


def test_judge_of_noise_labels_knows_nothing() -> None:
    images, labels = toy_images(128, 0)
    shuffled = np.random.default_rng(5).permutation(labels).tolist()
    judge = train_judge(images, shuffled, seed=0)
    held, right = toy_images(200, 1)
    right = np.random.default_rng(6).permutation(right).tolist()
    assert (
        np.mean(
            [one == other for one, other in zip(judge.classify(to_model(held)), right, strict=True)]
        )
        < 0.45
    )


def test_judge_is_seeded_and_leaves_the_random_state() -> None:
    images, labels = toy_images(40, 0)
    torch.manual_seed(9)
    before = torch.get_rng_state()
    one, other = train_judge(images, labels, seed=1), train_judge(images, labels, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    pixels = to_model(images)
    assert torch.equal(one(pixels), other(pixels))


def test_judge_scores_labels_by_their_words_and_places() -> None:
    judge = Judge(["red on blue", "blue on red", "red"], 16)
    members = judge.members_LW
    assert members.shape[0] == 3
    assert len({tuple(row.tolist()) for row in members}) == 3
    assert members.sum(1).tolist() == [3, 3, 1]
    assert judge(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_judge_takes_few_steps_for_few_images() -> None:
    assert training_steps(1) == 1
    assert training_steps(64) == 40
    assert training_steps(3578) == 300
    assert training_steps(20_000) == math.ceil(5 * 20_000 / 64)
