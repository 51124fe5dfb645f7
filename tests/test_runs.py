"""Finished runs and artifacts that another run builds on: as its start, or as its teachers."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from model.artifact import CONFIG, Artifact
from tests import toy
from tests.training import begin, train_on
from train import data
from train.command import CommandError
from train.fit import Fit
from train.runs import CHECKPOINT, RUN, Trained, read_record, read_weights, write_weights


def begin_from(start: Trained, source: data.Data) -> Fit:
    fit = begin(source, Path("not-written"))
    fit.take_start(start)
    return fit


def given_splits(flat: Path, root: Path) -> data.Data:
    """The images of ``flat`` in other splits: files whose names end in 7 become test images."""
    for path in flat.rglob("*.png"):
        folder = root / ("test" if path.stem.endswith("7") else "train") / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return data.load(str(root))


def test_training_can_start_from_an_artifact(toy_folder: Path, toy_artifact: Artifact, tmp_path: Path) -> None:
    """One epoch at a tiny learning rate keeps what the artifact knew."""
    calm = ("--epochs", 1, "--lr", 1e-6, "--muon-lr", 1e-6, "--low-res", 0)
    train_on(toy_folder, tmp_path, *calm, "--start", toy_artifact.path)
    run = json.loads((tmp_path / RUN).read_text())
    assert run["history"][-1]["val_accuracy"] >= 0.9
    assert run["start"] == toy_artifact.card["training"]


def test_a_start_keeps_its_normalisation(toy_run: Path, tmp_path: Path) -> None:
    """Its filters were learned with it, and the configuration must describe what the weights hold."""
    other = toy.make_folder(tmp_path / "other", per_class=24, seed=1)
    train_on(other, tmp_path / "run", "--epochs", 1, "--start", toy_run)
    before, after = (json.loads((run / CONFIG).read_text()) for run in (toy_run, tmp_path / "run"))
    assert (after["mean"], after["std"]) == (before["mean"], before["std"])
    held = load_file(tmp_path / "run" / CHECKPOINT)
    for name in ("mean", "std"):
        assert torch.allclose(held[f"network.normalize.{name}"].flatten(), torch.tensor(after[name]))


@pytest.mark.parametrize(("zoom", "fresh"), [(1, "head"), (2, "stages.3 and head")])
def test_a_start_of_other_classes_or_smaller_images_gives_the_layers_that_both_have(
    zoom: int, fresh: str, toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = toy.make_folder(tmp_path / "other", seed=1, zoom=zoom)
    (other / "disc").rename(other / "circle")
    start = Trained.read(toy_run)
    fit = begin_from(start, data.load(str(other)))
    assert f"--start {toy_run}: has no weights for {fresh} of this network: they are random" in capsys.readouterr().out
    weights = fit.network.state_dict()
    taken = {name for name, tensor in start.weights.items() if torch.equal(tensor, weights[name])}
    assert taken == start.weights.keys() - {"head.weight"}
    fit._epoch(tqdm(disable=True))


def test_a_start_of_larger_images_gives_its_first_stages(toy_run: Path, tmp_path: Path) -> None:
    other = data.load(str(toy.make_folder(tmp_path / "other", seed=1)), (12, 12))
    fit = begin_from(Trained.read(toy_run), other)
    assert len(fit.config.widths) == 2
    assert torch.equal(
        fit.network.state_dict()["stages.1.reduce.0.weight"].cpu(),
        Trained.read(toy_run).weights["stages.1.reduce.0.weight"],
    )


def test_a_start_with_another_shape_is_one_clear_line(toy_folder: Path, toy_run: Path, tmp_path: Path) -> None:
    printed = train_on(toy_folder, tmp_path, "--widths", "8,16", "--start", toy_run, code=1)
    assert printed.endswith(
        f"error: {toy_run}: a network of widths [8, 32, 32] and depth 2; expected [8, 16, 16] and 2 "
        "(--like takes its recipe)\n"
    )


def test_a_start_trained_on_held_out_images_is_refused(
    loaded: data.Data, toy_folder: Path, toy_run: Path, tmp_path: Path
) -> None:
    other = given_splits(toy_folder, tmp_path)
    seen = {image.tobytes() for image in loaded.train.images}
    val, test = (sum(image.tobytes() in seen for image in split.images) for split in (other.val, other.test))
    assert min(val, test) > 5
    expected = f"{toy_run}: was trained on {val} of the 12 validation images and {test} of the 24 test images of "
    with pytest.raises(CommandError, match=f"{expected}{tmp_path}; expected none of either"):
        begin_from(Trained.read(toy_run), other)


def test_training_can_start_from_a_run_on_a_smaller_version_of_the_folder(
    toy_folder: Path, toy_run: Path, toy_artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grown = shutil.copytree(toy_folder, tmp_path / "grown")
    toy.make_folder(tmp_path / "more", per_class=8, seed=1)
    for path in (tmp_path / "more").rglob("*.png"):
        path.rename(grown / path.parent.name / f"0-{path.name}")
    found = data.load(str(grown))
    run = Trained.read(toy_run)
    assert run.digests
    # A run that starts from this one records the images of both; artifacts keep no such record.
    assert begin_from(run, found).digests == run.digests.union(found.train.digests)
    assert begin_from(Trained.read(toy_artifact.path), found).digests is None
    assert not capsys.readouterr().out


@pytest.mark.parametrize("link", ["run", "start"])
def test_a_start_on_other_data_without_a_record_of_its_images_is_reported(
    link: str, loaded: data.Data, toy_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every run in its ancestry must have held images out by their content."""
    start = Trained.read(toy_artifact.path)
    older = {**start.record, "data_sha256": "0" * 64, "held_out_by_content": False}
    records = {"run": older, "start": {**older, "held_out_by_content": True, "start": older}}
    begin_from(start._replace(record=records[link]), loaded)
    told = capsys.readouterr().out
    assert told.startswith(
        f"--start {start.path}: was trained on other data, folder, and has no record of the images: "
    )


