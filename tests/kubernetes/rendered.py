"""The manifests of each overlay as kustomize renders them, including production with GPUs."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy/k8s"
OVERLAYS = ("cpu", "gpu", "production")

Manifest = dict[str, Any]


def run(*command: str | Path, **options: Any) -> str:
    """Run a command, check its exit status and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def render(overlay: str, manifests: Path = MANIFESTS) -> list[Manifest]:
    return list(yaml.safe_load_all(run("kubectl", "kustomize", manifests / "overlays" / overlay)))


def on_gpus(overlay: str) -> list[Manifest]:
    """The overlay with the three lines uncommented that its first comment names."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(MANIFESTS, Path(folder) / "k8s")
        file = copy / "overlays" / overlay / "kustomization.yaml"
        text, lines = re.subn(r"^( +)# - ", r"\1- ", file.read_text(), flags=re.MULTILINE)
        assert lines == 3
        file.write_text(text)
        return render(overlay, copy)


RENDERED = {overlay: render(overlay) for overlay in OVERLAYS}
RENDERED["production-gpu"] = on_gpus("production")
DEPLOYED = tuple(RENDERED)
RENDERED["argocd"] = list(yaml.safe_load_all((MANIFESTS / "argocd/application.yaml").read_text()))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    return [m for m in RENDERED[overlay] if m["kind"] in kinds]


def only(overlay: str, *kinds: str) -> Manifest:
    (manifest,) = of_kind(overlay, *kinds)
    return manifest


def pods(overlay: str) -> Manifest:
    """The pod template of the overlay's only workload."""
    return only(overlay, "Deployment", "Rollout")["spec"]["template"]


def container(overlay: str) -> Manifest:
    (found,) = pods(overlay)["spec"]["containers"]
    return found
