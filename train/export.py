"""Turn a finished run into an artifact ready to serve; refuse it if INT8 loses too much accuracy.

    python -m train.export runs/flowers SOURCE --out model/pretrained

SOURCE is the data of the run: its training images calibrate INT8 and are the baseline for drift; its validation images
fit the temperature and decide the parity gate. The test images are not touched.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.numpy import load_file
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from model import artifact as files
from model.artifact import ONNX, ONNX_INT8, RUNTIMES, Artifact, Outputs, Reference, save_reference, seal
from model.classifier import Classifier, fit_temperature, verdicts
from model.config import ModelConfig
from model.network import BANK_BATCH, ConvNet, ConvNorm, Normalize, ServedNet
from model.preprocess import Pixels
from model.runtimes import OnnxRuntime, create
from model.statistics import edges
from model.verification import verify
from train import command, runs
from train.command import CommandError
from train.data import Data, DataError, Split, batch_of
from train.measure import run_runtime
from train.metrics import int8_tolerance, within

CALIBRATION_IMAGES = 1024
REFERENCE_IMAGES = 16
BANK_IMAGES = 512
"""Training images whose features are kept to detect foreign images."""
STATISTICS_IMAGES = 4096
"""Training images behind the drift baseline: quantiles of few are noisy, and ordinary images would seem to drift."""
BATCH = 250
LARGE_CONSTANT = 1024
"""Least number of elements for which a constant is worth storing in FP16."""
OPSET = 18


class ParityError(CommandError):
    """An export whose INT8 form loses too much accuracy against FP32."""


def load_run(run: Path) -> tuple[ModelConfig, ConvNet]:
    """The configuration and the trained network of a run folder, with every matrix rounded to FP16.

    Rounding first gives every format the same weights, and allows the larger ones to be stored in FP16.
    """
    config = ModelConfig.load(run / files.CONFIG)
    network = ConvNet(config).eval()
    state = runs.read_weights(run)
    network.load_state_dict(
        {name: _round(name, tensor).float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    )
    return config, network


def _round(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """FP16 for convolutions, head and bank; normalisation (of pixels and batches) keeps its precision."""
    is_matrix = tensor.ndim > 1 and "normalize" not in name
    return tensor.half() if is_matrix else tensor


class Folded(nn.Module):
    """The network for inference: normalisation and BatchNorm folded into the convolutions.

    A maximum commutes with a per-channel affine map of positive slope, so a BatchNorm after max pooling folds as well.
    """

    def __init__(self, served: ServedNet) -> None:
        super().__init__()
        self.served = copy.deepcopy(served)
        self.network = self.served.network
        self.whiten = _fold_normalize(self.network.whiten, self.network.normalize)
        for stage in self.network.stages.children():
            for name, block in [*stage.named_modules()]:
                if isinstance(block, ConvNorm):
                    stage.set_submodule(name, _fold_norm(block))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.network.feature_maps(self.whiten(images.permute(0, 3, 1, 2).float()))
        return self.served.outputs(maps), self.served.evidence(maps)


def _fold_normalize(conv: nn.Conv2d, normalize: Normalize) -> nn.Conv2d:
    """conv((x - mean) / std) as one convolution of raw pixels; exact, because the stem has no padding."""
    folded = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size)  # type: ignore[arg-type]
    with torch.no_grad():
        weight = conv.weight / normalize.std
        folded.weight.copy_(weight)
        folded.bias.copy_(conv.bias - (weight * normalize.mean).sum(dim=(1, 2, 3)))  # type: ignore[union-attr, operator]
    return folded


def _fold_norm(block: ConvNorm) -> nn.Sequential:
    conv, *pool, norm, relu = block
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    if pool and bool((norm.weight <= 0).any()):
        return block
    folded = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)  # type: ignore[arg-type]
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    folded.weight, folded.bias = weight, bias
    return nn.Sequential(folded, relu, *pool)


def export_onnx(served: ServedNet, config: ModelConfig, path: Path) -> None:
    """Write the FP32 graph: ``images`` (N, H, W, 3) uint8 to ``outputs`` (N, K + 1) and ``evidence`` (N, h, w, K)."""
    example = torch.zeros((2, *config.input_size, 3), dtype=torch.uint8)
    program = torch.onnx.export(
        Folded(served).eval(),
        (example,),
        input_names=["images"],
        output_names=["outputs", "evidence"],
        dynamic_shapes={"images": {0: torch.export.Dim("N")}},
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(path)


def store_half(path: Path, weights: Path | None = None) -> None:
    """Rewrite the large constants of an ONNX file as FP16 behind a Cast, which engines fold away when they load it.

    Constants that equal a tensor of ``weights``, a safetensors file beside it, with each row scaled by a factor (from
    folding BatchNorm) are not stored again: the file refers to that tensor.
    """
    model = onnx.load(path)
    shared = Shared(weights) if weights else None
    nodes = []
    for constant in model.graph.initializer:
        # The stem is small and stays FP32: it sees raw pixels, on which FP16 weights would lose a hundred times more.
        if constant.data_type != TensorProto.FLOAT or math.prod(constant.dims) < LARGE_CONSTANT:
            continue
        name, key = constant.name, constant.name.removeprefix("served.")
        values = numpy_helper.to_array(constant)
        half, full = name + "_fp16", name + "_fp32"
        if shared and (factors := shared.factors(key, values)) is not None:
            shared.refer(constant, half, key)
            model.graph.initializer.append(numpy_helper.from_array(factors, name + "_factors"))
            nodes += [
                helper.make_node("Cast", [half], [full], to=TensorProto.FLOAT),
                helper.make_node("Mul", [full, name + "_factors"], [name]),
            ]
        else:
            constant.CopyFrom(numpy_helper.from_array(values.astype(np.float16), half))
            nodes.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
    nodes += model.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


class Shared:
    """A safetensors file as external data of ONNX: it stores its tensors as plain little-endian rows."""

    def __init__(self, path: Path) -> None:
        self._path, self._tensors = path, load_file(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header, self._start = json.loads(file.read(length)), 8 + length

    def factors(self, key: str, values: NDArray[np.float32]) -> NDArray[np.float32] | None:
        """The factor of each row by which the tensor ``key`` becomes ``values``; None if there is no such factor."""
        tensor = self._tensors.get(key)
        if tensor is None or tensor.shape != values.shape:
            return None
        rows, stored = values.reshape(len(values), -1), tensor.reshape(len(values), -1).astype(np.float32)
        factors = (rows * stored).sum(axis=1) / np.maximum((stored**2).sum(axis=1), 1e-12)
        if not np.allclose(factors[:, None] * stored, rows, rtol=1e-3, atol=1e-5):
            return None
        return np.asarray(factors.reshape(-1, *[1] * (values.ndim - 1)), np.float32)

    def refer(self, constant: TensorProto, name: str, key: str) -> None:
        """Turn ``constant`` into an FP16 tensor called ``name`` with the content of the tensor ``key``."""
        begin, end = self._header[key]["data_offsets"]
        dims = [*constant.dims]
        constant.Clear()
        constant.name, constant.data_type, constant.data_location = name, TensorProto.FLOAT16, TensorProto.EXTERNAL
        constant.dims.extend(dims)
        place = {"location": self._path.name, "offset": str(self._start + begin), "length": str(end - begin)}
        for field, value in place.items():
            entry = constant.external_data.add()
            entry.key, entry.value = field, value


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    """Feeds training images to the quantiser in batches."""

    def __init__(self, images: Pixels) -> None:
        self._batches: Iterator[Pixels] = iter(
            np.array_split(images, math.ceil(len(images) / batch_of(images.shape[1:3], BATCH)))
        )

    def get_next(self) -> dict[str, Pixels] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch}


def quantize(source: Path, target: Path, images: Pixels) -> None:
    """Static INT8: 8-bit activations, per-channel 7-bit weights, the first and the last layer left in FP32.

    Weights have seven bits because processors without VNNI add pairs of products in 16 bits, which would saturate: this
    way the artifact gives the same answer on every x86. The stem stays FP32 because whitening subtracts nearly equal
    pixels.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        stem = next(node.name for node in onnx.load(prepared).graph.node if node.op_type == "Conv")
        quantize_static(
            prepared,
            target,
            Calibration(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Relu", "Add", "MaxPool"],
            nodes_to_exclude=[stem],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
        )


def parity(fp32: Outputs, int8: Outputs, split: Split) -> dict[str, float | int]:
    """Accuracy of both formats and the share on which they agree; raises ``ParityError`` if INT8 loses too much."""
    said = verdicts(fp32), verdicts(int8)
    accuracies = [float((v == split.labels).mean()) for v in said]
    tolerance = int8_tolerance(len(split))
    if not within(accuracies[0] - accuracies[1], tolerance):
        raise ParityError(
            f"INT8 accuracy {accuracies[1]:.4f} on {len(split)} validation images, FP32 {accuracies[0]:.4f}; "
            f"expected a loss of at most {tolerance:.4f}"
        )
    return {
        "images": len(split),
        "fp32_accuracy": round(accuracies[0], 4),
        "int8_accuracy": round(accuracies[1], 4),
        "agreement": round(float((said[0] == said[1]).mean()), 4),
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

    Raises ``DataError`` for an unfinished run or other data, ``ParityError`` if INT8 loses too much accuracy, and
    ``VerificationError`` if a runtime does not reproduce the reference outputs.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        sealed = _write(run, source, Path(folder))
        for name in RUNTIMES:
            verify(create(name, sealed), sealed.reference(name))
        out.mkdir(exist_ok=True)
        sealed.copy_to(out)
    return Artifact.load(out)


def _write(run: Path, source: str, out: Path) -> Artifact:
    if not (run / runs.RUN).exists():
        raise DataError(f"{run}: not a finished run, for it has no {runs.RUN}; go on with --resume")
    training = runs.read_record(run)
    config, network = load_run(run)
    data = runs.load_data_of(config, training, source)
    banked = evenly_spaced(data.train.images, BANK_IMAGES)
    config = config.model_copy(update={"bank": len(banked)})
    served = ServedNet(config).eval()
    served.network = network
    served.init_bank(torch.from_numpy(banked), batch_of(config.input_size, BANK_BATCH))
    weights = {name: _round(name, tensor).contiguous() for name, tensor in served.state_dict().items()}
    weights_path, fp32, int8 = (out / files.FILES[runtime] for runtime in RUNTIMES)
    runs.write_weights(weights, weights_path)
    export_onnx(served, config, fp32)
    quantize(fp32, int8, evenly_spaced(data.train.images, CALIBRATION_IMAGES))
    store_half(fp32, weights_path)
    store_half(int8)

    full, quantised = _references(fp32, int8, data)
    save_reference(out, full, quantised)
    agreement = parity(full.validation, quantised.validation, data.val)
    temperature = fit_temperature(full.validation, data.val.labels)
    config.model_copy(update={"temperature": temperature}).save(out / files.CONFIG)
    card = {
        "training": training,
        "validation": agreement,
        "git_commit": git_commit(),
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxruntime", "bentoml")},
    }
    return seal(out, card)


def _references(fp32: Path, int8: Path, data: Data) -> tuple[Reference, Reference]:
    """What each of the two ONNX files answers."""
    samples = evenly_spaced(data.val.images, REFERENCE_IMAGES)
    limits = edges(evenly_spaced(data.train.images, STATISTICS_IMAGES))

    def reference(runtime: OnnxRuntime) -> Reference:
        return Reference(samples, runtime(samples), run_runtime(runtime, data.val.images), data.val.labels, limits)

    return reference(OnnxRuntime(fp32, ONNX)), reference(OnnxRuntime(int8, ONNX_INT8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("source")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sealed = export(options.run, options.source, options.out)
    print(json.dumps(sealed.card["validation"]), f"temperature {sealed.config.temperature}")
    classifier = Classifier(sealed.config, sealed.reference(ONNX_INT8))
    for warning in filter(None, (classifier.foreign_warning, classifier.prediction_set_warning)):
        print(warning)
    for name, entry in sealed.card["files"].items():
        print(f"  {name:18} {entry['bytes'] / 1e6:6.2f} MB  sha256 {entry['sha256'][:16]}")


if __name__ == "__main__":
    command.run(main)
