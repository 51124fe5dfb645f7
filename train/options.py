"""What a training run is asked for: the command line, and the configuration that follows from it and the data."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from model.artifact import CONFIG
from model.config import ModelConfig
from train.command import CommandError
from train.data import MIN_SIDE, Data, batch_of
from train.recipe import DEFAULTS, Recipe
from train.runs import read_record

SMALLEST_MAP = 3
"""Minimum side of the last feature map: stages halve the input as often as that allows."""
EPOCH_STEPS = 20
"""Minimum steps per epoch of a chosen batch size, unless that is ``SMALLEST_BATCH``: a single step teaches little."""
SMALLEST_BATCH = 16
"""BatchNorm needs several images."""
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel."""


class Options(NamedTuple):
    """A valid command line."""

    source: str
    name: str
    out: Path
    resume: bool
    start: Path | None
    teachers: tuple[Path, ...]
    size: tuple[int, int] | None
    """Height and width of the network's input; None to choose them from the data."""
    recipe: Recipe
    has_batch_size: bool

    def recipe_for(self, data: Data) -> Recipe:
        """The recipe, with a batch size that suits ``data`` if none was given."""
        if self.has_batch_size:
            return self.recipe
        return self.recipe.model_copy(update={"batch_size": choose_batch_size(len(data.train), data.input_size)})


def parse(about: str | None, arguments: list[str] | None = None) -> Options:
    """Parse and check what can be checked without the data; raises ``CommandError``. ``about`` is the help's text."""
    typed = _parser(about).parse_args(arguments)
    given = {name: value for name in Recipe.model_fields if (value := getattr(typed, name)) is not None}
    recipe = read_recipe(given)
    size = None if typed.size is None else (typed.size, typed.size)
    if typed.like:
        record = read_record(typed.like)
        if "recipe" not in record:
            raise CommandError(
                f"--like {typed.like}: was trained elsewhere, without a recipe; expected one trained here"
            )
        given = record["recipe"] | given
        recipe = read_recipe(given, f"{typed.like}: ")
        size = size or ModelConfig.load(typed.like / CONFIG).input_size
        for option, key in (("start", "start"), ("teacher", "teachers")):
            if key in record and not getattr(typed, option):
                print(f"--like {typed.like}: trained with --{option}, which is not taken over")
    # Checks name, size and widths, with stand-ins for what the data will tell.
    _config(typed.name, ("one", "other"), size or (MIN_SIDE, MIN_SIDE), ((0.0,) * 3, (1.0,) * 3), recipe)
    return Options(
        source=typed.source,
        name=typed.name,
        out=typed.out,
        resume=typed.resume,
        start=typed.start,
        teachers=tuple(typed.teacher),
        size=size,
        recipe=recipe,
        has_batch_size="batch_size" in given,
    )


def _parser(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--name", required=True, help="name of the model in the store")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--start",
        type=Path,
        metavar="RUN",
        help="start from the weights of a run or an artifact, of these classes or others",
    )
    parser.add_argument(
        "--teacher", type=Path, metavar="RUN", action="append", default=[], help="a run or an artifact; repeatable"
    )
    parser.add_argument("--size", type=int, help="side of the network's input in pixels (default: from the data)")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="RUN",
        help="take size and hyperparameters from a run or an artifact; flags given here override them",
    )
    for name, default in DEFAULTS.model_dump().items():
        meaning = Recipe.model_fields[name].description
        parser.add_argument(_flag(name), type=type(default), help=f"{meaning} (default: {default})")
    return parser


def read_recipe(given: dict[str, Any], where: str = "") -> Recipe:
    """The recipe with these values; raises ``CommandError`` with ``where``, the flag, its value and its bound."""
    try:
        return Recipe(**given)
    except ValidationError as error:
        raise _wrong_flag(error, where) from error


def _wrong_flag(error: ValidationError, where: str = "") -> CommandError:
    """One line about the first invalid value."""
    wrong = error.errors()[0]
    return CommandError(f"{where}{_flag(str(wrong['loc'][0]))} {wrong['input']!r}: {wrong['msg']}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_config(name: str, data: Data, recipe: Recipe) -> ModelConfig:
    """Classes, input size and normalisation from the data, and as many stages as the size allows."""
    return _config(name, data.classes, data.input_size, data.channel_statistics(), recipe)


def choose_batch_size(images: int, size: tuple[int, int]) -> int:
    """Batch size for ``images`` training images of ``size`` (height, width)."""
    return max(SMALLEST_BATCH, min(batch_of(size, DEFAULTS.batch_size), images // EPOCH_STEPS))


def _config(
    name: str, classes: tuple[str, ...], size: tuple[int, int], statistics: Statistics, recipe: Recipe
) -> ModelConfig:
    mean, std = statistics
    described = {
        "name": name,
        "classes": classes,
        "input_size": size,
        "mean": mean,
        "std": std,
        "widths": _widths(recipe.widths, min(size)),
        "depth": recipe.depth,
    }
    try:
        return ModelConfig.model_validate(described)
    except ValidationError as error:
        raise _wrong_flag(error) from error


def _widths(given: str, side: int) -> list[int]:
    """Channels of each stage; there are as many stages as can halve ``side`` without falling below ``SMALLEST_MAP``."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given):
        raise CommandError(f"--widths {given!r}; expected numbers of channels such as 64,256")
    if side < 2 * SMALLEST_MAP:
        raise CommandError(f"--size {side}; expected at least {2 * SMALLEST_MAP} pixels")
    stages = 0
    while side >> (stages + 1) >= SMALLEST_MAP:
        stages += 1
    widths = [int(width) for width in given.split(",")]
    return [*widths, *widths[-1:] * stages][:stages]
