"""Write what README.md says of the shipped model: the section from its card, so that what is said is what was measured,
and the example, which asks it for a picture of ``tests/images``.

    python -m train.readme

``make adopt`` runs it. The model card, ``train.report``, tells more.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.artifact import ACCURATE, ALSO_SHIPPED, ONNX_INT8, SHIPPED, Artifact
from model.classifier import Classifier
from model.preprocess import preprocess
from model.runtimes import create
from model.tables import between, markdown
from train import command
from train.command import CommandError
from train.data import CIFAR10
from train.report import of_the_same_data
from train.runs import runs
from train.sections import measured, percent

README = Path(__file__).parent.parent / "README.md"
SECTION = re.compile(r"(?<=\n## The shipped model\n\n).*?(?=\n\n## )", re.DOTALL)
EXAMPLE = re.compile(r"(?<=\n)\$ curl -F .+ http://localhost:3000/classify .*\n\{.+\}(?=\n)")
PICTURES = "tests/images"
DIGITS = 6
"""Decimal places of a probability, as the service rounds it."""
NAMED_CLASSES = 20
"""Most classes that are listed by name; more are only counted."""
NOT_MEASURED = "-"


def shipped() -> list[Artifact]:
    """Those in the repository, the default one first."""
    return [Artifact.load(path) for path in (SHIPPED, *ALSO_SHIPPED)]


def example(artifact: Artifact, root: Path = README.parent) -> str:
    """A command for the middle one of the pictures, and what a server on a CPU answers."""
    files = sorted((root / PICTURES).glob("*.jpg"))
    if not files:
        raise CommandError(f"{root / PICTURES}: expected pictures; python -m tests.golden SOURCE")
    file = files[len(files) // 2]
    path = f"{PICTURES}/{file.name}"
    if re.search("[,;]", path):  # where curl would take it apart
        path = '"' + re.sub(r'[\\"]', r"\\\g<0>", path) + '"'
    classifier = Classifier(artifact.config, artifact.reference(ONNX_INT8))
    pixels = preprocess(file.read_bytes(), artifact.config.input_size)
    (told,) = classifier(create(ONNX_INT8, artifact)(pixels[None]))
    name, in_distribution = json.dumps(told.class_name, ensure_ascii=False), json.dumps(told.in_distribution)
    confidence, first = (round(float(value), DIGITS) for value in (told.confidence, told.probabilities[0]))
    return (
        f"$ curl -F {shlex.quote(f'image=@{path}')} http://localhost:3000/classify          # in another terminal\n"
        f'{{"predicted_class":{told.class_index},"class_name":{name},"confidence":{confidence},"all_probabilities":'
        f'{{"0":{first},…}},"in_distribution":{in_distribution},"model":"…","request_id":"…"}}'
    )


def section(artifact: Artifact, *others: Artifact) -> str:
    """Everything below the heading: of the default model, and how those of the ``others`` of the same data compare."""
    alike = of_the_same_data(artifact, list(others))
    parts = [sizes([artifact, *alike]), about(artifact), commands(artifact), accuracy(artifact), *rest(artifact)]
    return "\n\n".join(filter(None, parts))


def sizes(artifacts: list[Artifact]) -> str:
    """The shipped models beside each other, the default one first; nothing for a single one."""
    if len(artifacts) < 2:
        return ""
    rows = []
    for artifact in artifacts:
        metrics, training = artifact.card.get("metrics", {}), artifact.card["training"]
        minutes = sum(run["training_seconds"] for run in runs(training)) / 60
        measures = [
            percent(metrics[name]["accuracy"]) if name in metrics else NOT_MEASURED
            for name in (ONNX_INT8, "robustness", "photographs")
        ]
        measures.append(f"{metrics[ONNX_INT8]['speed']['images_per_s']:,}" if ONNX_INT8 in metrics else NOT_MEASURED)
        about = (f"`{artifact.config.name}`", f"{training['parameters'] / 1e6:.1f} M", f"{minutes:.0f} min")
        rows.append((*about, *measures))
    taught = any("teachers" in run for artifact in artifacts for run in runs(artifact.card["training"]))
    time = "trained for, without teachers" if taught else "trained for"
    head = ("`MODEL`", "parameters", time, "accuracy, INT8", "corrupted", "photographs", "images/s, one core")
    on_gpu = next((f", but on a GPU `{a.config.name}` is" for a in artifacts if a.path == ACCURATE), "")
    return f"The first is the default{on_gpu}; `MODEL` in the environment of `make serve` names one.\n\n" + markdown(
        head, rows
    )


def about(artifact: Artifact) -> str:
    config, training = artifact.config, artifact.card["training"]
    height, width = config.input_size
    names = f" ({', '.join(config.classes)})" if len(config.classes) <= NAMED_CLASSES else ""
    minutes = sum(run["training_seconds"] for run in runs(training)) / 60
    return (
        f"`{config.name}`, a convolutional network of {training['parameters'] / 1e6:.1f} million parameters "
        f"(`model/network.py`),\ntells {len(config.classes)} classes apart on {width}x{height} pixels{names}.\n"
        f"It was trained on {training['images']['train']:,} images of `{training['source']}` in {minutes:.1f} minutes "
        f"(device: {training['device']}):"
    )


def commands(artifact: Artifact) -> str:
    training = artifact.card["training"]
    source, count = training["source"], training["images"]["test"]
    lines = [f"$ {run['command']}" for run in runs(training)]
    official = ", not CIFAR-10's official 10,000" if source.startswith(CIFAR10) and source != CIFAR10 else ""
    note = (
        "These are the commands as they were typed, a record and no recipe: that is `make train`. Accuracy is on the\n"
        f"{count:,} test images of `{source}`{official}."
    )
    return "\n".join(["```console", *lines, "```", "", note])


def accuracy(artifact: Artifact) -> str:
    rows = []
    for name in measured(artifact):
        figures = artifact.card["metrics"][name]
        sets = figures["prediction_sets"]["0.99"]
        scaled = f"{percent(figures['ece_raw'])} → {percent(figures['ece'])}"
        shown = (percent(figures["accuracy"]), between(figures["accuracy_95"]), scaled)
        rows.append((f"`{name}`", *shown, f"{percent(sets['coverage'])}, {sets['size']:.2f}"))
    count = figures["images"]
    scaling = "calibration error (15 bins) raw → scaled"
    return markdown(
        ("runtime", f"accuracy, {count:,} test images", "95 % interval", scaling, "99 % sets: coverage, size"), rows
    )


def rest(artifact: Artifact) -> Iterator[str]:
    agreement = artifact.card["validation"]["agreement"]
    megabytes = sum(file["bytes"] for file in artifact.card["files"].values()) / 1e6
    yield (
        f"INT8 agrees with FP32 on {agreement:.1%} of the validation images. All formats together take "
        f"{megabytes:.1f} MB, for `model.onnx` refers to\nthe weights in `model.safetensors`."
    )
    if rows := list(further(artifact.card["metrics"])):
        yield markdown(("what else was measured, INT8", ""), rows)
    yield (
        "The [model card](docs/model-card.md) has the plots; the card (`GET /model`, or `model/pretrained/card.json`)"
        " has each class,\nthe confusion matrix and the log of every epoch."
    )


def further(metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What only some models were measured for."""
    if foreign := metrics.get("foreign"):
        kinds = ", ".join(f"{name} {kind['auroc']:.3f}, {kind['told']:.0%}" for name, kind in foreign["kinds"].items())
        yield "foreign images: told from test images (AUROC), called foreign by default", kinds
        yield "test images wrongly called foreign", f"{foreign['told_wrongly']:.1%}"
    if corrupted := metrics.get("robustness"):
        families = ", ".join(f"{name} {family['accuracy']:.1%}" for name, family in corrupted["families"].items())
        yield f"corrupted test images (Hendrycks & Dietterich, 2019), n={corrupted['images']:,}", families
    if photographs := metrics.get("photographs"):
        found = f"{photographs['accuracy']:.1%} ({between(photographs['accuracy_95'])})"
        yield f"{photographs['images']:,} photographs of the classes", found


def main() -> None:
    artifacts = shipped()
    text = replaced(README.read_text(), EXAMPLE, example(artifacts[0]), "example with curl and its answer")
    README.write_text(replaced(text, SECTION, section(*artifacts), "section 'The shipped model'"))


def replaced(text: str, pattern: re.Pattern[str], written: str, what: str) -> str:
    text, count = pattern.subn(lambda match: written, text, count=1)
    if not count:
        raise CommandError(f"{README}: no {what}")
    return text


if __name__ == "__main__":
    command.run(main)