def test_a_student_can_learn_from_teachers_alone(toy_folder: Path, toy_run: Path, tmp_path: Path) -> None:
    """With no weight on the labels, only the teacher's verdicts can have taught it."""
    recipe = ("--epochs", 8, "--batch-size", 32, "--widths", "8,16", "--depth", 2, "--distill", 1)
    toy.run("train.fit", toy_folder, "--name", "student", "--out", tmp_path, *recipe, "--teacher", toy_run)
    run = json.loads((tmp_path / RUN).read_text())
    assert run["history"][-1]["train_accuracy"] > 0.7
    assert run["teachers"][0]["data_sha256"] == run["data_sha256"]
    assert run["parameters"] < run["teachers"][0]["parameters"]


def test_teachers_are_asked_in_turn_and_on_mirrored_images_too(loaded: data.Data, tmp_path: Path) -> None:
    class Teacher(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            asked.append((self.number, "mirrored" if (images == batch.images.flip(2)).all() else "as it is"))
            return torch.zeros(len(images), 3)

    asked: list[tuple[int, str]] = []
    for flip in (1, 0):
        fit = begin(loaded, tmp_path, flip=flip)
        fit.teachers = [Teacher(0), Teacher(1)]  # type: ignore[list-item]  # stand-ins for networks
        for batch in itertools.islice(fit.batches.epoch(0), 4):
            fit.backward(batch)
    turns = [(0, "as it is"), (1, "as it is")]
    assert asked == [*turns, (0, "mirrored"), (1, "mirrored"), *turns, *turns]


def test_a_teacher_trained_on_other_data_is_reported(toy_run: Path, tmp_path: Path) -> None:
    other = toy.make_folder(tmp_path / "other", seed=1)
    printed = train_on(other, tmp_path / "run", "--epochs", 1, "--teacher", toy_run)
    assert f"--teacher {toy_run}: was trained on other data, folder\n" in printed


def test_a_teacher_with_other_classes_is_refused(toy_run: Path, tmp_path: Path) -> None:
    other = toy.make_folder(tmp_path / "other", per_class=24)
    (other / "disc").rename(other / "zebra")
    printed = train_on(other, tmp_path / "run", "--teacher", toy_run, code=1)
    assert "a teacher of ['disc', 'frame', 'stripes']; expected ['frame', 'stripes', 'zebra']" in printed


def test_a_teacher_of_another_size_is_refused(toy_folder: Path, toy_run: Path, tmp_path: Path) -> None:
    printed = train_on(toy_folder, tmp_path, "--teacher", toy_run, "--size", 16, code=1)
    assert f"error: {toy_run}: a teacher of (24, 24) pixels; expected (16, 16)" in printed


@pytest.mark.parametrize("option", ["--start", "--teacher"])
def test_a_run_does_not_resume_without_its_start_or_teacher(
    option: str, toy_folder: Path, toy_run: Path, toy_artifact: Artifact, tmp_path: Path
) -> None:
    """Nor with another network at the same path: the artifact's weights are rounded."""
    common = (toy_folder, tmp_path, "--epochs", 1)
    train_on(*common, option, toy_run)
    train_on(*common, option, toy_run, "--resume")
    printed = train_on(*common, "--resume", code=1)
    assert f"{tmp_path / CHECKPOINT}: on record for {option} are weights " in printed
    assert "; expected none" in printed
    assert f"for {option} are" in train_on(*common, option, toy_artifact.path, "--resume", code=1)


def test_a_checkpoint_without_a_record_of_teachers_resumes_only_without_them(
    loaded: data.Data, toy_run: Path, tmp_path: Path
) -> None:
    fit = begin(loaded, tmp_path)
    tensors, position = fit.state()
    del position["learned_from"]
    save_file(tensors, tmp_path / CHECKPOINT, metadata={"position": json.dumps(position)})
    fit.resume()
    fit.take_teacher(Trained.read(toy_run))
    with pytest.raises(CommandError, match=r"on record for --teacher are weights none; expected [0-9a-f]{12}$"):
        fit.resume()


@pytest.mark.parametrize(("option", "path"), [("--start", "."), ("--teacher", "typo")])
def test_what_is_no_run_and_no_artifact_is_refused_and_leaves_no_run_behind(
    option: str, path: str, toy_folder: Path, tmp_path: Path
) -> None:
    printed = train_on(toy_folder, tmp_path / "run", option, tmp_path / path, code=1)
    assert "expected a finished run, or an artifact trained here" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / CHECKPOINT).exists()


@pytest.mark.parametrize("option", ["--start", "--teacher"])
def test_an_unfinished_run_is_refused_before_the_first_epoch(
    option: str, toy_folder: Path, toy_run: Path, tmp_path: Path
) -> None:
    unfinished = shutil.copytree(toy_run, tmp_path / "unfinished")
    (unfinished / RUN).unlink()
    printed = train_on(toy_folder, tmp_path / "run", option, unfinished, code=1)
    assert f"error: {unfinished}: not finished, for it has neither run.json nor card.json" in printed
    assert "epoch" not in printed


def test_a_damaged_run_is_one_clear_line(toy_run: Path, tmp_path: Path) -> None:
    for name, read in ((RUN, read_record), (CHECKPOINT, read_weights)):
        damaged = shutil.copytree(toy_run, tmp_path / name)
        os.truncate(damaged / name, (damaged / name).stat().st_size // 2)
        with pytest.raises(CommandError, match=f"{damaged / name}: .*; expected whole .*, not a damaged file"):
            read(damaged)


def test_weights_that_cannot_be_written_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"no/weights: .*No such file or directory"):
        write_weights({"a": torch.zeros(1)}, tmp_path / "no" / "weights")
