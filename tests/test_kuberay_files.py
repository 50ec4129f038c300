"""deploy/kuberay/: fields that KubeRay 1.6 documents, the lock's Ray, a token on every door, one
spec for cluster and job.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from smalti.cli.doctor import read_lock
from smalti.cli.parser import parse
from smalti.workflows.cluster import placement

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
HEAD = {
    "serviceType",
    "headService",
    "enableIngress",
    "rayStartParams",
    "template",
    "resources",
    "labels",
}
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
    assert (
        spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"]
        == "smalti-redis"
    )
    service, redis = yaml.safe_load_all((FOLDER / "redis.yaml").read_text())
    address = f"redis://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == address
    assert redis["spec"]["template"]["metadata"]["labels"] == service["spec"]["selector"]


def labels_of_pods() -> dict[str, dict[str, str]]:
    """Labels that pods have: KubeRay's own on Ray's, those of the files and of the operator's chart
    on the others.
    """
    name, ray = read("raycluster.yaml")["metadata"]["name"], {"ray.io/is-ray-node": "yes"}
    _, redis = yaml.safe_load_all((FOLDER / "redis.yaml").read_text())
    return {
        "head": ray
        | {"ray.io/cluster": name, "ray.io/node-type": "head", "ray.io/group": "headgroup"},
        "worker": ray
        | {"ray.io/cluster": name, "ray.io/node-type": "worker", "ray.io/group": "gpu"},
        "another cluster's": ray | {"ray.io/cluster": "other", "ray.io/node-type": "worker"},
        "operator": {"app.kubernetes.io/name": "kuberay-operator"},
        "redis": redis["spec"]["template"]["metadata"]["labels"],
        "stranger": {"app": "web"},
    }


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    """Kubernetes' own rule: all labels match, and each key that must exist does."""
    assert set(selector) <= {"matchLabels", "matchExpressions"}
    wanted = selector.get("matchLabels", {})
    present = [
        one["key"] for one in selector.get("matchExpressions", []) if one["operator"] == "Exists"
    ]
    assert len(present) == len(selector.get("matchExpressions", []))
    return wanted.items() <= labels.items() and set(present) <= set(labels)


def test_only_the_clusters_pods_and_the_operator_reach_its_ports() -> None:
    policies = list(yaml.safe_load_all((FOLDER / "networkpolicy.yaml").read_text()))
    pods = labels_of_pods()
    assert all(
        (p["apiVersion"], p["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy") for p in policies
    )
    assert all(set(p["spec"]) == {"podSelector", "policyTypes", "ingress"} for p in policies)

    def reached(target: str, port: int) -> set[str]:
        rules = [
            rule
            for p in policies
            if selects(p["spec"]["podSelector"], pods[target])
            for rule in p["spec"]["ingress"]
        ]
        assert rules, "a pod that no policy selects is open to all"
        opened = [
            rule
            for rule in rules
            if port in [one["port"] for one in rule.get("ports", [{"port": port}])]
        ]
        peers = [peer["podSelector"] for rule in opened for peer in rule["from"]]
        return {
            name for name, labels in pods.items() if any(selects(peer, labels) for peer in peers)
        }

    assert reached("head", 8265) == {"head", "worker", "operator"}
    for target, port in (("head", 6379), ("head", 10001), ("worker", 8265), ("worker", 40000)):
        assert reached(target, port) == {"head", "worker"}, (target, port)
    assert reached("redis", 6379) == {"head", "worker", "another cluster's"}
    assert reached("redis", 22) == set()


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
        offer = {"CPU": int(limits["cpu"])} | (
            {"GPU": limits["nvidia.com/gpu"]} if "nvidia.com/gpu" in limits else {}
        )
        assert known[group["groupName"]] == {
            "max_workers": group["maxReplicas"],
            "resources": offer,
        }


def test_the_jobs_command_is_one_of_smalti() -> None:
    words = [word.strip("'") for word in read("rayjob.yaml")["spec"]["entrypoint"].split()]
    assert words[:3] == ["python", "-m", "smalti"]
    arguments = parse(words[3:])
    assert (arguments.command, arguments.recipe) == ("run", "semhitok-256")
    assert all("=" in override for override in arguments.overrides)
