"""The model card reports everything that was measured, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from model.artifact import CARD, ONNX, ONNX_INT8, Artifact, seal
from tests import toy
from tests.golden import TYPICAL
from train import plots, readme, sections
from train.command import CommandError
from train.report import about_data, confused_pairs, limits

FOREIGN = {
    "images": 1234,
    "told_wrongly": 0.05,
    "auroc_mean": 0.87,
    "kinds": {"noise": {"images": 500, "auroc": 0.87, "told": 0.104}},
}


@pytest.fixture(scope="module")
def artifact(toy_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A copy of the toy artifact with measured figures."""
    path = shutil.copytree(toy_artifact.path, tmp_path_factory.mktemp("report") / "first")
    folder = toy_artifact.path.parent / "folder"
    toy.run("train.evaluate", path, folder, "--runtime", ONNX, "--runtime", ONNX_INT8)
    toy.run("train.robustness", path, folder, "--images", 12, "--photos", folder)
    return Artifact.load(path)


@pytest.fixture(scope="module")
def folder(toy_artifact: Artifact) -> Path:
    return toy_artifact.path.parent / "folder"


def with_metrics(artifact: Artifact, path: Path, **metrics: Any) -> Artifact:
    shutil.copytree(artifact.path, path)
    return seal(path, {**artifact.card, "metrics": {**artifact.card["metrics"], **metrics}})


def test_the_page_contains_the_figures_of_the_card(artifact: Artifact, folder: Path, tmp_path: Path) -> None:
    toy.run("train.report", artifact.path, folder, "--out", tmp_path / "docs" / "card.md", "--data", "Drawn, CC0.")
    page = (tmp_path / "docs" / "card.md").read_text()
    metrics = artifact.card["metrics"]
    for name in (ONNX, ONNX_INT8):
        low, high = metrics[name]["accuracy_95"]
        speed = metrics[name]["speed"]["images_per_s"]
        assert (
            f"| `{name}` | {metrics[name]['accuracy']:.2%} | {low:.2%} to {high:.2%} | {metrics[name]['images']} |"
            in page
        )
        assert f"| {speed} |" in page
    assert "`torch`" not in page
    for name, figures in metrics["robustness"]["families"].items():
        assert f"| {name} | {figures['accuracy']:.2%} |" in page
    for name, figures in metrics["photographs"]["per_class"].items():
        assert f"| {name} | {figures['accuracy']:.2%} |" in page
    assert artifact.card["training"]["command"] in page
    assert artifact.card["training"]["data_sha256"] in page
    assert artifact.version in page
    assert "Drawn, CC0." in page
    assert "`train.check` found 1 broken files" in page
    sets = metrics[ONNX_INT8]["prediction_sets"]["0.99"]
    assert f"| 99% | {sets['coverage']:.2%} | {sets['size']:.2f} |" in page
    for absent in ("Foreign images", "Accuracy against speed", "CIFAR-10,", str(tmp_path)):
        assert absent not in page


def test_readme_and_model_card_describe_the_shipped_models() -> None:
    """`make adopt` writes both; a page covers one data set."""
    shipped = readme.shipped()
    assert readme.section(*shipped) in readme.README.read_text()
    page = (toy.ROOT / "docs/model-card.md").read_text()
    for artifact in shipped:
        told = artifact.card["training"]["data_sha256"] == shipped[0].card["training"]["data_sha256"]
        assert (f"Version `{artifact.version}`" in page) == told


def test_the_readmes_example_and_section_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_another, text = tmp_path / "README.md", readme.README.read_text()
    for pattern in (readme.EXAMPLE, readme.SECTION):
        assert pattern.search(text)
    stale = text.replace(f"tests/images/{TYPICAL.name}", "tests/images/gone.jpg").replace("95 % interval", "interval")
    of_another.write_text(stale)
    monkeypatch.setattr(readme, "README", of_another)
    readme.main()
    written, shipped = of_another.read_text(), readme.shipped()
    assert readme.example(shipped[0]) in written
    assert readme.section(*shipped) in written
    assert "gone.jpg" not in written
    of_another.write_text(readme.EXAMPLE.sub("", text))
    with pytest.raises(CommandError, match="no example with curl and its answer"):
        readme.main()


def test_a_section_reports_what_was_measured_and_no_more(artifact: Artifact, toy_artifact: Artifact) -> None:
    told = readme.section(artifact)
    figures, test = artifact.card["metrics"][ONNX_INT8], artifact.card["training"]["images"]["test"]
    assert f" | {figures['accuracy']:.2%} ({figures['accuracy_95'][0]:.2%} to " in told
    assert f"of `folder`, measured in INT8 on its {test} test images." in " ".join(told.split())
    assert "default" not in told, "of one"
    assert readme.section(toy_artifact).splitlines()[-4].endswith(" | - | - | - | - | - |")


