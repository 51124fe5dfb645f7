"""Write a trained network as the two ONNX files of an artifact: FP32, and INT8 with calibrated activations."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Iterator
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

from model.network import ConvNorm, Normalize, ServedNet
from model.preprocess import Pixels
from train.command import CommandError
from train.data import batch_of

BATCH = 250
LARGE_CONSTANT = 1024
"""Minimum number of elements of a constant that is worth storing in FP16."""
OPSET = 18


def write_onnx(served: ServedNet, fp32: Path, int8: Path, weights: Path, images: Pixels) -> None:
    """Write ``fp32``, which refers to ``weights`` beside it, and ``int8``, calibrated on ``images``."""
    export_onnx(served, images.shape[1:3], fp32)
    quantize(fp32, int8, images)
    store_half(fp32, weights)
    store_half(int8)


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


def export_onnx(served: ServedNet, size: tuple[int, int], path: Path) -> None:
    """Write the FP32 graph: ``images`` (N, H, W, 3) uint8 to ``outputs`` (N, K + 1) and ``evidence`` (N, h, w, K)."""
    example = torch.zeros((2, *size, 3), dtype=torch.uint8)
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

    Raises ``CommandError`` for a network without convolutions.

    Weights have seven bits because processors without VNNI add pairs of products in 16 bits, which would saturate: this
    way the artifact gives the same answer on every x86. The stem stays FP32 because whitening subtracts nearly equal
    pixels.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        stem = next((node.name for node in onnx.load(prepared).graph.node if node.op_type == "Conv"), None)
        if stem is None:
            raise CommandError("no convolution to quantise")
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
