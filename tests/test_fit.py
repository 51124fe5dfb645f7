"""A training run that is killed, interrupted or resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from model.artifact import CONFIG
from tests import toy
from tests.training import begin, train_on
from train import data
from train.command import CommandError
from train.export import load_run
from train.runs import CHECKPOINT, RUN


def test_a_killed_run_resumes_with_the_same_result(toy_folder: Path, toy_run: Path, tmp_path: Path) -> None:
    arguments = [toy_folder, "--name", "toy", "--out", tmp_path, *toy.RECIPE]
    process = subprocess.Popen(
        [sys.executable, "-m", "train.fit", *map(str, arguments)], cwd=toy.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("epoch 2 "):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    printed = toy.run("train.fit", *arguments, "--resume")
    assert "epoch 2 " not in printed
    assert [epoch["epoch"] for epoch in json.loads((tmp_path / RUN).read_text())["history"]] == [1, 2, 3, 4, 5, 6]
    resumed, whole = (load_file(run / CHECKPOINT) for run in (tmp_path, toy_run))
    assert resumed.keys() == whole.keys()
    for name, tensor in whole.items():  # weights and momentum, bit for bit
        assert torch.equal(resumed[name], tensor), name


def test_a_kill_during_validation_loses_no_epoch(
    loaded: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_of_memory(*_: object) -> None:
        raise MemoryError

    killed, resumed, whole = (begin(loaded, tmp_path, epochs=2) for _ in range(3))
    with monkeypatch.context() as patch:
        patch.setattr("train.fit.count_hits", run_out_of_memory)
        with pytest.raises(MemoryError):
            killed.run(tqdm(disable=True))
    resumed.resume()
    assert resumed.epochs_done == 1
    resumed.run(tqdm(disable=True))
    whole.run(tqdm(disable=True))
    for epoch, expected in zip(resumed.history, whole.history, strict=True):
        for figure in ("epoch", "loss", "train_accuracy", "val_accuracy"):
            assert epoch[figure] == pytest.approx(expected[figure], abs=0.05)


def test_interrupting_leaves_a_usable_checkpoint(toy_folder: Path, tmp_path: Path) -> None:
    arguments = [toy_folder, "--name", "toy", "--out", tmp_path, "--epochs", 500, "--widths", "8,32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "train.fit", *map(str, arguments)],
        cwd=toy.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with SIGINT ignored; restore its default.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("epoch 1 "):
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "go on with --resume" in errors
    assert "Traceback" not in errors
    config, network = load_run(tmp_path)
    assert config.classes == toy.CLASSES
    assert float(network.stages[0].reduce[-2].running_mean.abs().sum()) > 0  # the network has seen images


def test_resuming_with_a_different_recipe_is_refused(toy_folder: Path, toy_run: Path) -> None:
    printed = train_on(toy_folder, toy_run, "--epochs", 9, "--resume", code=1)
    assert printed.endswith("its recipe has {'epochs': 6}; expected {'epochs': 9}\n")


def test_resuming_under_a_different_name_is_refused(toy_folder: Path, toy_run: Path) -> None:
    before = (toy_run / CONFIG).read_bytes()
    printed = train_on(toy_folder, toy_run, "--resume", name="other", code=1)
    assert printed.endswith(f"error: {toy_run / CONFIG}: its --name is 'toy'; expected 'other'\n")
    assert (toy_run / CONFIG).read_bytes() == before


def test_a_run_older_than_a_hyperparameter_resumes_with_its_default(loaded: data.Data, tmp_path: Path) -> None:
    fit = begin(loaded, tmp_path)
    tensors, position = fit.state()
    del position["recipe"]["flip"]
    save_file(tensors, tmp_path / CHECKPOINT, metadata={"position": json.dumps(position)})
    fit.resume()
    fit.recipe = fit.recipe.model_copy(update={"flip": 0})
    with pytest.raises(CommandError, match=r"its recipe has {'flip': 1}; expected {'flip': 0}$"):
        fit.resume()


def test_a_run_started_on_a_cpu_resumes_on_a_gpu(loaded: data.Data, tmp_path: Path) -> None:
    """A GPU has a loss scale, which the checkpoint lacks; here a CPU scaler stands in for it."""
    fit = begin(loaded, tmp_path)
    fit.save()
    fit.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fit.resume()
    assert fit.scaler.get_scale() == 1024


def test_unwritable_output_is_one_clear_line(toy_folder: Path) -> None:
    printed = train_on(toy_folder, Path("/dev/null/run"), code=1)
    assert printed.endswith("error: [Errno 20] Not a directory: '/dev/null/run'\n")
