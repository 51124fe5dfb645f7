"""Turn a network that was trained elsewhere, as ONNX, into an artifact ready to serve.

    python -m train.convert NETWORK.onnx SOURCE --name flowers --out runs/flowers/artifact

NETWORK takes float images (N, 3, height, width) or (N, height, width, 3), red first unless --bgr, pixels divided by 255
and normalised with --mean and --std, and gives logits or probabilities (N, K): one for each class of SOURCE in
alphabetical order, as torchvision's ImageFolder and timm count them. SOURCE is a folder of labelled images like that of
``train.fit``; the network must not have been trained on its validation and test images. As in ``train.export``, its
training images calibrate INT8, are the baseline for drift and tell foreign images apart; its validation images fit the
temperature. The service resizes each image as a whole to the network's input: ``train.evaluate`` shows what that costs
a network trained on crops.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime import InferenceSession
from pydantic import ValidationError
from tqdm import tqdm

from model import artifact as files
from model.artifact import ONNX, ONNX_INT8, Artifact
from model.config import CHANNELS, ModelConfig
from model.preprocess import Pixels
from model.runtimes import OnnxRuntime
from train import command, graphs
from train.check import check, print_findings
from train.command import CommandError
from train.data import Data, in_batches, load
from train.export import (
    BANK_IMAGES,
    ParityError,
    calibration_images,
    complete,
    describe,
    evenly_spaced,
    write_artifact,
)
from train.graphs import FEATURES, LOGITS, MAPS, Network, Triple, close, expecting
from train.to_onnx import quantize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""With which torchvision and timm normalise, for networks pretrained on ImageNet."""
BATCH = 32
WHOLE = (1, 1)
"""Cells of an image that is explained as a whole."""
SHOWN = 3
"""Outputs that an error shows."""


def convert(
    network: Network, data: Data, config: ModelConfig, record: dict[str, Any], int8: bool, out: Path
) -> Artifact:
    """Write the artifact of ``network`` to ``out``, with an INT8 form if ``int8``; on any error it stays as it was.

    ``record`` says where the network is from. Raises ``CommandError`` for a network that does not fit ``data``,
    ``ParityError`` if INT8 loses too much accuracy, and ``VerificationError`` as ``train.export`` does.
    """
    return write_artifact(out, partial(_write, network, data, config, record, int8))


def _write(
    network: Network, data: Data, config: ModelConfig, record: dict[str, Any], int8: bool, out: Path
) -> Artifact:
    model = graphs.with_pixels(network, config.input_size, config.mean, config.std)
    fp32, quantised = (out / files.FILES[runtime] for runtime in (ONNX, ONNX_INT8))
    bank, cells = _bank(network, model, data)
    if not _are_square(config.input_size, cells):
        cells = WHOLE
    if cells == WHOLE:
        network = network._replace(head=None)
        print("no evidence: the network does not end in a global average of square cells and one linear layer")
    onnx.save(graphs.with_outputs(network, model, bank, cells), fp32)
    if int8:
        _quantize(fp32, quantised, data)
    update = {"bank": len(bank), "cell": _cell(config.input_size, cells)}
    try:
        return complete(out, config.model_copy(update=update), record, data)
    except ParityError as error:
        raise ParityError(f"{error}, or --no-int8") from None


def _cell(size: tuple[int, int], cells: tuple[int, int]) -> int:
    """Input pixels per cell, along each side; the last cell of a side may have fewer."""
    return max(math.ceil(side / count) for side, count in zip(size, cells, strict=True))


def _are_square(size: tuple[int, int], cells: tuple[int, int]) -> bool:
    """Whether ``cells`` of the same height as width cover an input of ``size``."""
    return all(math.ceil(side / _cell(size, cells)) == count for side, count in zip(size, cells, strict=True))


def _quantize(fp32: Path, quantised: Path, data: Data) -> None:
    with expecting("a network that has an INT8 form, or --no-int8"):
        quantize(fp32, quantised, calibration_images(data))
        OnnxRuntime(quantised, ONNX_INT8)


def _bank(network: Network, model: ModelProto, data: Data) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """(B, D) features of some training images; height and width of the maps that explain their logits, or ``WHOLE``."""
    with expecting("a network that ONNX Runtime can run"):
        session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [LOGITS, FEATURES, *([MAPS] if network.head else [])]
    images = evenly_spaced(data.train.images, BANK_IMAGES)
    batches = in_batches(images, BATCH)
    every, bank, cells = [], [], set()
    for batch in tqdm(batches, desc="features", unit="batch", leave=False, disable=None):
        logits, features, *maps = _run(session, outputs, images[batch])
        expected = (len(images[batch]), len(data.classes))
        if logits.shape != expected:
            raise CommandError(
                f"the network gives outputs of shape {logits.shape}; expected {expected}: for each image, one for "
                f"each class of {data.source}"
            )
        every.append(logits)
        bank.append(features)
        cells.add(maps[0].shape[2:] if maps and network.explains(maps[0], logits) else WHOLE)
    _require_logits(np.concatenate(every))
    _require_independence(_run(session, [LOGITS], images[:1])[0][0], every[0])
    return np.concatenate(bank), cells.pop() if len(cells) == 1 else WHOLE