def test_missing_figures_leave_empty_cells_beside_other_models(
    artifact: Artifact, toy_artifact: Artifact, tmp_path: Path
) -> None:
    few = seal(shutil.copytree(artifact.path, tmp_path / "few"), {**artifact.card, "metrics": {}})
    rows = readme.table([artifact, few]).splitlines()
    assert rows[-1].endswith(" | - | - | - | - | - |")
    assert "| trained for |" in rows[0]
    record = {**artifact.card["training"], "teachers": [toy_artifact.card["training"]]}
    taught = seal(few.path, {**few.card, "training": record})
    assert "| trained for, without teachers |" in readme.table([artifact, taught])
    assert "The first is the default. `MODEL=NAME make serve` serves another." in readme.section(artifact, few)


@pytest.mark.filterwarnings("error")
def test_class_names_that_the_font_lacks_become_numbers(tmp_path: Path) -> None:
    classes = ("cat", "\u732b", "Gr\u00f6\u00dfe", "$x^$")
    assert plots.drawable(classes) == ["cat", "class 1", "Gr\u00f6\u00dfe", r"\$x^\$"]
    plots.save(plots.confusion(np.eye(4, dtype=int).tolist(), classes), tmp_path / "confusion.png")
    shown = [(np.zeros((8, 8, 3), np.uint8), f"{name} 0.90") for name in plots.drawable(classes)]
    plots.save(plots.mistakes({plots.drawable(classes)[3]: shown}), tmp_path / "mistakes.png")


def test_the_confusion_matrix_of_many_classes_shows_indices() -> None:
    few, many = (
        plots.confusion(np.eye(count, dtype=int).tolist(), [f"kind {number}" for number in range(count)])
        for count in (50, 1000)
    )
    assert [label.get_text() for label in few.axes[0].get_xticklabels()][:2] == ["kind 0", "kind 1"]
    assert len(many.axes[0].get_xticks()) < 20
    assert many.axes[0].get_xlabel() == "index of the predicted class"


def test_captions_of_long_class_names_do_not_overlap() -> None:
    name = "n00000147_a_rather_long_class_name_of_a_bird_species"
    figure = plots.mistakes({name: [(np.zeros((8, 8, 3), np.uint8), f"{name} 0.90")] * 4})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    captions = [axes.title.get_window_extent(canvas.get_renderer()) for axes in figure.axes]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(captions))


def test_of_many_classes_the_weakest_are_told() -> None:
    counts = np.eye(1000, dtype=int) * 4
    counts[7, 7:9] = 1, 3
    figures = {"confusion": counts.tolist(), "per_class": {f"kind {number}": 0.5 for number in range(1000)}}
    title, _, _, _, first, *others = sections.per_class(ONNX_INT8, figures).splitlines()
    assert title == "The 20 of 1000 classes that are found least, with `onnx-int8`; `card.json` has all:"
    assert first == "| kind 7 | 25.00% | 4.56% to 69.94% | 4 | 100.00% |"
    assert len(others) == 19


@pytest.mark.parametrize(("source", "told"), [("cifar10-jpeg.tar.gz", True), ("cifar10", True), ("cifar100", False)])
def test_the_origin_of_the_data_is_recognised_by_its_full_name_only(
    artifact: Artifact, source: str, told: bool
) -> None:
    training = {**artifact.card["training"], "source": source}
    about = about_data(dataclasses.replace(artifact, card={**artifact.card, "training": training}), "")
    assert ("Tiny Images" in about) is told


def test_speeds_name_their_device() -> None:
    gpu = {"images_per_s": 90000, "batch": 8, "gpu": "NVIDIA H200"}
    assert sections.rate(gpu) == "90000 (NVIDIA H200)"
    assert sections.speed({"speed": gpu}) == "; the speed is of batches of 8 on NVIDIA H200"
    cpu = {"images_per_s": 900, "batch": 8, "threads": 1, "cpu": "EPYC"}
    assert sections.rate(cpu) == "900"
    assert sections.speed({"speed": cpu}) == "; the speed is of batches of 8 on one core, EPYC"


