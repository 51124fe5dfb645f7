"""Settings that several files of deploy/ repeat agree with each other and with the service's own."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import uvicorn
import yaml

from deploy import smoke
from serving import context
from settings import Settings

DEPLOY = Path(__file__).parents[1] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
GPU: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())
SERVICES = COMPOSE["services"] | {"dcgm-exporter": GPU["services"]["dcgm-exporter"]}


def nginx(name: str, pattern: str) -> str:
    """The single match of ``pattern``'s group in a file of deploy/nginx."""
    (found,) = set(re.findall(pattern, (DEPLOY / "nginx" / name).read_text(), re.MULTILINE))
    return str(found)


def proxy_seconds(directive: str) -> float:
    return float(nginx("snippets/proxy.conf", rf"^{directive} (\d+)s;"))


def default(setting: str) -> Any:
    return Settings.model_fields[setting].default


def test_settings_that_runbooks_change_reach_the_service() -> None:
    pages = "".join(page.read_text() for page in (DEPLOY.parent / "monitoring/runbooks").glob("*.md"))
    asked = {name for name in map(str.upper, Settings.model_fields) if re.search(rf"`{name}\b", pages)}
    asked -= {"MODEL"}  # set when the image is built
    assert {"MAX_PIXELS", "RUNTIME"} < asked
    assert {name: f"${{{name}:-}}" for name in asked - {"WORKERS"}}.items() <= SERVICES["classifier"][
        "environment"
    ].items()


def test_nginx_and_the_service_have_the_same_body_limit() -> None:
    mebibytes = int(nginx("snippets/body.conf", r"^client_max_body_size (\d+)m;"))
    assert mebibytes * 2**20 == default("max_body_bytes")
    assert nginx("snippets/error_form.conf", r"larger than (\d+) MiB") == str(mebibytes)


def test_each_layer_times_out_later_than_the_one_inside_it() -> None:
    advised = float(nginx("snippets/proxy.conf", r"caller, (\d+) s advised"))
    read, retry = proxy_seconds("proxy_read_timeout"), proxy_seconds("proxy_next_upstream_timeout")
    assert advised > retry + read
    assert read > default("request_timeout")
    assert retry < read  # a slow reply is not retried
    assert proxy_seconds("proxy_connect_timeout") < retry


def test_nginx_closes_idle_connections_before_the_service_does() -> None:
    kept = uvicorn.Config("").timeout_keep_alive
    assert int(nginx("snippets/upstream.conf", r"keepalive_timeout (\d+)s;")) < kept


def test_metrics_are_kept_as_long_as_rules_look_back() -> None:
    (kept,) = (
        re.search(r"\$\{METRICS_RETENTION:-(\d+)d\}", argument)[1]
        for argument in SERVICES["prometheus"]["command"]
        if "retention" in argument
    )
    rules = "".join(path.read_text() for path in (DEPLOY.parent / "monitoring/prometheus/rules").glob("*.yml"))
    assert int(kept) > max(map(int, re.findall(r"\[(\d+)d\]", rules)))


def test_nginx_writes_only_where_it_may_and_buffers_bodies_on_disk() -> None:
    """A tmpfs is memory: the bodies of a single address could fill it."""
    written = {
        Path(path)
        for file in (DEPLOY / "nginx").rglob("*.conf")
        for path in re.findall(r"^(?:\w+_temp_path|pid) (.+);", file.read_text(), re.MULTILINE)
    }
    (volume,) = [v.split(":") for v in SERVICES["nginx"]["volumes"] if not v.startswith("$")]
    assert volume[0] in COMPOSE["volumes"]
    assert {path.parent for path in written} == {Path("/tmp"), Path(volume[1])}
    assert Path(nginx("snippets/body.conf", r"^client_body_temp_path (.+);")).parent == Path(volume[1])


def test_draining_ends_before_the_container_is_killed() -> None:
    draining = int(SERVICES["classifier"]["command"][-1])
    assert draining >= default("request_timeout")
    assert int(SERVICES["classifier"]["stop_grace_period"].rstrip("s")) > draining
    assert int(SERVICES["nginx"]["stop_grace_period"].rstrip("s")) > draining


def test_nginx_and_the_service_accept_the_same_request_ids() -> None:
    rule = nginx("snippets/request_id.conf", r'"~\^(.+)\$"')
    assert rule == context._ACCEPTABLE.pattern


def test_ports_and_addresses_agree() -> None:
    port = nginx("snippets/upstream.conf", r"server classifier:(\d+) ")
    assert f":{port}/readyz" in " ".join(SERVICES["classifier"]["healthcheck"]["test"])
    status = nginx("nginx.conf", r"listen (\d+);")
    assert SERVICES["nginx-exporter"]["command"] == [f"--nginx.scrape-uri=http://nginx:{status}/stub_status"]
    inside = {published.rsplit(":", 1)[1] for published in SERVICES["nginx"]["ports"]}
    assert inside == set(re.findall(r"listen (\d+).*default_server", (DEPLOY / "nginx/nginx.conf").read_text()))


@pytest.mark.parametrize("name", SERVICES)
def test_containers_are_hardened(name: str) -> None:
    """What tests/e2e checks in running containers, also for those it cannot start."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == "unless-stopped"
    assert {"cpus", "mem_limit", "pids_limit", "logging", "user", "networks"} <= set(service)
    assert not re.match(r"(0|root)\b", service["user"])
    assert re.search(r":v?\d+\.\d+|\$\{CLASSIFIER_IMAGE", service["image"]), "pinned"
    if "exporter" not in name:
        assert "start_period" in service["healthcheck"]


@pytest.mark.parametrize(
    ("variables", "built"),
    [
        ((), "image-cpu"),
        (("OVERLAYS=gpu",), "image-gpu"),
        (("CLASSIFIER_IMAGE=classifier:cuda",), "image-gpu"),
        (("IMAGE_CPU=classifier:today",), "image-cpu"),
        (("CLASSIFIER_IMAGE=classifier:2026-11-13",), None),
        (("CLASSIFIER_IMAGE=x;touch ran", "OVERLAYS=gpu"), None),
    ],
)
def test_up_builds_only_the_image_it_will_run(variables: tuple[str, ...], built: str | None, tmp_path: Path) -> None:
    """With a Docker that has no images. Even in a dry run, make runs lines with $(MAKE); it prints the others."""
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    kept = {
        name: value for name, value in os.environ.items() if name not in {"CLASSIFIER_IMAGE", "IMAGE_CPU", "IMAGE_GPU"}
    }
    done = subprocess.run(
        ("make", "--no-print-directory", "--dry-run", "up", *variables),
        cwd=DEPLOY.parent,
        env={**kept, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    images = {"image-cpu": "containerize classifier-cpu:latest", "image-gpu": "containerize classifier:latest"}
    assert {name for name, command in images.items() if command in done.stdout} == ({built} if built else set())
    assert (done.returncode == 0) == ("up --detach" in done.stdout) == bool(built)
    if not built:
        name = variables[0].removeprefix("CLASSIFIER_IMAGE=")
        assert done.stderr.splitlines()[0].startswith(f"error: no image {name} here; ")


def test_a_key_file_may_end_in_a_newline(tmp_path: Path) -> None:
    (tmp_path / "api_key").write_text("0123abcd\n")
    assert smoke.api_key(tmp_path) == "0123abcd"
