"""deploy/k8s runs what deploy/compose.yaml runs, under the same rules. `make check-k8s` validates the rest."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import yaml

from settings import Settings
from tests.toy import ROOT

K8S = ROOT / "deploy/k8s"
OTHER_VALUES = {
    "WORKERS",  # Compose runs several workers on one machine, Kubernetes one worker per pod
    "API_KEYS",  # set only in the public overlay
    "AUDIT_DIRECTORY",  # needs a disk that a cluster's administrator must grant: deploy/k8s/README.md
    "FORWARDED_ALLOW_IPS",  # goes with the previous two
    "DRAIN_SECONDS",  # pods are reached without a proxy that would ask again, and others take over
}


def load(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def compose_service(*files: str) -> dict[str, Any]:
    """The service ``classifier`` as the files merge, with the defaults of ${NAME:-default} filled in."""
    merged: dict[str, Any] = {}
    for file in files:
        service = load(file)["services"]["classifier"]
        merged |= service | {"environment": merged.get("environment", {}) | service.get("environment", {})}
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", yaml.safe_dump(merged)))


def pod(path: str = "deploy/k8s/base/deployment.yaml") -> dict[str, Any]:
    return load(path)["spec"]["template"]["spec"]


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


COMPOSE = "deploy/compose.yaml"
CONTAINER = pod()["containers"][0]


def test_both_run_the_same_image_command_and_user() -> None:
    service = compose_service(COMPOSE)
    assert CONTAINER["image"] == service["image"]
    assert CONTAINER["args"] == service["command"]
    user = pod()["securityContext"]
    assert f"{user['runAsUser']}:{user['runAsGroup']}" == service["user"]


def test_both_have_the_same_settings() -> None:
    on_gpu = pod("deploy/k8s/components/gpu/deployment.yaml")["containers"][0]
    for files, containers in (
        ([COMPOSE], [CONTAINER]),
        ([COMPOSE, "deploy/compose.gpu.yaml"], [CONTAINER, on_gpu]),
    ):
        ours = {name: value for container in containers for name, value in environment(container).items()}
        defaults = {name.upper(): str(field.default) for name, field in Settings.model_fields.items()}
        theirs = {
            name: str(value) for name, value in compose_service(*files)["environment"].items() if value is not None
        }
        assert set(ours) | set(theirs) <= set(defaults) | {"BENTOML_HOME", "FORWARDED_ALLOW_IPS"}
        for name in (set(ours) | set(theirs)) - OTHER_VALUES:
            assert ours.get(name, defaults.get(name)) == theirs.get(name, defaults.get(name)), name


def test_both_public_deployments_read_keys_from_the_same_path() -> None:
    container = pod("deploy/k8s/components/keys/deployment.yaml")["containers"][0]
    assert "../../components/keys" in load("deploy/k8s/overlays/production/kustomization.yaml")["components"]
    service = compose_service(COMPOSE)
    assert environment(container)["API_KEYS"] == service["environment"]["API_KEYS"]
    (mount,) = container["volumeMounts"]
    assert f":{mount['mountPath']}:ro" in service["volumes"][0]


def test_neither_gives_the_container_privileges_or_a_disk() -> None:
    service, context = compose_service(COMPOSE), CONTAINER["securityContext"]
    assert service["read_only"]
    assert context["readOnlyRootFilesystem"]
    assert service["cap_drop"] == context["capabilities"]["drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert context["allowPrivilegeEscalation"] is False
    (tmpfs,) = service["tmpfs"]
    (mount,) = CONTAINER["volumeMounts"]
    assert tmpfs.split(":")[0] == mount["mountPath"] == "/tmp"
    assert re.search(r"size=(\d+)m", tmpfs).group(1) + "Mi" == pod()["volumes"][0]["emptyDir"]["sizeLimit"]
    assert service["mem_limit"].upper() + "i" == CONTAINER["resources"]["limits"]["memory"]


def test_both_have_the_same_readiness_probe_and_let_requests_finish() -> None:
    service = compose_service(COMPOSE)
    (port,) = CONTAINER["ports"]
    path = CONTAINER["readinessProbe"]["httpGet"]["path"]
    assert f":{port['containerPort']}{path}" in service["healthcheck"]["test"][-1]
    draining = int(CONTAINER["args"][-1])
    assert seconds(service["stop_grace_period"]) > draining
    leaving = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"] + float(environment(CONTAINER)["DRAIN_SECONDS"])
    assert pod()["terminationGracePeriodSeconds"] > leaving + draining


def test_the_gateway_times_out_later_than_the_service() -> None:
    (rule,) = load("deploy/k8s/overlays/production/http-route.yaml")["spec"]["rules"]
    timeouts = {name: seconds(value) for name, value in rule["timeouts"].items()}
    assert Settings.model_fields["request_timeout"].default < timeouts["backendRequest"] < timeouts["request"]


def test_only_the_services_endpoints_are_public() -> None:
    (rule,) = load("deploy/k8s/overlays/production/http-route.yaml")["spec"]["rules"]
    public = {(match["method"], match["path"]["type"], match["path"]["value"]) for match in rule["matches"]}
    assert public == {
        ("POST", "Exact", "/classify"),
        ("POST", "Exact", "/classify/batch"),
        ("POST", "Exact", "/explain"),
        ("GET", "Exact", "/model"),
        ("GET", "Exact", "/"),
        ("GET", "PathPrefix", "/page"),
    }


def test_both_scrape_the_same_way() -> None:
    jobs = {job["job_name"]: job for job in load("monitoring/prometheus/prometheus.yml")["scrape_configs"]}
    monitor = load("deploy/k8s/components/monitoring/service-monitor.yaml")["spec"]
    service = load("deploy/k8s/components/monitoring/service.yaml")
    assert service["metadata"]["labels"][monitor["jobLabel"]] == "classifier"
    assert monitor["sampleLimit"] == jobs["classifier"]["sample_limit"]
    # The operator would put the port's name where BentoML puts the path.
    (endpoint,) = monitor["endpoints"]
    assert {"action": "labeldrop", "regex": "endpoint"} in endpoint["relabelings"]


def test_the_clusters_rules_are_generated_from_prometheus_rules() -> None:
    """Fails after a change of a rule until `make k8s-rules` is run."""
    written = (K8S / "components/monitoring/prometheus-rule.yaml").read_text()
    command = [sys.executable, K8S / "rules.py"]
    assert written == subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_cluster_has_no_alert_that_every_canary_would_raise() -> None:
    rules = yaml.safe_load_all((K8S / "components/monitoring/prometheus-rule.yaml").read_text())
    groups = [group for rule in rules for group in rule["spec"]["groups"]]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    assert "ClassifierDown" in alerts
    assert "ClassifierReplicasLost" not in alerts


def test_alerts_of_the_cluster_link_to_their_published_runbooks() -> None:
    """They do so without Alertmanager's template, which prepends the address elsewhere."""
    template = (ROOT / "monitoring/alertmanager/templates/classifier.tmpl").read_text()
    (address,) = re.findall(r"https?://[^\s{]+/", template)
    rules = yaml.safe_load_all((K8S / "components/monitoring/prometheus-rule.yaml").read_text())
    alerts = [a for rule in rules for group in rule["spec"]["groups"] for a in group["rules"] if "alert" in a]
    assert alerts
    for alert in alerts:
        assert alert["annotations"]["runbook_url"] == f"{address}monitoring/runbooks/{alert['alert']}.md"


def test_the_kserve_example_runs_the_same_container() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (K8S / "README.md").read_text(), re.DOTALL)
    predictor = yaml.safe_load(block)["spec"]["predictor"]
    (container,) = predictor["containers"]
    for key in ("image", "args", "env"):
        assert container[key] == CONTAINER[key]
    assert predictor["terminationGracePeriodSeconds"] == pod()["terminationGracePeriodSeconds"]
