"""Artifacts in and out of the BentoML model store.

python -m model.store import DIRECTORY     # put an artifact into the store
python -m model.store list
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import bentoml
from bentoml.exceptions import BentoMLException

from model.artifact import CARD, Artifact, ArtifactError

SHIPPED = Path(__file__).parent / "pretrained"
"""The artifact that the repository ships; a built Bento holds it as a model instead."""
BENTO = Path(__file__).parents[2]
"""The Bento that this file was packed in, if it was: there lies a ``bento.yaml``."""


class StoreError(RuntimeError):
    """A model that the store does not hold."""


def put(directory: Path) -> str:
    """Verify the artifact in ``directory`` and copy it into the store; returns its ``name:version``.

    The version follows from the content, so putting the same artifact twice changes nothing.
    """
    artifact = Artifact.load(directory)
    tag = f"{artifact.config.name}:{artifact.version}"
    if _find(tag) is None:
        card = artifact.card
        labels = {"framework": "torch", "classes": str(len(artifact.config.classes))}
        metadata: dict[str, Any] = {
            key: card[key] for key in ("metrics", "training", "git_commit", "versions") if key in card
        }
        try:
            with bentoml.models.create(tag, labels=labels, metadata=metadata) as model:
                artifact.copy_to(Path(model.path))
        except BentoMLException:
            if _find(tag) is None:  # not just another process that put the same content first
                raise
    return tag


def resolve(reference: str) -> str:
    """``name`` or ``name:version`` to the full tag in the store; the shipped artifact is imported when it is missing.

    Without a version the one counts that the Bento was built with; in a checkout, the newest of that name.
    Raises ``StoreError`` naming what the store holds.
    """
    model = _find(_pinned(reference))
    if model is None and (SHIPPED / CARD).exists():
        put(SHIPPED)
        model = _find(_pinned(reference))
    if model is None:
        held = ", ".join(str(m.tag) for m in bentoml.models.list()) or "nothing"
        raise StoreError(f"MODEL={reference!r} is not in the model store; it holds {held}")
    return str(model.tag)


def get(tag: str) -> Artifact:
    """The verified artifact of ``tag``; raises ``StoreError`` or ``ArtifactError``."""
    model = _find(tag)
    if model is None:
        raise StoreError(f"{tag!r} is not in the model store")
    return Artifact.load(Path(model.path))


def _pinned(reference: str) -> str:
    """``reference`` with the version that this file's Bento was built with, where it names none."""
    if ":" in reference or not (BENTO / "bento.yaml").exists():
        return reference
    tags = [model.tag for model in bentoml.Bento.from_path(BENTO).info.all_models]
    return next((str(tag) for tag in tags if tag.name == reference), reference)


def _find(tag: str) -> bentoml.Model | None:
    try:
        return bentoml.models.get(tag)
    except (BentoMLException, ValueError):
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("import").add_argument("directory", type=Path)
    commands.add_parser("list")
    options = parser.parse_args()
    if options.command == "import":
        print(put(options.directory))
        return
    for model in bentoml.models.list():
        print(model.tag, model.info.creation_time.isoformat(timespec="seconds"), model.info.metadata.get("metrics", ""))


if __name__ == "__main__":
    try:
        main()
    except (ArtifactError, StoreError) as error:
        sys.exit(f"error: {error}")
