"""The options of training: what follows from them, what --like copies, and which are refused."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from tests import toy
from train import command, data
from train.command import CommandError
from train.options import build_config, choose_batch_size, parse
from train.recipe import Recipe
from train.runs import RUN


def test_the_network_shape_follows_from_the_data(loaded: data.Data) -> None:
    config = build_config("toy", loaded, Recipe(widths="8,32"))
    assert config.classes == toy.CLASSES
    assert config.widths == (8, 32, 32)  # 24 pixels become 12, 6, 3


@pytest.mark.parametrize(
    ("images", "side", "size"),
    [(47_500, 32, 512), (47_500, 64, 512), (5_000, 64, 250), (50_000, 224, 41), (204, 32, 16), (30, 224, 16)],
)
def test_batches_shrink_with_few_or_large_images(images: int, side: int, size: int) -> None:
    assert choose_batch_size(images, (side, side)) == size


def test_a_given_batch_size_is_kept(loaded: data.Data) -> None:
    typed = ["photos", "--name", "it", "--out", "it"]
    assert parse("", typed).recipe_for(loaded).batch_size == choose_batch_size(len(loaded.train), loaded.input_size)
    assert parse("", [*typed, "--batch-size", "7"]).recipe_for(loaded).batch_size == 7


def test_like_copies_another_networks_recipe(toy_run: Path) -> None:
    typed = ["photos", "--name", "it", "--out", "it", "--like", str(toy_run)]
    like = parse("", typed)
    assert like.recipe == Recipe(**json.loads((toy_run / RUN).read_text())["recipe"]) != Recipe()
    assert (like.size, like.has_batch_size) == ((toy.SIDE, toy.SIDE), True)
    other = parse("", [*typed, "--epochs", "99", "--size", "64", "--batch-size", "7"])
    assert other.recipe == like.recipe.model_copy(update={"epochs": 99, "batch_size": 7})
    assert other.size == (64, 64)


def test_like_reports_what_it_does_not_take_over(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(toy_run, tmp_path / "run")
    record = json.loads((run / RUN).read_text())
    (run / RUN).write_text(json.dumps({**record, "start": record, "teachers": [record]}))
    typed = ["photos", "--name", "it", "--out", "it", "--like", str(run)]
    parse("", typed)
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in told] == [
        f"trained with --{option}, which is not taken over" for option in ("start", "teacher")
    ]
    parse("", [*typed, "--start", str(run), "--teacher", str(run)])
    assert not capsys.readouterr().out


def test_help_describes_each_hyperparameter(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("", ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name, field in Recipe.model_fields.items():
        assert f"{field.description} (default: {field.default})" in told, name


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--name", "Flowers", "--name 'Flowers': String should match pattern"),
        ("--name", "flowers-", "--name 'flowers-': String should match pattern"),  # the store's own message
        ("--name", "f" * 64, f"--name '{'f' * 64}': String should match pattern"),
        ("--depth", 1, "--depth 1: Input should be greater than or equal to 2"),
        ("--size", 4, "--size 4; expected at least 6 pixels"),
        ("--size", 0, "--size 0; expected at least 6 pixels"),
    ],
)
def test_invalid_options_are_one_clear_line_before_the_data_is_read(
    option: str, value: object, expected: str, tmp_path: Path
) -> None:
    options = ("--name", "toy", "--out", tmp_path / "run", option, value)
    printed = toy.run("train.fit", tmp_path / "no-such-source", *options, code=1)
    assert printed.startswith(f"error: {expected}")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", -1.0),
        ("momentum", 1.0),
        ("warmup", 2.0),
        ("label_smoothing", 2.0),
        ("translate", 2.0),
        ("cutout", 2.0),
        ("zoom", -1.0),
        ("corrupt", -1.0),
        ("distill", 5.0),
        ("distill_temperature", 0.0),
        ("lr", float("nan")),
    ],
)
def test_an_out_of_range_hyperparameter_is_one_clear_line(
    name: str, value: float, toy_run: Path, tmp_path: Path
) -> None:
    """Typed, or recorded in the run that --like names."""
    flag, typed = "--" + name.replace("_", "-"), ["photos", "--name", "it", "--out", "it"]
    with pytest.raises(CommandError, match=f"^{flag} {value}: Input should be"):
        parse("", [*typed, flag, str(value)])
    run = shutil.copytree(toy_run, tmp_path / "run")
    record = json.loads((run / RUN).read_text())
    (run / RUN).write_text(json.dumps({**record, "recipe": {**record["recipe"], name: value}}))
    with pytest.raises(CommandError, match=f"{run}: {flag} {value}: Input should be"):
        parse("", [*typed, "--like", str(run)])


@pytest.mark.parametrize("widths", ["", "8,", "8,-1", "eight"])
def test_widths_that_are_not_numbers_are_one_clear_line(loaded: data.Data, widths: str) -> None:
    with pytest.raises(CommandError, match=f"--widths '{widths}'; expected numbers of channels"):
        build_config("toy", loaded, Recipe(widths=widths))


@pytest.mark.parametrize("option", ["--out=", "--out", ""])
def test_local_paths_stay_out_of_the_card(option: str) -> None:
    given, told = {
        "--out=": (["--out=/home/me/x=y/run"], ["--out=run"]),
        "--out": (["--out", "/home/me/run"], ["--out", "run"]),
        "": (["/home/me/a=b/photos"], ["photos"]),
    }[option]
    assert command.public("train.fit", [*given, "--widths", "8,32"]) == shlex.join(
        ["python", "-m", "train.fit", *told, "--widths", "8,32"]
    )
