"""`ray_cluster.yaml` passes the check that `ray up` makes, and keeps the cluster's doors shut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema.exceptions import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).resolve().parents[1] / "ray_cluster.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return prepare_config(yaml.safe_load(FILE.read_text()))


def test_rays_validator_accepts_it(config: dict[str, Any]) -> None:
    validate_config(config)


def test_rays_validator_would_refuse_a_misspelt_key(config: dict[str, Any]) -> None:
    config["available_node_types"]["head"]["min_wokers"] = 1
    with pytest.raises(ValidationError, match="min_wokers"):
        validate_config(config)


def test_the_head_listens_on_loopback_and_every_ray_start_asks_for_a_token(
    config: dict[str, Any],
) -> None:
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in config[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_there_are_gpu_workers_and_cpu_workers(config: dict[str, Any]) -> None:
    resources = {name: kind["resources"] for name, kind in config["available_node_types"].items()}
    assert resources["gpu_worker"]["GPU"] > 0
    assert "GPU" not in resources["cpu_worker"] and resources["cpu_worker"]["CPU"] > 0
    assert resources["head"]["CPU"] == 0


def test_the_head_is_no_spot_machine_and_all_workers_are(config: dict[str, Any]) -> None:
    markets = {
        name: kind["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        for name, kind in config["available_node_types"].items()
    }
    assert markets == {"head": None, "gpu_worker": "spot", "cpu_worker": "spot"}


def test_workers_reach_the_bucket_and_stand_beside_each_other(config: dict[str, Any]) -> None:
    """Ray gives an instance profile to the head alone; a comma would spread the machines over
    zones.
    """
    workers = [
        config["available_node_types"][name]["node_config"] for name in ("gpu_worker", "cpu_worker")
    ]
    assert all(node["IamInstanceProfile"]["Arn"].startswith("arn:aws:iam::") for node in workers)
    assert (
        workers[0]["Placement"]["GroupName"] and "," not in config["provider"]["availability_zone"]
    )


def test_nodes_may_open_many_files_and_have_what_recipes_name(config: dict[str, Any]) -> None:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert config[key][-1].startswith("ulimit -n 65536; RAY_AUTH_MODE=token ray start")
    (install,) = [command for command in config["setup_commands"] if "bin/pip install" in command]
    assert {"s3fs", "peft", "liger-kernel", "accelerate"} <= set(install.split())


def test_objects_spill_to_a_disk_of_the_machine(config: dict[str, Any]) -> None:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert "--object-spilling-directory=/nvme/" in config[key][-1]
    assert any("/nvme" in command and "mkfs" in command for command in config["setup_commands"])
