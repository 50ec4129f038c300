"""deploy/kuberay/: fields that KubeRay 1.6 documents, the lock's Ray, a token on every door, one spec for cluster and job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from smalti.cli.doctor import read_lock
from smalti.cli.parser import parse
from smalti.workflows import placement

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "deploy" / "kuberay"
CLUSTER = {
    "rayVersion", "authOptions", "gcsFaultToleranceOptions", "enableInTreeAutoscaling", "autoscalerOptions",
    "headGroupSpec", "workerGroupSpecs", "headServiceAnnotations", "suspend", "managedBy", "upgradeStrategy",
}  # fmt: skip
JOB = {
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate", "metadata", "clusterSelector",
    "submitterConfig", "managedBy", "deletionStrategy", "entrypoint", "runtimeEnvYAML", "jobId", "submissionMode",
    "entrypointResources", "entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished",
    "shutdownAfterJobFinishes", "suspend",
}  # fmt: skip
GROUP = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template", "scaleStrategy",
    "idleTimeoutSeconds", "suspend", "resources", "labels",
}  # fmt: skip
HEAD = {"serviceType", "headService", "enableIngress", "rayStartParams", "template", "resources", "labels"}
NESTED = {
    "authOptions": {"mode", "secretName", "enableK8sTokenAuth"},
    "gcsFaultToleranceOptions": {"redisAddress", "redisPassword", "redisUsername", "externalStorageNamespace"},
    "autoscalerOptions": {
        "resources", "image", "imagePullPolicy", "env", "envFrom", "volumeMounts", "securityContext",
        "idleTimeoutSeconds", "upscalingMode", "version",
    },
}  # fmt: skip


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


@pytest.fixture
def spec() -> dict[str, Any]:
    return read("raycluster.yaml")["spec"]


def test_fields_are_those_of_the_operator(spec: dict[str, Any]) -> None:
    cluster, job = read("raycluster.yaml"), read("rayjob.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert set(spec) <= CLUSTER
    assert set(job["spec"]) <= JOB
    assert set(spec["headGroupSpec"]) <= HEAD
    assert all(set(group) <= GROUP for group in spec["workerGroupSpecs"])
    for name, fields in NESTED.items():
        assert set(spec[name]) <= fields


def test_the_job_has_the_same_cluster(spec: dict[str, Any]) -> None:
    assert read("rayjob.yaml")["spec"]["rayClusterSpec"] == spec


def test_ray_is_that_of_the_lock(spec: dict[str, Any]) -> None:
    assert spec["rayVersion"] == read_lock(ROOT / "requirements.lock")["ray"]


def test_doors_are_shut_and_the_head_can_come_back(spec: dict[str, Any]) -> None:
    assert spec["authOptions"] == {"mode": "token", "secretName": "smalti-ray-token"}
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in spec["headGroupSpec"]
    assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "smalti-redis"
    service, redis = yaml.safe_load_all((FOLDER / "redis.yaml").read_text())
    address = f"redis://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == address
    assert redis["spec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]


def test_params_are_strings_and_pods_ask_for_what_they_may_use(spec: dict[str, Any]) -> None:
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in group["template"]["spec"]["volumes"]
        }
    assert groups[0]["rayStartParams"]["num-cpus"] == "0"


def test_the_head_knows_the_worker_groups(spec: dict[str, Any]) -> None:
    (variable,) = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    assert variable["name"] == placement.GROUPS
    known = json.loads(variable["value"])
    assert set(known) == {group["groupName"] for group in spec["workerGroupSpecs"]}
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        offer = {"CPU": int(limits["cpu"])} | ({"GPU": limits["nvidia.com/gpu"]} if "nvidia.com/gpu" in limits else {})
        assert known[group["groupName"]] == {"max_workers": group["maxReplicas"], "resources": offer}


def test_the_jobs_command_is_one_of_smalti() -> None:
    words = [word.strip("'") for word in read("rayjob.yaml")["spec"]["entrypoint"].split()]
    assert words[:3] == ["python", "-m", "smalti"]
    arguments = parse(words[3:])
    assert (arguments.command, arguments.recipe) == ("run", "semhitok-256")
    assert all("=" in override for override in arguments.overrides)
