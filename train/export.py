"""Turn a finished run into an artifact ready to serve; refuse it if INT8 loses too much accuracy.

    python -m train.export runs/flowers SOURCE --out model/pretrained

SOURCE is the data of the run: its training images calibrate INT8 and are the baseline for drift; its validation images
fit the temperature and decide the parity gate. The test images are not touched.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import artifact as files
from model.artifact import ONNX, ONNX_INT8, RUNTIMES, Artifact, Outputs, Reference, save_reference, seal
from model.classifier import Classifier, fit_temperature, verdicts
from model.config import ModelConfig
from model.network import BANK_BATCH, ConvNet, ServedNet
from model.preprocess import Pixels
from model.runtimes import OnnxRuntime, create
from model.statistics import edges
from model.verification import verify
from train import command, runs
from train.command import CommandError
from train.data import Data, Split, batch_of
from train.measure import THREADS, run_runtime
from train.metrics import int8_tolerance, within
from train.to_onnx import write_onnx

CALIBRATION_IMAGES = 1024
REFERENCE_IMAGES = 16
BANK_IMAGES = 512
"""Training images whose features are kept to detect foreign images."""
STATISTICS_IMAGES = 4096
"""Training images behind the drift baseline: quantiles of few are noisy, and ordinary images would seem to drift."""


class ParityError(CommandError):
    """An export whose INT8 form loses too much accuracy against FP32."""


def load_run(run: Path) -> tuple[ModelConfig, ConvNet]:
    """The configuration and the trained network of a run folder, with every matrix rounded to FP16.

    Rounding first gives every format the same weights, and allows the larger ones to be stored in FP16.
    """
    config = ModelConfig.load(run / files.CONFIG)
    network = ConvNet(config).eval()
    network.load_state_dict({name: _round(name, tensor) for name, tensor in runs.read_weights(run).items()})
    return config, network


def _round(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """FP16 for convolutions, head and bank; normalisation (of pixels and batches) keeps its precision."""
    is_matrix = tensor.ndim > 1 and "normalize" not in name
    return tensor.half() if is_matrix else tensor


def add_bank(network: ConvNet, config: ModelConfig, images: Pixels) -> ServedNet:
    """The ``network`` with a bank of the features of some of the training ``images``."""
    banked = evenly_spaced(images, BANK_IMAGES)
    served = ServedNet(config.model_copy(update={"bank": len(banked)})).eval()
    served.network = network
    served.init_bank(torch.from_numpy(banked), batch_of(config.input_size, BANK_BATCH))
    return served


def parity(fp32: Outputs, int8: Outputs, split: Split) -> dict[str, float | int]:
    """Accuracy of both formats and the share on which they agree; raises ``ParityError`` if INT8 loses too much."""
    fp32_verdicts, int8_verdicts = verdicts(fp32), verdicts(int8)
    fp32_accuracy, int8_accuracy = (float((v == split.labels).mean()) for v in (fp32_verdicts, int8_verdicts))
    tolerance = int8_tolerance(len(split))
    if not within(fp32_accuracy - int8_accuracy, tolerance):
        raise ParityError(
            f"INT8 accuracy {int8_accuracy:.4f} on {len(split)} validation images, FP32 {fp32_accuracy:.4f}; "
            f"expected a loss of at most {tolerance:.4f}"
        )
    return {
        "images": len(split),
        "fp32_accuracy": round(fp32_accuracy, 4),
        "int8_accuracy": round(int8_accuracy, 4),
        "agreement": round(float((fp32_verdicts == int8_verdicts).mean()), 4),
    }


def evenly_spaced(images: Pixels, count: int) -> Pixels:
    """``count`` of ``images``, or all if there are fewer, evenly spaced because they are sorted by class."""
    chosen = np.linspace(0, len(images), min(len(images), count), endpoint=False).astype(int)
    return np.asarray(images[chosen])


def git_commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def export(run: Path, source: str, out: Path) -> Artifact:
    """Write the artifact of ``run`` to ``out``, which stays as it was on any error.

    Raises ``CommandError`` for an unfinished run or other data, ``ParityError`` if INT8 loses too much accuracy, and
    ``VerificationError`` if a runtime does not reproduce the reference outputs.
    """
    return write_artifact(out, partial(_write, run, source))


def write_artifact(out: Path, write: Callable[[Path], Artifact]) -> Artifact:
    """Copy to ``out`` what ``write`` puts into an empty folder, once every runtime has been verified."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        sealed = write(Path(folder))
        for name in sealed.runtimes:
            verify(create(name, sealed), sealed.reference(name))
        out.mkdir(exist_ok=True)
        sealed.copy_to(out)
    return Artifact.load(out)


def _write(run: Path, source: str, out: Path) -> Artifact:
    if not (run / runs.RUN).exists():
        raise CommandError(f"{run}: not a finished run, for it has no {runs.RUN}; go on with --resume")
    training = runs.read_record(run)
    config, network = load_run(run)
    data = runs.load_data_of(config, training, source)
    served = add_bank(network, config, data.train.images)
    weights = {name: _round(name, tensor).contiguous() for name, tensor in served.state_dict().items()}
    weights_path, fp32, int8 = (out / files.FILES[runtime] for runtime in RUNTIMES)
    runs.write_weights(weights, weights_path)
    write_onnx(served, fp32, int8, weights_path, calibration_images(data))
    return complete(out, config.model_copy(update={"bank": served.bank.shape[1]}), training, data)


def calibration_images(data: Data) -> Pixels:
    """The images with which INT8 is calibrated."""
    return evenly_spaced(data.train.images, CALIBRATION_IMAGES)


def complete(out: Path, config: ModelConfig, training: dict[str, Any], data: Data) -> Artifact:
    """Add to the graphs in ``out`` what else an artifact holds; raises ``ParityError`` if INT8 loses too much accuracy.

    ``training`` is the record of how the network was trained.
    """
    samples = evenly_spaced(data.val.images, REFERENCE_IMAGES)
    limits = edges(evenly_spaced(data.train.images, STATISTICS_IMAGES))

    def reference(name: str) -> Reference:
        runtime = OnnxRuntime(out / files.FILES[name], name, THREADS)
        return Reference(samples, runtime(samples), run_runtime(runtime, data.val.images), data.val.labels, limits)

    full = reference(ONNX)
    quantised = reference(ONNX_INT8) if (out / files.FILES[ONNX_INT8]).exists() else None
    save_reference(out, full, quantised)
    card = {
        "training": training,
        "validation": parity(full.validation, quantised.validation, data.val) if quantised else {},
        "git_commit": git_commit(),
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "bentoml")},
    }
    temperature = fit_temperature(full.validation, data.val.labels)
    config.model_copy(update={"temperature": temperature}).save(out / files.CONFIG)
    return seal(out, card)


def describe(artifact: Artifact) -> None:
    """Print what was written, and what the number of validation images does not allow."""
    parity_of_int8 = [json.dumps(artifact.card["validation"])] if ONNX_INT8 in artifact.runtimes else []
    print(*parity_of_int8, f"temperature {artifact.config.temperature}")
    classifier = Classifier(artifact.config, artifact.reference(artifact.cpu_runtime))
    for warning in filter(None, (classifier.foreign_warning, classifier.prediction_set_warning)):
        print(warning)
    for name, entry in artifact.card["files"].items():
        print(f"  {name:18} {entry['bytes'] / 1e6:6.2f} MB  sha256 {entry['sha256'][:16]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("source")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    describe(export(options.run, options.source, options.out))


if __name__ == "__main__":
    command.run(main)
