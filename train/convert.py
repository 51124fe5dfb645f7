"""Turn a network that was trained elsewhere, as ONNX, into an artifact ready to serve.

    python -m train.convert NETWORK.onnx SOURCE --name flowers --out runs/flowers/artifact

NETWORK takes float images (N, 3, height, width), pixels divided by 255 and normalised with --mean and --std, and gives
logits or probabilities (N, K): one for each class of SOURCE in alphabetical order, as torchvision's ImageFolder and
timm count them. SOURCE is a folder of labelled images like that of ``train.fit``; the network must not have been
trained on its validation and test images. As in ``train.export``, its training images calibrate INT8, are the baseline
for drift and tell foreign images apart; its validation images fit the temperature. The service resizes each image as a
whole to the network's input: ``train.evaluate`` shows what that costs a network trained on crops.
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
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto
from pydantic import ValidationError
from tqdm import tqdm

from model import artifact as files
from model.artifact import ONNX, ONNX_INT8, Artifact
from model.config import ModelConfig
from train import command, graphs
from train.check import check, print_findings
from train.command import CommandError
from train.data import Data, in_batches, load
from train.export import BANK_IMAGES, calibration_images, complete, describe, evenly_spaced, write_artifact
from train.graphs import FEATURES, LOGITS, MAPS, Network, Triple
from train.to_onnx import quantize

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""With which torchvision and timm normalise, for networks pretrained on ImageNet."""
BATCH = 32
WHOLE = (1, 1)
"""Cells of an image that is explained as a whole."""


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
    if cells == WHOLE:
        network = network._replace(head=None)
        print("no evidence: the network does not end in a global average and one linear layer")
    onnx.save(graphs.with_outputs(network, model, bank, cells), fp32)
    if int8:
        quantize(fp32, quantised, calibration_images(data))
    cell = max(math.ceil(side / count) for side, count in zip(config.input_size, cells, strict=True))
    return complete(out, config.model_copy(update={"bank": len(bank), "cell": cell}), record, data)


def _bank(network: Network, model: ModelProto, data: Data) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """(B, D) features of some training images; height and width of the maps that explain their logits, or ``WHOLE``."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = evenly_spaced(data.train.images, BANK_IMAGES)
    outputs = [LOGITS, FEATURES, *([MAPS] if network.head else [])]
    bank, cells = [], set()
    for batch in tqdm(in_batches(images, BATCH), desc="features", unit="batch", leave=False, disable=None):
        logits, features, *maps = session.run(outputs, {"images": images[batch]})
        if logits.shape[1:] != (len(data.classes),):
            raise CommandError(
                f"the network gives outputs of shape {logits.shape[1:]}; expected one for each class of {data.source}, "
                f"({len(data.classes)},)"
            )
        bank.append(features.reshape(len(features), -1))
        cells.add(maps[0].shape[2:] if maps and network.explains(maps[0], logits) else WHOLE)
    return np.concatenate(bank), cells.pop() if len(cells) == 1 else WHOLE


def _triple(text: str) -> Triple:
    first, second, third = (255 * float(part) for part in text.split(","))
    return first, second, third


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, metavar="NETWORK.onnx")
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("--name", required=True, help="name of the model in the store")
    parser.add_argument("--out", type=Path, required=True, help="folder of the artifact")
    parser.add_argument("--size", type=int, help="side of the input in pixels, where the network takes any")
    for name, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        shown = ",".join(map(str, value))
        about = f"by which pixels from 0 to 1 were normalised, R,G,B (default: {shown}, as for ImageNet)"
        parser.add_argument(f"--{name}", type=_triple, default=_triple(shown), metavar="R,G,B", help=about)
    parser.add_argument("--no-int8", action="store_true", help="leave INT8 out, for a network that loses by it")
    options = parser.parse_args()
    network = graphs.read(options.network)
    height, width = (side or options.size for side in network.size)
    if height is None or width is None:
        raise CommandError(f"{options.network}: takes images of any size; expected --size, the side it was trained for")
    data = load(options.source, (height, width))
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
        "network_sha256": hashlib.sha256(options.network.read_bytes()).hexdigest(),
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
