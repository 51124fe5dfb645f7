"""Put artifacts into the BentoML model store, and choose which version ``MODEL=name`` serves.

python -m model.store import DIRECTORY            # put an artifact into the store
python -m model.store list                        # every version, which ones are served, and the last promotions
python -m model.store compare NAME:A NAME:B       # figures side by side
python -m model.store promote NAME:VERSION        # MODEL=NAME serves it from the next start
python -m model.store rollback NAME               # MODEL=NAME serves the previously promoted version

The first version of a name is promoted on import, later ones only by ``promote``: importing a model does not change
what is served. A version may be shortened to any unambiguous prefix.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bentoml
from bentoml.exceptions import BentoMLException, NotFound

from model import comparison, promotions
from model.artifact import ALSO_SHIPPED, CARD, RUNTIMES, SHIPPED, TORCH, Artifact, ArtifactError
from model.runtimes import create
from model.tables import Row, aligned
from model.verification import verify

BENTO = Path(__file__).parents[2]
"""The Bento that this file is packed in, if it contains a ``bento.yaml``."""
CHECKOUT = Path(__file__).parents[1]
SHOWN_PROMOTIONS = 10
"""How many promotions of each name ``list`` shows."""


class StoreError(RuntimeError):
    """A model that is not in the store, or a promotion that is refused."""


def set_environment() -> None:
    """Set what `make` exports, for commands of ours that run without it: the same store, and no usage statistics.

    Too late for `bentoml serve`, which has chosen its own by the time it imports anything from here.
    """
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    if not _is_packed():
        os.environ.setdefault("BENTOML_HOME", str(CHECKOUT / ".bentoml"))


def put(directory: Path) -> str:
    """Verify the artifact in ``directory`` and copy it into the store; returns its ``name:version``.

    The version is derived from the content, so putting the same artifact twice changes nothing.
    """
    artifact = Artifact.load(directory)
    _record_initial_promotion(artifact.config.name)  # where older versions have none: the newest stays served
    if _find(artifact.tag) is None:
        _create(artifact)
        _record_initial_promotion(artifact.config.name)  # of a new name
    return artifact.tag


def _create(artifact: Artifact) -> None:
    framework = "torch" if TORCH in artifact.runtimes else "onnx"
    labels = {"framework": framework, "classes": str(len(artifact.config.classes))}
    try:
        with bentoml.models.create(artifact.tag, labels=labels, metadata=_card_summary(artifact.card)) as model:
            artifact.copy_to(Path(model.path))
    except BentoMLException:
        if _find(artifact.tag) is None:  # otherwise another process put the same content first
            raise


def _card_summary(card: dict[str, Any]) -> dict[str, Any]:
    """The part of a card that BentoML's listings show.

    BentoML parses it, as YAML in pure Python, whenever it looks up a model: a whole card took a third of the time in
    which the service starts.
    """
    metrics, training = card.get("metrics", {}), card.get("training", {})
    return {
        "metrics": {name: _pick(metrics[name], ("images", "accuracy", "ece")) for name in RUNTIMES if name in metrics},
        "training": _pick(training, ("command", "source", "data_sha256", "parameters")),
        **_pick(card, ("git_commit", "versions")),
    }


def _pick(document: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: document[key] for key in keys if key in document}


def resolve(reference: str) -> str:
    """``name`` or ``name:version`` to the full tag in the store; imports the shipped artifacts if it is missing.

    The version defaults to the one that the Bento was built with or, in a checkout, to the promoted one. Raises
    ``StoreError`` naming what the store holds.
    """
    if _find(_versioned(reference)) is None:
        for directory in (SHIPPED, *ALSO_SHIPPED):
            if (directory / CARD).exists():
                put(directory)
    return str(_require_model(reference).tag)


def resolve_all(references: str) -> list[str]:
    """``resolve`` each of the comma-separated ``references``."""
    return [resolve(reference.strip()) for reference in references.split(",")]


def packed() -> str | None:
    """The comma-separated tags of the models that this file's Bento was built with; None in a checkout."""
    bento = _bento()
    return next((env.value for env in bento.info.envs if env.name == "MODEL"), None) if bento else None


def get(tag: str) -> Artifact:
    """The verified artifact of ``tag``; raises ``StoreError`` or ``ArtifactError``."""
    model = _require_model(tag)
    artifact = Artifact.load(Path(model.path))
    if artifact.tag != str(model.tag):  # if all files were exchanged, so were their hashes
        raise StoreError(f"{model.tag} in the model store holds {artifact.tag}; expected what its name says")
    return artifact


def promote(tag: str, force: bool = False) -> str:
    """Let ``MODEL=name`` serve ``tag`` from its next start; returns its full ``name:version``.

    Unless ``force``, raises ``StoreError`` with every objection to it.
    """
    if ":" not in tag:
        raise StoreError(f"{tag!r} names no version; expected NAME:VERSION")
    model = _require_model(tag)
    if not _is_classifier(model):
        raise StoreError(f"{model.tag} has no {CARD}; expected a classifier")
    name, version = model.tag.name, str(model.tag.version)
    _record_initial_promotion(name)
    served = _promoted(name)
    if version == served:
        return str(model.tag)
    if not force and (objections := "; ".join(_objections(model, f"{name}:{served}"))):
        raise StoreError(f"{model.tag} is not promoted: {objections}")
    promotions.append(_folder(model), "promote", version)
    return str(model.tag)


