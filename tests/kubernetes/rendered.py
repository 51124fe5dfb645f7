"""The manifests of each overlay as kustomize renders them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy/k8s"
OVERLAYS = ("cpu", "gpu", "production")

Manifest = dict[str, Any]


def run(*command: str | Path, **options: Any) -> str:
    """What the command printed, after checking its exit status."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def render(overlay: str) -> list[Manifest]:
    return list(yaml.safe_load_all(run("kubectl", "kustomize", MANIFESTS / "overlays" / overlay)))


RENDERED = {overlay: render(overlay) for overlay in OVERLAYS}
RENDERED["argocd"] = list(yaml.safe_load_all((MANIFESTS / "argocd/application.yaml").read_text()))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    return [m for m in RENDERED[overlay] if m["kind"] in kinds]


def only(overlay: str, *kinds: str) -> Manifest:
    (manifest,) = of_kind(overlay, *kinds)
    return manifest


def pods(overlay: str) -> Manifest:
    """The pod template of the overlay's one workload."""
    return only(overlay, "Deployment", "Rollout")["spec"]["template"]


def container(overlay: str) -> Manifest:
    (found,) = pods(overlay)["spec"]["containers"]
    return found
