"""The manifests as a cluster receives them: rendered, then checked against schemas, policies and each other.

make check-k8s          # needs kubectl (its kustomize), Node.js 20 and promtool
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.kubernetes.rendered import (
    DEPLOYED,
    MANIFESTS,
    OVERLAYS,
    RENDERED,
    ROOT,
    Manifest,
    container,
    of_kind,
    only,
    pods,
    run,
)

KUBERNETES = "1.34"
CHECKOV = "checkov==3.3.30"
NODE_MODULES = ROOT / "tests/node/node_modules"
CUSTOM = {  # npm package with the types of each group of custom resources
    "argoproj.io/Application": "argo-cd",
    "argoproj.io/AnalysisTemplate": "argo-rollouts",
    "argoproj.io/Rollout": "argo-rollouts",
    "gateway.networking.k8s.io/HTTPRoute": "gateway-api",
    "keda.sh/ScaledObject": "keda",
    "monitoring.coreos.com/PrometheusRule": "prometheus-operator",
    "monitoring.coreos.com/ServiceMonitor": "prometheus-operator",
}

ON_GPUS = ("gpu", "production-gpu")

every_overlay = pytest.mark.parametrize("overlay", DEPLOYED)


def custom(manifest: Manifest) -> str | None:
    """The package with the schema of a custom resource; None for Kubernetes' own resources."""
    group = manifest["apiVersion"].rpartition("/")[0]
    return CUSTOM.get(f"{group}/{manifest['kind']}")


def as_deployment(manifest: Manifest) -> Manifest:
    """A Rollout's pods as a Deployment, for programs that only know Deployments."""
    if manifest["kind"] != "Rollout":
        return manifest
    kept = ("selector", "template", "minReadySeconds", "revisionHistoryLimit", "progressDeadlineSeconds")
    spec = {name: manifest["spec"][name] for name in kept}
    return {**manifest, "apiVersion": "apps/v1", "kind": "Deployment", "spec": spec}


@every_overlay
def test_built_in_resources_satisfy_their_schemas(overlay: str) -> None:
    for manifest in map(as_deployment, RENDERED[overlay]):
        if not custom(manifest):  # raises for an unknown kind
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", RENDERED)
def test_custom_resources_satisfy_their_schemas(overlay: str, tmp_path: Path) -> None:
    """Types reject unknown fields, validators bad values: each resource becomes a typed, self-validating constant."""
    lines = [line for i, m in enumerate(RENDERED[overlay]) if custom(m) for line in typed(i, m)]
    (tmp_path / "resources.mts").write_text("\n".join(lines))
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    options = ("--ignoreConfig", "--strict", "--skipLibCheck", "--module", "nodenext", "--target", "es2022")
    run(NODE_MODULES / ".bin/tsc", *options, "resources.mts", cwd=tmp_path)
    run("node", "resources.mjs", cwd=tmp_path)


def typed(index: int, manifest: Manifest) -> Iterator[str]:
    kind, path = manifest["kind"], f"@kubernetes-models/{custom(manifest)}/{manifest['apiVersion']}/{manifest['kind']}"
    yield f'import {{ {kind} as Kind{index}, type I{kind} as Type{index} }} from "{path}";'
    yield f"const resource{index}: Type{index} = {json.dumps(manifest)};"
    yield f"new Kind{index}(resource{index}).validate();"


def test_checkov_policies_pass(tmp_path: Path) -> None:
    """Checkov's Kubernetes rules, except those that deploy/k8s/checkov.yaml excuses."""
    for overlay in DEPLOYED:
        (tmp_path / f"{overlay}.yaml").write_text(yaml.safe_dump_all(map(as_deployment, RENDERED[overlay])))
    command = ("uvx", "--quiet", "--from", CHECKOV, "checkov", "--config-file", MANIFESTS / "checkov.yaml")
    found = json.loads(run(*command, "--directory", tmp_path, "--output", "json"))
    assert found["summary"]["failed"] == 0
    assert found["summary"]["passed"] > 240  # checked the pods of each overlay


