"""When checkpoints are written, and which are kept."""

from __future__ import annotations

import pytest

from smalti.errors import ConfigError
from smalti.workflows.train.checkpoint_policy import CheckpointPolicy
from smalti.workflows.train.manifests import (
    CompleteCheckpoint,
)


def made(*scores: float | None) -> list[CompleteCheckpoint]:
    return [CompleteCheckpoint(step, str(step), (), score) for step, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "best", "kept"),
    [
        ([3.0, 1.0, 2.0, 4.0], None, [2, 3]),
        ([3.0, 1.0, 2.0, 4.0], "loss", [1, 2, 3]),
        ([3.0, 1.0, 2.0, 1.5], "max:psnr", [0, 2, 3]),
        ([3.0, 4.0, 2.0, 1.0], "loss", [2, 3]),
        ([None, float("nan"), 2.0, 1.0], "loss", [2, 3]),
        ([1.0], "loss", [0]),
    ],
)
def test_the_newest_and_the_best_are_kept(scores, best, kept) -> None:
    whole = made(*scores)
    policy = CheckpointPolicy(keep=2, best=best)
    dropped = {c.step for c in policy.to_remove(whole)}
    assert [c.step for c in whole if c.step not in dropped] == kept


def test_the_score_is_the_last_value_that_was_logged() -> None:
    rows = [{"step": 4, "loss": 2.0, "psnr": 20.0}, {"step": 8, "loss": 1.5}]

    def score(best: str | None, rows: list[dict[str, float]]) -> float | None:
        return CheckpointPolicy(best=best).score(rows)

    assert score("loss", rows) == 1.5
    assert score("max:psnr", rows) == 20.0
    assert score(None, rows) is None
    assert score("loss", []) is None


def test_best_names_a_metric_that_is_logged() -> None:
    CheckpointPolicy(best="max:psnr").check_metric(["loss", "psnr"])
    CheckpointPolicy().check_metric([])
    policy = CheckpointPolicy(best="los")
    with pytest.raises(ConfigError, match=r"train.best=los names no metric .* it logs loss, psnr"):
        policy.check_metric(["psnr", "loss"])


def test_only_the_first_log_is_checked() -> None:
    policy = CheckpointPolicy(best="loss")
    policy.check_metric(["loss"])
    policy.check_metric(["lr"])


def test_checkpoints_follow_the_schedule_and_the_last_step() -> None:
    policy = CheckpointPolicy(steps=10, every=4)
    assert [done for done in range(1, 11) if policy.due(done)] == [4, 8, 10]


def test_one_checkpoint_is_started_per_step_and_none_that_cannot_be_resumed() -> None:
    policy = CheckpointPolicy(steps=8, every=4)
    policy.resumed(4)
    assert [policy.start(done) for done in (4, 5, 5, 8)] == [False, True, False, True]
    assert not CheckpointPolicy(steps=8, every=4, resumable=False).start(4)


@pytest.mark.parametrize("preemptible", [True, False])
@pytest.mark.parametrize("resumable", [True, False])
def test_notices_are_asked_for_where_a_checkpoint_helps(preemptible, resumable) -> None:
    policy = CheckpointPolicy(preemptible=preemptible, resumable=resumable)
    assert policy.asks_for_notices() == (preemptible and resumable)


def test_a_notice_is_answered_once_until_it_names_other_nodes() -> None:
    policy = CheckpointPolicy(preemptible=True)
    notices = (["a"], ["a"], ["a", "b"], ["a", "b"], ["a"])
    assert [policy.is_new_notice(nodes) for nodes in notices] == [True, False, True, False, True]


def test_growth_needs_an_elastic_run_and_a_step_to_take() -> None:
    policy = CheckpointPolicy(steps=10, elastic=True)
    assert policy.asks_for_growth(4)
    assert not policy.asks_for_growth(10)
    assert not CheckpointPolicy(steps=10).asks_for_growth(4)
