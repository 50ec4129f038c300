"""How many workers train: a fixed number, or any in a range that a batch divides among."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from smalti.errors import ConfigError
from smalti.workflows.train.engines import accumulation

if TYPE_CHECKING:
    from ray.air.result import Result
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import (
        ReservedResources,
    )
    from ray.train.torch import TorchConfig
    from ray.train.v2._internal.execution.scaling_policy import (
        ElasticScalingPolicy,
        ScalingDecision,
    )
    from ray.train.v2._internal.execution.worker_group import (
        WorkerGroupPollStatus,
        WorkerGroupState,
    )
    from ray.train.v2.api.config import RunConfig, ScalingConfig
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    from smalti.schema import Resources, Train
    from smalti.workflows.train.driver_channel import ChannelHandle
    from smalti.workflows.train.worker import WorkerResult

PATIENCE = 10
"""How often, once per minute, growth is put off while there is no checkpoint to start from."""


def fitting_workers(train: Train, resources: Resources) -> list[int]:
    """Numbers of workers that `resources.workers` allows and that share a batch evenly, ascending.

    Raises:
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
        f"train.batch_size={train.batch_size} does not divide{micro} among any number of workers "
        f"that resources.workers=[{resources.min_workers}, {resources.max_workers}] allows. Set "
        "train.batch_size to a multiple of such a number."
    )


def check_together(what: str, train: Train, resources: Resources) -> None:
    """Check that a loss sees the same number of samples with each allowed number of workers.

    Args:
        what: what of the loss sees a micro batch of all workers at once.
        train: the recipe's settings.
        resources: with the range of workers.

    Raises:
        ConfigError: it would see another number.
    """
    seen = {
        n: train.batch_size // accumulation(train, n)[1] for n in fitting_workers(train, resources)
    }
    if len(set(seen.values())) > 1:
        counts = ", ".join(f"{samples} with {n} workers" for n, samples in seen.items())
        raise ConfigError(
            f"{what} sees the micro batches of all workers at once: with train.micro_batch_size="
            f"{train.micro_batch_size} and resources.workers=[{resources.min_workers}, "
            f"{resources.max_workers}] that is {counts}, so the curve would jump. Remove "
            "train.micro_batch_size (a worker then takes its whole share at once), or set "
            "resources.workers to one number."
        )


def check_batch(section: str, train: Train, resources: Resources, *, together: str = "") -> None:
    """Check that the workers can share a batch evenly.

    Args:
        section: of the recipe, named in the error.
        train: the settings in that section.
        resources: with the number of workers.
        together: what of the loss sees a micro batch of all workers at once, so that its number of
            samples must not change during the run; "" where nothing does.

    Raises:
        ConfigError: they cannot.
    """
    try:
        fitting_workers(train, resources)
        if together:
            check_together(together, train, resources)
    except ConfigError as error:
        raise ConfigError(f"{section}: {error}") from error


def unused_workers(train: Train, resources: Resources) -> str:
    """A line about the allowed numbers of workers that are not used; "" without any."""
    fitting = fitting_workers(train, resources)
    others = [
        n for n in range(resources.min_workers, resources.max_workers + 1) if n not in fitting
    ]
    if not others:
        return ""
    shown = ", ".join(map(str, others[:8])) + (", …" if len(others) > 8 else "")
    return (
        f"a batch of {train.batch_size} does not divide among {shown} workers: where there is room "
        f"for so many, the next lower of {', '.join(map(str, fitting))} train"
    )


def staying_nodes() -> set[str]:
    """Ids of alive nodes that will not be taken away, as far as notices say.

    Ray's reservation may be on others for a while, and workers that are started there never
    become ready.
    """
    import ray

    draining = ray._private.state.state.get_draining_nodes()
    return {
        node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in draining
    }


def elastic_trainer(
    fitting: list[int],
    channel: ChannelHandle,
    work: Callable[[], WorkerResult],
    torch_config: TorchConfig,
    scaling: ScalingConfig,
    run_config: RunConfig,
) -> TorchTrainer:
    """A TorchTrainer that only ever has a fitting number of workers, on nodes that stay.

    It starts more workers from a checkpoint that is requested on the channel; after ten minutes
    without one, from the newest there is.

    Args:
        fitting: numbers of workers to use.
        channel: of the driver.
        work: what each worker does.
        torch_config: of Ray Train.
        scaling: names the range of workers.
        run_config: of Ray Train.
    """
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    class ElasticTrainer(TorchTrainer):
        def _initialize_and_run_controller(self, **controller: object) -> Result:
            controller["scaling_policy"] = _fitting_policy(fitting, channel, scaling)
            return super()._initialize_and_run_controller(**controller)

    return ElasticTrainer(
        work,  # type: ignore[arg-type]  # typed to return None; `fit` returns what it returns
        torch_config=torch_config,
        scaling_config=scaling,
        run_config=run_config,
    )


def _fitting_policy(
    fitting: list[int], channel: ChannelHandle, scaling: ScalingConfig
) -> ElasticScalingPolicy:
    """Ray's elastic policy with one count rounded down and one decision put off.

    Ray has no public way to do so.
    """
    import ray
    from ray.train.v2._internal.execution.scaling_policy import (
        ElasticScalingPolicy,
        NoopDecision,
        ResizeDecision,
    )

    class FittingPolicy(ElasticScalingPolicy):
        put_off = 0

        def _count_possible_workers(self, reserved_resources: ReservedResources) -> int:
            staying = staying_nodes()
            usable = {
                node: resources for node, resources in reserved_resources.items() if node in staying
            }
            room = super()._count_possible_workers(usable)
            return max((n for n in fitting if n <= room), default=0)

        def make_decision_for_running_worker_group(
            self,
            worker_group_state: WorkerGroupState,
            worker_group_status: WorkerGroupPollStatus,
        ) -> ScalingDecision:
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
                return NoopDecision()  # until Ray asks again
            self.put_off = 0
            return decision

    return FittingPolicy(scaling)
