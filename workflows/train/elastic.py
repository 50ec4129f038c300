"""How many workers train: a fixed number, or as many between two numbers as there is room for and a
batch divides among.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smalti.errors import ConfigError
from smalti.workflows.train.engines import accumulation

if TYPE_CHECKING:
    from smalti.schema import Resources, Train

PATIENCE = 10  # looks, one a minute, that a larger group waits for a checkpoint


def fitting_workers(train: Train, resources: Resources) -> list[int]:
    """The numbers of workers, rising, that `resources.workers` allows and that can share a batch
    evenly.

    ConfigError: there is none.
    """
    fitting = []
    for workers in range(resources.min_workers, resources.max_workers + 1):
        try:
            accumulation(train, workers)
        except ConfigError:
            if isinstance(resources.workers, int):
                raise
        else:
            fitting.append(workers)
    if fitting:
        return fitting
    micro = (
        "" if train.micro_batch_size is None else f" in micro batches of {train.micro_batch_size}"
    )
    raise ConfigError(
        f"train.batch_size={train.batch_size} does not divide{micro} among any number of workers that "
        f"resources.workers=[{resources.min_workers}, {resources.max_workers}] allows. Set train.batch_size to a multiple "
        "of such a number."
    )


def check_together(what: str, train: Train, resources: Resources) -> None:
    """ConfigError where `what` of a loss, which sees a micro batch of all workers at once, would
    see another number of samples at another of the numbers of workers allowed.
    """
    seen = {
        n: train.batch_size // accumulation(train, n)[1] for n in fitting_workers(train, resources)
    }
    if len(set(seen.values())) > 1:
        told = ", ".join(f"{samples} with {n} workers" for n, samples in seen.items())
        raise ConfigError(
            f"{what} sees the micro batches of all workers at once: with train.micro_batch_size={train.micro_batch_size} and "
            f"resources.workers=[{resources.min_workers}, {resources.max_workers}] that is {told}, so the curve would jump. "
            "Take train.micro_batch_size out (a worker then takes its whole share at once), or set resources.workers to one "
            "number."
        )


def check_batch(section: str, train: Train, resources: Resources, *, together: str = "") -> None:
    """ConfigError, with the section's name, unless the workers can share a batch evenly.

    `together`: what of the loss sees the samples of a micro batch of all workers at once, so that
    their number must stay the same on the way.
    """
    try:
        fitting_workers(train, resources)
        if together:
            check_together(together, train, resources)
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from error


def left_out(train: Train, resources: Resources) -> str:
    """A line about the numbers of workers in the allowed range that will not be used; "" when there
    are none.
    """
    fitting = fitting_workers(train, resources)
    others = [
        n for n in range(resources.min_workers, resources.max_workers + 1) if n not in fitting
    ]
    if not others:
        return ""
    told = ", ".join(map(str, others[:8])) + (", …" if len(others) > 8 else "")
    return (
        f"a batch of {train.batch_size} does not divide among {told} workers: with room for so many, the next lower of "
        f"{', '.join(map(str, fitting))} train"
    )


def staying_nodes() -> set[str]:
    """Ids of the nodes that are alive and not about to go.

    What Ray has reserved may lie on others for a while, and a group that is started there waits for
    nothing.
    """
    import ray

    going = ray._private.state.state.get_draining_nodes()
    return {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going}


def elastic_trainer(fitting: list[int], channel: Any, **settings: Any) -> Any:
    """A TorchTrainer made with `settings`, whose `scaling_config` names a range, that only ever has
    a number of workers out of `fitting`, on nodes that stay, and starts more of them from a
    checkpoint made for it (asked for on the `channel`; after ten minutes without one, from what
    there is).

    Ray has no public way to say so: this is its elastic policy with one count rounded down and one
    decision put off.
    """
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import (
        ElasticScalingPolicy,
        NoopDecision,
        ResizeDecision,
    )

    class Fitting(ElasticScalingPolicy):
        put_off = 0

        def _count_possible_workers(self, reserved_resources: Any) -> int:
            staying = staying_nodes()
            here = {
                node: resources for node, resources in reserved_resources.items() if node in staying
            }
            room = super()._count_possible_workers(here)
            return max((n for n in fitting if n <= room), default=0)

        def make_decision_for_running_worker_group(
            self, worker_group_state: Any, worker_group_status: Any
        ) -> Any:
            decision = super().make_decision_for_running_worker_group(
                worker_group_state, worker_group_status
            )
            if (
                not isinstance(decision, ResizeDecision)
                or decision.num_workers < worker_group_state.num_workers
            ):
                return decision
            self.put_off += 1
            if self.put_off <= PATIENCE and not ray.get(channel.may_restart.remote()):
                return NoopDecision()  # until Ray looks again
            self.put_off = 0
            return decision

    class Trainer(TorchTrainer):
        def _initialize_and_run_controller(self, **controller: Any) -> Any:
            controller["scaling_policy"] = Fitting(settings["scaling_config"])
            whole: Any = super()
            return whole._initialize_and_run_controller(**controller)

    return Trainer(**settings)