@every_overlay
def test_selectors_and_references_match_what_they_name(overlay: str) -> None:
    labels = pods(overlay)["metadata"]["labels"].items()
    names = {(m["kind"], m["metadata"]["name"]) for m in RENDERED[overlay]}
    ports = {port["name"] for port in container(overlay)["ports"]}
    for service in of_kind(overlay, "Service"):
        assert service["spec"]["selector"].items() <= labels
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert only(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items() <= labels
    assert ("ServiceAccount", pods(overlay)["spec"]["serviceAccountName"]) in names
    for policy in of_kind(overlay, "NetworkPolicy"):
        assert policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels
        for rule in policy["spec"].get("ingress", []):
            assert {port["port"] for port in rule["ports"]} <= ports
    for route in of_kind(overlay, "HTTPRoute"):
        for backend in (b for rule in route["spec"]["rules"] for b in rule["backendRefs"]):
            assert ("Service", backend["name"]) in names


@every_overlay
def test_everything_lives_in_the_namespace_that_the_rules_expect(overlay: str) -> None:
    assert {m["metadata"]["namespace"] for m in RENDERED[overlay] if m["kind"] != "Namespace"} == {"classifier"}
    assert only(overlay, "Namespace")["metadata"]["name"] == "classifier"


@every_overlay
def test_traffic_is_denied_unless_allowed(overlay: str) -> None:
    policies = {p["metadata"]["name"]: p["spec"] for p in of_kind(overlay, "NetworkPolicy")}
    assert policies.pop("default-deny") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    assert set(policies) == ({"clients"} if overlay == "cpu" else {"clients", "prometheus"})
    assert all(rule["from"] and rule["ports"] for spec in policies.values() for rule in spec["ingress"])


@every_overlay
def test_one_autoscaler_owns_the_replica_count(overlay: str) -> None:
    workload = only(overlay, "Deployment", "Rollout")
    scaler = only(overlay, "HorizontalPodAutoscaler", "ScaledObject")
    target = {"apiVersion": "apps/v1", "kind": "Deployment", **scaler["spec"]["scaleTargetRef"]}
    assert target == {key: workload[key] for key in ("apiVersion", "kind")} | {"name": workload["metadata"]["name"]}
    assert "replicas" not in workload["spec"]


@every_overlay
def test_a_pod_outlives_its_requests(overlay: str) -> None:
    """SIGTERM comes only after the endpoint is removed, and SIGKILL only after clients have left and requests ended."""
    args = container(overlay)["args"]
    finishing = int(args[args.index("--timeout-graceful-shutdown") + 1])
    sleep = container(overlay)["lifecycle"]["preStop"]["sleep"]["seconds"]
    draining = next(int(v["value"]) for v in container(overlay)["env"] if v["name"] == "DRAIN_SECONDS")
    assert draining > 0  # otherwise connections that are in use are closed without notice
    assert sleep + draining + finishing < pods(overlay)["spec"]["terminationGracePeriodSeconds"]


@every_overlay
def test_probes_differ_and_liveness_is_the_most_patient(overlay: str) -> None:
    def patience(name: str) -> int:
        probe = container(overlay)[name]
        return probe["periodSeconds"] * probe["failureThreshold"]

    assert container(overlay)["readinessProbe"]["httpGet"]["path"] == "/readyz"
    # In the runner topology, workers outlive a dead runner; only /readyz asks the runner.
    assert container(overlay)["livenessProbe"]["httpGet"]["path"] == ("/readyz" if overlay in ON_GPUS else "/livez")
    # They also start before it: a startup probe that checks less than the liveness probe passes while CUDA still loads,
    # and then the liveness probe kills the pod.
    for key in ("path", "port"):
        assert container(overlay)["startupProbe"]["httpGet"][key] == container(overlay)["livenessProbe"]["httpGet"][key]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if container(overlay)[probe]["httpGet"]["path"] == "/readyz":  # allows 10 s for the reference images
            assert container(overlay)[probe]["timeoutSeconds"] > 10
    assert patience("readinessProbe") < patience("livenessProbe") < patience("startupProbe")


@every_overlay
def test_autoscaling_thresholds_match_the_hardware(overlay: str) -> None:
    resources = container(overlay)["resources"]["limits"]
    assert ("nvidia.com/gpu" in resources) == (overlay in ON_GPUS)
    for scaler in of_kind(overlay, "ScaledObject"):
        thresholds = {trigger["metadata"]["threshold"] for trigger in scaler["spec"]["triggers"]}
        assert (thresholds == {"256"}) == (overlay in ON_GPUS)
        assert scaler["spec"]["maxReplicaCount"] == (8 if overlay in ON_GPUS else 20)


def test_a_canary_on_gpus_needs_no_second_set_of_gpus() -> None:
    """Otherwise its strategy is the same as on CPUs."""
    on_gpus, on_cpus = (
        only(name, "Rollout")["spec"]["strategy"]["canary"] for name in ("production-gpu", "production")
    )
    assert on_gpus.keys() - on_cpus.keys() == {"dynamicStableScale"}
    assert on_cpus.keys() - on_gpus.keys() == {"abortScaleDownDelaySeconds"}
    assert all(on_gpus[name] == on_cpus[name] for name in on_gpus.keys() & on_cpus.keys())
    assert on_gpus["dynamicStableScale"] is True


def test_every_pod_is_scraped_once_even_if_not_ready() -> None:
    wanted = only("production", "ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
    (service,) = [s for s in of_kind("production", "Service") if wanted <= s["metadata"]["labels"].items()]
    assert service["spec"]["publishNotReadyAddresses"]
    assert service["metadata"]["name"] not in json.dumps(only("production", "Rollout"))


def test_argo_cd_points_at_the_production_overlay() -> None:
    (application,) = RENDERED["argocd"]
    assert (ROOT / application["spec"]["source"]["path"]).samefile(MANIFESTS / "overlays/production")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pinning_an_overlay_sets_its_image_digest(overlay: str, tmp_path: Path) -> None:
    copy = shutil.copytree(MANIFESTS, tmp_path / "k8s")
    image = "registry.example.com:5000/team/classifier@sha256:" + "0123456789abcdef" * 4
    run(sys.executable, copy / "pin.py", overlay, image)
    rendered = yaml.safe_load_all(run("kubectl", "kustomize", copy / "overlays" / overlay))
    (workload,) = [m for m in rendered if m["kind"] in {"Deployment", "Rollout"}]
    assert workload["spec"]["template"]["spec"]["containers"][0]["image"] == image


@pytest.mark.parametrize(
    ("overlay", "image"), [("cpu", "classifier:latest"), ("cpu", "x@sha256:12"), ("none", "x@sha256:" + "0" * 64)]
)
def test_pinning_refuses_a_tag_or_an_unknown_overlay(overlay: str, image: str, tmp_path: Path) -> None:
    copy = shutil.copytree(MANIFESTS, tmp_path / "k8s")
    done = subprocess.run((sys.executable, copy / "pin.py", overlay, image), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
