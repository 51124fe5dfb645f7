"""Write two parts of README.md: the section about the shipped models, from the figures in their cards, and the example
with curl, which classifies a picture of ``tests/images``.

    python -m train.readme

``make adopt`` runs it. ``train.report`` writes the model card, which has more.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from textwrap import fill

from model.artifact import ACCURATE, ALSO_SHIPPED, ONNX_INT8, SHIPPED, Artifact
from model.classifier import Classifier
from model.preprocess import preprocess
from model.runtimes import create
from model.tables import NAMED_CLASSES, markdown, with_interval
from train import command
from train.command import CommandError
from train.data import CIFAR10, is_part_of
from train.report import of_the_same_data
from train.runs import runs
from train.sections import percent

README = Path(__file__).parent.parent / "README.md"
SECTION = re.compile(r"(?<=\n## The shipped model\n\n).*?(?=\n\n## )", re.DOTALL)
EXAMPLE = re.compile(r"(?<=\n)\$ curl -F .+ http://localhost:3000/classify .*\n\{.+\}(?=\n)")
PICTURES = "tests/images"
NOT_MEASURED = "-"
MORE = """The [model card](docs/model-card.md) has the rest: formats, classes, corruptions, calibration, prediction
sets, foreign images, mistakes, limits, and the training commands."""
WIDTH = 120


def shipped() -> list[Artifact]:
    """The artifacts in the repository, the default one first."""
    return [Artifact.load(path) for path in (SHIPPED, *ALSO_SHIPPED)]


def example(artifact: Artifact, root: Path = README.parent) -> str:
    """A command that classifies the middle one of the pictures, and what a server on a CPU answers."""
    files = sorted((root / PICTURES).glob("*.jpg"))
    if not files:
        raise CommandError(f"{root / PICTURES}: expected pictures; python -m tests.golden SOURCE")
    file = files[len(files) // 2]
    path = f"{PICTURES}/{file.name}"
    if re.search("[,;]", path):  # where curl would take it apart
        path = '"' + re.sub(r'[\\"]', r"\\\g<0>", path) + '"'
    classifier = Classifier(artifact.config, artifact.reference(ONNX_INT8))
    pixels = preprocess(file.read_bytes(), artifact.config.input_size)
    (verdict,) = classifier(create(ONNX_INT8, artifact)(pixels[None]))
    name, in_distribution = json.dumps(verdict.class_name, ensure_ascii=False), json.dumps(verdict.in_distribution)
    return (
        f"$ curl -F {shlex.quote(f'image=@{path}')} http://localhost:3000/classify          # in another terminal\n"
        f'{{"predicted_class":{verdict.class_index},"class_name":{name},"confidence":{verdict.confidence},"all_probabilities":'
        f'{{"0":{verdict.rounded[0]},…}},"in_distribution":{in_distribution},"model":"…","request_id":"…"}}'
    )


def section(artifact: Artifact, *others: Artifact) -> str:
    """Everything below the heading: the default model, beside it those of the ``others`` that share its data."""
    artifacts = [artifact, *of_the_same_data(artifact, list(others))]
    return "\n\n".join([about(artifacts), table(artifacts), MORE])


def about(artifacts: list[Artifact]) -> str:
    config, training = artifacts[0].config, artifacts[0].card["training"]
    height, width = config.input_size
    names = f" ({', '.join(config.classes)})" if len(config.classes) <= NAMED_CLASSES else ""
    source = training["source"]
    official = ", not CIFAR-10's official 10,000" if is_part_of(source, CIFAR10) and source != CIFAR10 else ""
    what = "A convolutional network tells" if len(artifacts) == 1 else "Convolutional networks tell"
    on_gpu = next((f" on a CPU, `{a.config.name}` on a GPU" for a in artifacts if a.path == ACCURATE), "")
    choice = f" The first is the default{on_gpu}. `MODEL=NAME make serve` serves another."
    text = (
        f"{what} {len(config.classes)} classes apart on {width}x{height} pixels{names}. "
        f"Trained on {training['images']['train']:,} images of `{source}`, measured in INT8 on its "
        f"{training['images']['test']:,} test images{official}.{choice if artifacts[1:] else ''}"
    )
    return fill(text, WIDTH)


def table(artifacts: list[Artifact]) -> str:
    """A table of the shipped models, the default one first."""
    taught = any("teachers" in run for artifact in artifacts for run in runs(artifact.card["training"]))
    time = "trained for, without teachers" if taught else "trained for"
    figures = ("accuracy (95 % interval)", "ECE", "corrupted", "photographs", "images/s, one core")
    return markdown(("`MODEL`", "parameters", time, *figures), map(row, artifacts))


def row(artifact: Artifact) -> list[str]:
    metrics, training = artifact.metrics, artifact.card["training"]
    minutes = sum(run["training_seconds"] for run in runs(training)) / 60
    accuracy = ece = speed = NOT_MEASURED
    if figures := metrics.get(ONNX_INT8):
        accuracy, ece = with_interval(figures), percent(figures["ece"])
        speed = f"{figures['speed']['images_per_s']:,}"
    others = [percent(metrics[n]["accuracy"]) if n in metrics else NOT_MEASURED for n in ("robustness", "photographs")]
    cells = [f"`{artifact.config.name}`", f"{training['parameters'] / 1e6:.1f} M", f"{minutes:.0f} min"]
    return [*cells, accuracy, ece, *others, speed]


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
