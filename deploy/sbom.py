"""The software bill of materials (SBOM) of an image, as CycloneDX 1.6: `make sbom IMAGE=classifier:cpu`.

Asks the image itself, so that it lists what is inside rather than what was requested: Python packages, Debian packages,
and the models with the SHA-256 of each of their files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

INVENTORY = """
import json, os, subprocess
from importlib import metadata
from pathlib import Path

python = sorted({(d.metadata["Name"], d.version) for d in metadata.distributions()})
listed = subprocess.run(["dpkg-query", "-W", "-f", "${Package} ${Version} ${Architecture}\\n"], capture_output=True)
models = {}
for card in Path(os.environ.get("BENTO_PATH", "."), "models").glob("*/*/card.json"):
    files = json.loads(card.read_bytes())["files"]
    models[f"{card.parts[-3]} {card.parts[-2]}"] = {name: about["sha256"] for name, about in files.items()}
debian = [line.split() for line in listed.stdout.decode().splitlines()]
print(json.dumps({"python": python, "debian": debian, "models": models}))
"""
"""Run by the image's own Python."""


def document(name: str, inventory: dict[str, Any]) -> str:
    """The sorted and validated SBOM of the image ``name``, as JSON; raises ``ValueError`` if it is not CycloneDX."""
    bom = Bom()
    bom.metadata.component = root = Component(name=name, type=ComponentType.CONTAINER)
    for package, version in inventory["python"]:
        bom.components.add(_package("pypi", None, package.lower().replace("_", "-"), version))
    for package, version, architecture in inventory["debian"]:
        bom.components.add(_package("deb", "debian", package, version, arch=architecture))
    for model, files in inventory["models"].items():
        bom.components.add(_model(*model.split(), files=files))
    bom.register_dependency(root, bom.components)
    text = JsonV1Dot6(bom).output_as_string(indent=1)
    if problem := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"the parts list is not CycloneDX: {problem}")
    return text + "\n"


def _package(kind: str, namespace: str | None, name: str, version: str, **qualifiers: str) -> Component:
    purl = PackageURL(kind, namespace, name, version, qualifiers or None)
    return Component(name=name, version=version, type=ComponentType.LIBRARY, purl=purl, bom_ref=str(purl))


def _model(name: str, version: str, *, files: dict[str, str]) -> Component:
    parts = [
        Component(
            name=file,
            type=ComponentType.FILE,
            bom_ref=f"{name}:{version}/{file}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
        )
        for file, digest in files.items()
    ]
    kind = ComponentType.MACHINE_LEARNING_MODEL
    return Component(name=name, version=version, type=kind, components=parts, bom_ref=f"{name}:{version}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    isolated = ("--rm", "--network", "none", "--cap-drop", "ALL", "--entrypoint", "python")
    done = subprocess.run(("docker", "run", *isolated, options.image, "-c", INVENTORY), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {options.image}: {done.stderr.strip()}")
    inventory = json.loads(done.stdout)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(document(options.image, inventory))
    print(f"{options.output}: " + ", ".join(f"{len(parts)} {kind}" for kind, parts in inventory.items()))


if __name__ == "__main__":
    main()