def test_only_models_trained_on_the_same_data_share_a_page(artifact: Artifact, folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(artifact.path, tmp_path / "other")
    other = seal(path, {**artifact.card, "training": {**artifact.card["training"], "data_sha256": "0" * 64}})
    printed = toy.run("train.report", artifact.path, path, folder, "--out", tmp_path / "card.md")
    assert f"{path}: left out, for it was trained on other data than {artifact.path}\n" in printed
    page = (tmp_path / "card.md").read_text()
    assert artifact.version in page
    assert other.version not in page
    printed = toy.run("train.report", path, artifact.path, folder, "--out", tmp_path / "card.md", code=1)
    assert "not the data of the training" in printed


def test_every_linked_picture_exists_and_is_small(artifact: Artifact, folder: Path, tmp_path: Path) -> None:
    toy.run("train.report", artifact.path, folder, "--out", tmp_path / "card.md")
    linked = set(re.findall(r"!\[.+\]\((.+)\)", (tmp_path / "card.md").read_text()))
    assert {"images/toy-reliability.png", "images/toy-confusion.png", "images/toy-corruptions.png"} <= linked
    assert linked == {f"images/{path.name}" for path in (tmp_path / "images").iterdir()}
    for link in linked:
        assert (tmp_path / link).stat().st_size < 100_000
        with Image.open(tmp_path / link) as image:
            assert min(image.size) > 100


def test_sections_appear_with_their_figures(artifact: Artifact, folder: Path, tmp_path: Path) -> None:
    first = with_metrics(
        artifact,
        tmp_path / "fast",
        foreign=FOREIGN,
    )
    second = with_metrics(artifact, tmp_path / "accurate")
    card = (second.path / CARD).read_text()
    (tmp_path / "tiny.json").write_text(card)
    (tmp_path / "stranger.json").write_text(card.replace(artifact.card["training"]["data_sha256"], "of other data"))
    also = (tmp_path / "tiny.json", tmp_path / "stranger.json")
    toy.run("train.report", first.path, second.path, folder, "--out", tmp_path / "card.md", "--also", *also)
    page = (tmp_path / "card.md").read_text()
    assert "| noise | 500 | 0.870 | 10.4% |" in page
    assert page.index("## Accuracy against speed") < page.index("## fast") < page.index("## accurate")
    # Two copies of one model: the same accuracy, at twice the time per image.
    figures = artifact.card["metrics"][ONNX_INT8]
    rate = round(1 / (2 / figures["speed"]["images_per_s"]))
    assert f"| fast + accurate (speed derived) | {figures['accuracy']:.2%} | {rate} |" in page
    assert "| tiny (not shipped) |" in page
    assert "## tiny" not in page
    assert "stranger" not in page
    assert (tmp_path / "images" / "frontier.png").exists()
    assert (tmp_path / "images" / "accurate-reliability.png").exists()


def test_an_artifact_without_figures_is_one_clear_line(toy_artifact: Artifact, folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(toy_artifact.path, tmp_path / "bare")
    seal(path, {key: value for key, value in toy_artifact.card.items() if key != "metrics"})
    printed = toy.run("train.report", path, folder, "--out", tmp_path / "card.md", code=1)
    assert printed == f"error: {path}: its card has no figures; run python -m train.evaluate first\n"
    assert not (tmp_path / "card.md").exists()


def test_confused_pairs_are_the_largest_off_the_diagonal() -> None:
    figures = {"confusion": [[90, 7, 3], [0, 100, 0], [9, 0, 91]]}
    assert confused_pairs(figures, ("a", "b", "c")) == [
        "c taken for a (9 of 100)",
        "a taken for b (7 of 100)",
        "a taken for c (3 of 100)",
    ]


def test_the_weakest_class_has_the_same_figure_in_table_and_limits(artifact: Artifact, tmp_path: Path) -> None:
    """641 of 800 is 80.125 %, which becomes 80.13 % if rounded twice."""
    figures = {**artifact.card["metrics"][ONNX_INT8], "confusion": [[641, 159, 0], [0, 800, 0], [0, 0, 800]]}
    figures["per_class"] = dict.fromkeys(toy.CLASSES, 1.0) | {toy.CLASSES[0]: 0.8013}
    told = with_metrics(artifact, tmp_path / "it", **{ONNX_INT8: figures})
    assert f"Weakest class: {toy.CLASSES[0]}, 80.12% found." in limits(told)[0]
    assert f"| {toy.CLASSES[0]} | 80.12% |" in sections.per_class(ONNX_INT8, figures)


def test_foreign_images_are_reported_by_kind_with_a_warning_if_validation_images_are_few(
    artifact: Artifact, tmp_path: Path
) -> None:
    told = sections.foreign(with_metrics(artifact, tmp_path / "it", foreign=FOREIGN))
    assert told.endswith("| noise | 500 | 0.870 | 10.4% |")
    assert "Of 1,234 test images 5.0% are called foreign by default (10 validation images: in_dist" in told
    assert sections.foreign(artifact) == ""
