"""Training in two processes under torchrun gives the same run as in one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.artifact import CONFIG
from tests import first_step, toy
from tests.live import free_port
from train import data
from train.augment import Augmented
from train.command import CommandError
from train.parallel import ALONE, Group
from train.recipe import Recipe
from train.runs import CHECKPOINT, RUN

# --standalone picks a free port; torchrun's default port is fixed.
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)], cwd=toy.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stdout
    assert any(line.startswith(beginning) for line in process.stdout)


def run_in_two(module: str, *arguments: object) -> str:
    """Run a module as torchrun would, but in forks, which need not import torch; returns what the first one printed."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}

    def run(rank: str) -> str:
        return toy.run(module, *arguments, env={**os.environ, **address, "RANK": rank, "LOCAL_RANK": rank})

    with ThreadPoolExecutor(2) as pool:
        first, _ = pool.map(run, "01")
    return first


def finish(process: subprocess.Popen[str], code: int) -> str:
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == code, printed + errors
    return printed + errors


def test_processes_together_see_what_one_would_see(toy_folder: Path) -> None:
    split, recipe = data.load(str(toy_folder)).train, Recipe(batch_size=34, corrupt=1)
    alone, *parts = (
        Augmented(split, recipe, torch.device("cpu"), group).epoch(0)
        for group in (ALONE, Group(0, 3), Group(1, 3), Group(2, 3))
    )
    for whole, *shares in zip(alone, *parts, strict=True):
        assert {len(share.labels) for share in shares} <= {len(whole.labels) // 3, len(whole.labels) // 3 + 1}
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
        assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
        # Colours are changed in floats, whose sums over a smaller batch may round differently.
        assert (torch.cat([share.views for share in shares]).int() - whole.views).abs().max() <= 1
        assert {share.size for share in shares} == {whole.size} == {len(whole.labels)}


def test_a_share_without_images_to_zoom_works(toy_folder: Path) -> None:
    """Images are zoomed by fours: of 16 images in four processes, only the first and the third have some."""
    split, recipe = data.load(str(toy_folder)).train, Recipe(batch_size=16)
    alone, *parts = (
        Augmented(split, recipe, torch.device("cpu"), group).epoch(0)
        for group in (ALONE, *(Group(rank, 4) for rank in range(4)))
    )
    for whole, *shares in zip(alone, *parts, strict=True):
        assert torch.equal(torch.cat([share.images for share in shares]), whole.images)


def test_a_batch_too_small_for_the_processes_is_one_clear_line(toy_folder: Path) -> None:
    split = data.load(str(toy_folder)).train
    expected = f"--batch-size 32 of {len(split)} training images for 17 processes; expected at least"
    with pytest.raises(CommandError, match=expected):
        Augmented(split, Recipe(batch_size=32), torch.device("cpu"), Group(0, 17))


@pytest.fixture(scope="module")
def first_steps(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """What each of the two processes wrote."""
    out = tmp_path_factory.mktemp("steps")
    run_in_two("tests.first_step", toy_folder, out)
    return [load_file(out / f"{rank}.safetensors") for rank in range(2)]


def test_gradients_equal_those_of_one_process_and_all_skip_an_overflow(
    toy_folder: Path, first_steps: list[dict[str, torch.Tensor]]
) -> None:
    first, second = first_steps
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does: sums in bfloat16 depend on it
    expected = first_step.gradients(first_step.build(str(toy_folder), ALONE))
    torch.set_num_threads(threads)
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name])
        # bfloat16 has 8 bits of precision, and each process rounds its own share.
        assert float((first[name] - gradient).norm() / gradient.norm()) < 0.01, name
    for tensors in (first, second):
        assert (float(tensors["scale"]), float(tensors["moved"])) == (512, 0)


def test_running_statistics_are_averaged_after_an_epoch(first_steps: list[dict[str, torch.Tensor]]) -> None:
    first, second = first_steps
    names = [name.removeprefix("averaged.") for name in first if name.startswith("averaged.")]
    assert names
    for name in names:
        alone = [tensors[f"alone.{name}"] for tensors in first_steps]
        assert not torch.equal(*alone), name
        assert torch.equal(first[f"averaged.{name}"], second[f"averaged.{name}"]), name
        assert torch.allclose(first[f"averaged.{name}"], (alone[0] + alone[1]) / 2), name


def test_two_processes_resume_after_a_kill_and_end_where_one_does(
    toy_folder: Path, toy_run: Path, tmp_path: Path
) -> None:
    arguments = ("train.fit", toy_folder, "--name", "toy", "--out", tmp_path, *toy.RECIPE)
    process = start(*arguments)
    wait_for(process, "epoch 2 ")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)  # torchrun then ends the other one
    assert "epoch 6 " not in finish(process, code=1)
    printed = run_in_two(*arguments, "--resume")
    assert [printed.count(f"epoch {n} ") for n in (1, 2, 5, 6)] == [0, 0, 1, 1]
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, CONFIG, RUN}
    two, one = (json.loads((run / RUN).read_text()) for run in (tmp_path, toy_run))
    assert (two["processes"], one["processes"]) == (2, 1)
    assert [epoch["epoch"] for epoch in two["history"]] == [1, 2, 3, 4, 5, 6]
    last, expected = two["history"][-1], one["history"][-1]
    # BatchNorm is noisier over a share of 16 images than over 32: over five seeds, the loss ends 0.05 to 0.09 higher.
    assert last["loss"] == pytest.approx(expected["loss"], abs=0.12)
    assert last["train_accuracy"] == pytest.approx(expected["train_accuracy"], abs=0.1)
    assert last["val_accuracy"] == pytest.approx(expected["val_accuracy"], abs=0.1)


def test_interrupting_two_processes_is_one_clear_line(toy_folder: Path, tmp_path: Path) -> None:
    process = start("train.fit", toy_folder, "--name", "toy", "--out", tmp_path, *toy.RECIPE, "--epochs", 500)
    wait_for(process, "epoch 1 ")
    process.send_signal(signal.SIGINT)  # torchrun passes it on, and then prints a traceback of its own
    printed = finish(process, code=1)
    assert printed.count("go on with --resume") == 1
    assert "train/fit.py" not in printed
    assert (tmp_path / CHECKPOINT).exists()