def _objections(model: bentoml.Model, served: str) -> Iterator[str]:
    """The objections to serving ``model`` instead of ``served``."""
    try:
        candidate = Artifact.load(Path(model.path))
        for runtime in (name for name in candidate.runtimes if name != TORCH):
            verify(create(runtime, candidate), candidate.reference(runtime))
    except Exception as error:  # ONNX Runtime's errors have no common base class
        yield f"it fails its verification: {error}"
        return
    if not comparison.measured(candidate.card):
        yield "its card has no figures; `make evaluate` writes them, and `make store` puts it as a new version"
    try:
        current = get(served)
    except (StoreError, ArtifactError):
        return  # a version that does not load is no loss
    if candidate.config.classes != current.config.classes:
        yield f"its classes are not those of {served}, which clients know"
    yield from comparison.losses(current.card, candidate.card)


def rollback(name: str) -> str:
    """Let ``MODEL=name`` serve the version promoted before the current one; returns its ``name:version``.

    Each further rollback goes one step further back. Raises ``StoreError`` if there is none, or it has left the store.
    """
    standing = promotions.stack(_history(name))
    if len(standing) < 2:
        raise StoreError(f"{name!r} has no earlier promotion to go back to")
    tag = f"{name}:{standing[-2]}"
    get(tag)
    promotions.append(_folder(_require_model(tag)), "rollback", standing[-2])
    return tag


def _versioned(reference: str) -> str:
    """``reference``, completed with the version of this file's Bento or the promoted one if it names none."""
    if ":" in reference:
        return reference
    if bento := _bento():
        for model in bento.info.all_models:
            if model.tag.name == reference:
                return str(model.tag)
    version = _promoted(reference)
    return f"{reference}:{version}" if version else reference


def _bento() -> bentoml.Bento | None:
    return bentoml.Bento.from_path(BENTO) if _is_packed() else None


def _is_packed() -> bool:
    return (BENTO / "bento.yaml").exists()


def _promoted(name: str) -> str | None:
    return next(reversed(promotions.stack(_history(name))), None)


def _history(name: str) -> list[promotions.Promotion]:
    model = _find(name)
    if model is None:
        return []
    try:
        return promotions.read(_folder(model))
    except ValueError as error:
        raise StoreError(f"{_folder(model) / promotions.FILE} is not a history of promotions") from error


def _record_initial_promotion(name: str) -> None:
    """If ``name`` has no promotion on record, record one of the newest version, which ``MODEL=name`` served so far."""
    model = _find(name)
    if model is not None and not _history(name):
        promotions.append(_folder(model), "promote", str(model.tag.version))


def _folder(model: bentoml.Model) -> Path:
    """The folder in which the store keeps all versions of a name."""
    return Path(model.path).parent


def _require_model(reference: str) -> bentoml.Model:
    tag = _versioned(reference)
    model = _find(tag)
    if model is None:
        held = ", ".join(str(m.tag) for m in bentoml.models.list()) or "nothing"
        meant = "" if tag == reference else f" ({tag})"
        raise StoreError(f"{reference!r}{meant} is not in the model store; it holds {held}")
    return model


def _find(tag: str) -> bentoml.Model | None:
    """The model ``tag``, or None if it is not in the store; raises ``StoreError`` for an ambiguous prefix."""
    try:
        return bentoml.models.get(tag)
    except (NotFound, ValueError):
        return None
    except BentoMLException as error:
        raise StoreError(str(error)) from error


def _is_classifier(model: bentoml.Model) -> bool:
    """Whether ``model`` is an artifact of this package: a store may hold other projects' models too."""
    return (Path(model.path) / CARD).exists()


def listing() -> str:
    """A table of every classifier in the store, marking those served, and the last promotions of each name."""
    found = filter(_is_classifier, bentoml.models.list())
    models = sorted(found, key=lambda model: (model.tag.name, model.creation_time))
    served = {name: _versioned(name) for name in dict.fromkeys(model.tag.name for model in models)}
    rows: list[Row] = [("", "model", "created (UTC)", *comparison.SUMMARY, "MB")]
    for model in models:
        mark = "*" if str(model.tag) == served[model.tag.name] else ""
        size = f"{model.file_size / 1e6:.1f}"
        rows.append(
            (mark, str(model.tag), _minute(model.creation_time), *comparison.summary(model.info.metadata), size)
        )
    changes: list[Row] = [
        (_minute(entry.time), entry.action, name, f"{entry.before or '-'} -> {entry.after}")
        for name in served
        for entry in _history(name)[-SHOWN_PROMOTIONS:]
    ]
    return "\n".join([aligned(rows), "* what MODEL=name serves from its next start", "", aligned(changes)])


def _minute(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M}"


def _import(directory: Path) -> None:
    tag = put(directory)
    print(tag)
    if tag != _versioned(tag.partition(":")[0]):
        print(f"in the store, but not served; `make promote MODEL={tag}` changes that", file=sys.stderr)


def _announce(tag: str) -> None:
    print(f"MODEL={tag.partition(':')[0]} serves {tag} from its next start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("import").add_argument("directory", type=Path)
    commands.add_parser("list")
    comparing = commands.add_parser("compare")
    comparing.add_argument("a")
    comparing.add_argument("b")
    promoting = commands.add_parser("promote")
    promoting.add_argument("model", metavar="NAME:VERSION")
    promoting.add_argument("--force", action="store_true", help="whatever speaks against it")
    commands.add_parser("rollback").add_argument("name")
    options = parser.parse_args()
    set_environment()
    run(options)


def run(options: argparse.Namespace) -> None:
    match options.command:
        case "import":
            _import(options.directory)
        case "list":
            print(listing())
        case "compare":
            print(comparison.compare(get(options.a), get(options.b)))
        case "promote":
            _announce(promote(options.model, options.force))
        case "rollback":
            _announce(rollback(options.name))


if __name__ == "__main__":
    try:
        main()
    except (ArtifactError, StoreError, BentoMLException, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
