"""How many devices share the work, so that each gets an equal part of every batch."""

from __future__ import annotations

from collections.abc import Sequence

from smalti.errors import ConfigError
from smalti.schema import Resources
from smalti.workflows.plan.models import Model
from smalti.workflows.train.engines import accumulation


def shared_among(models: Sequence[Model], resources: Resources, given: int | None) -> int:
    """The number of devices.

    Args:
        given: `--gpus`; None: the largest of `resources.workers` that can share every batch.

    Raises:
        ConfigError: for a batch that they cannot share; it names the stages, and numbers that can.
    """
    if given is None:
        allowed = range(resources.max_workers, resources.min_workers - 1, -1)
        num = next((num for num in allowed if not cannot_share(models, num)), resources.max_workers)
    else:
        num = given
    stuck = cannot_share(models, num)
    if stuck:
        key = "resources.workers" if given is None else "--gpus"
        batches = ", ".join(
            f"{m.section}.batch_size={m.train.batch_size}{_micro(m)}" for m in stuck
        )
        most = max(model.train.batch_size for model in models)
        fitting = [n for n in range(1, most + 1) if not cannot_share(models, n)]
        near = [
            str(n)
            for n in (*[n for n in fitting if n < num][-1:], *[n for n in fitting if n > num][:1])
        ]
        which = f"{stuck[0].section}.batch_size" if len(stuck) == 1 else "each of these batch sizes"
        raise ConfigError(
            f"{key}={num}: {batches} cannot be shared evenly by {num} devices. "
            f"Set {key} to {' or '.join(near)}, or {which} to a multiple of {num}."
        )
    return num


def cannot_share(models: Sequence[Model], num: int) -> list[Model]:
    """Models whose batch `num` devices cannot share."""
    found = []
    for model in models:
        try:
            accumulation(model.train, num)
        except ConfigError:
            found.append(model)
    return found


def _micro(model: Model) -> str:
    micro = model.train.micro_batch_size
    return "" if micro is None else f" in micro batches of {micro}"