def _run(session: InferenceSession, outputs: list[str], images: Pixels) -> list[NDArray[np.float32]]:
    """The ``outputs`` for ``images`` (N, H, W, 3)."""
    with expecting(f"a network for images {(len(images), CHANNELS, *images.shape[1:3])}, and any number of them"):
        computed: list[NDArray[np.float32]] = session.run(outputs, {"images": images})
    return computed


def _require_logits(outputs: NDArray[np.float32]) -> None:
    """Raise ``CommandError`` unless the network's ``outputs`` (N, K) can be logits."""
    if not np.isfinite(outputs).all():
        raise CommandError(f"the network gives outputs such as {outputs[~np.isfinite(outputs)][0]}; expected numbers")
    if outputs.min() >= 0 and np.allclose(outputs.sum(axis=1), 1, atol=1e-2):
        raise CommandError(
            "the network gives probabilities, but not straight from a softmax; expected logits, or that softmax last"
        )


def _require_independence(alone: NDArray[np.float32], together: NDArray[np.float32]) -> None:
    """Raise ``CommandError`` unless the first of the logits ``together`` (N, K) is that of its image ``alone`` (K,)."""
    if not close(alone, together[0]):
        raise CommandError(
            f"the network gives an image {_shown(alone)} alone and {_shown(together[0])} among {len(together)}; "
            "expected the same: export it in inference mode, model.eval(), and without dynamic quantisation"
        )


def _shown(outputs: NDArray[np.float32]) -> str:
    return f"outputs of {', '.join(f'{value:.4g}' for value in outputs[:SHOWN])}"


def _triple(text: str) -> Triple:
    try:
        first, second, third = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected three numbers, R,G,B") from None
    if not all(0 <= value <= 1 for value in (first, second, third)):
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers from 0 to 1, for pixels divided by 255")
    return 255 * first, 255 * second, 255 * third


def _std(text: str) -> Triple:
    triple = _triple(text)
    if not all(triple):
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers above 0")
    return triple


def _size(text: str) -> tuple[int, int]:
    """Height and width; one number means both."""
    height, separator, width = text.partition("x")
    try:
        size = int(height), int(width if separator else height)
    except ValueError:
        size = 0, 0
    if min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of pixels, or height and width, such as 48x192")
    return size


def _input_size(path: Path, network: Network, asked: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the input, as ``asked`` where ``network`` leaves them open.

    A square may be ``asked`` for a network that leaves one of them open: it was typed as one number.
    """
    height, width = (fixed or side for fixed, side in zip(network.size, asked or (None, None), strict=True))
    if height is None or width is None:
        raise CommandError(f"{path}: takes images of any size; expected --size, what it was trained for")
    if asked and (height, width) != asked and (None not in network.size or asked[0] != asked[1]):
        raise CommandError(f"--size {asked[0]}x{asked[1]}; expected {height}x{width}, which {path} takes")
    return height, width


def _digest(path: Path) -> str:
    """SHA-256 of the ONNX file ``path``, followed by the files beside it that hold its weights, if there are any."""
    content = path.read_bytes()
    digest = hashlib.sha256(content)
    entries = [entry for tensor in onnx.load_from_string(content).graph.initializer for entry in tensor.external_data]
    for name in sorted({entry.value for entry in entries if entry.key == "location"}):
        digest.update((path.parent / name).read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, metavar="NETWORK.onnx")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--name", required=True, help="name of the model in the store")
    parser.add_argument("--out", type=Path, required=True, help="folder of the artifact")
    about = "side of the input in pixels, or height and width, where the network takes any"
    parser.add_argument("--size", type=_size, metavar="H[xW]", help=about)
    for name, value, read in (("mean", IMAGENET_MEAN, _triple), ("std", IMAGENET_STD, _std)):
        shown = ",".join(map(str, value))
        about = f"by which pixels from 0 to 1 were normalised, R,G,B (default: {shown}, as for ImageNet)"
        parser.add_argument(f"--{name}", type=read, default=read(shown), metavar="R,G,B", help=about)
    parser.add_argument("--bgr", action="store_true", help="the network takes blue first; --mean and --std stay R,G,B")
    parser.add_argument("--no-int8", action="store_true", help="leave INT8 out, for a network that loses by it")
    options = parser.parse_args()
    network = graphs.read(options.network, options.bgr)
    data = load(options.source, _input_size(options.network, network, options.size))
    findings = check(data)
    print_findings(findings)
    try:
        config = ModelConfig(
            name=options.name, classes=data.classes, input_size=data.input_size, mean=options.mean, std=options.std
        )
    except ValidationError as error:
        raise CommandError(f"--name {options.name!r}: {error.errors()[0]['msg']}") from error
    record = {
        "command": command.public("train.convert", sys.argv[1:]),
        "network": options.network.name,
        "network_sha256": _digest(options.network),
        "source": Path(data.source).name,
        "data_sha256": data.sha256(),
        "images": {name: len(split) for name, split in data.splits.items()},
        "parameters": network.parameters,
        "check": findings,
    }
    sealed = convert(network, data, config, record, not options.no_int8, options.out)
    describe(sealed)


if __name__ == "__main__":
    command.run(main)
