"""The engines that turn pixels into outputs, behind one protocol.

``torch`` and ``onnxruntime`` are imported only by the engine that needs them, so serving on a CPU never loads torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.artifact import FILES, ONNX, ONNX_INT8, RUNTIMES, TORCH, Artifact, Evidence, Outputs
from model.gpus import cuda_devices
from model.preprocess import Pixels

GRAPHED_IMAGES = 256
"""Images in the largest batch with a CUDA graph, a power of two; fewer for images larger than ``GRAPHED_PIXELS``."""
GRAPHED_PIXELS = 64 * 64
"""Activations of 256 images of 224x224 pixels would take 6 GB."""

logger = logging.getLogger("classifier.runtimes")


class RuntimeUnavailableError(RuntimeError):
    """A runtime with an unknown name or a missing library, or no runtime that reproduces its reference outputs."""


class EngineLostError(RuntimeError):
    """The device has failed, and every later call from this process will fail too."""


class Runtime(Protocol):
    """An engine with a model loaded. Called from one thread at a time."""

    name: str

    def __call__(self, images: Pixels) -> Outputs:
        """(N, H, W, 3) uint8 RGB to (N, K + 1) float32 outputs."""
        ...

    def evidence(self, images: Pixels) -> Evidence:
        """(N, H, W, 3) uint8 RGB to (N, h, w, K) float32 evidence."""
        ...


class OnnxRuntime:
    """ONNX Runtime on the CPU, in FP32 or INT8."""

    def __init__(self, path: Path, name: str, threads: int = 1) -> None:
        # Since 1.29 the Linux wheels send telemetry to Microsoft, from the import on.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Workers share the cores: a thread that spins while it waits takes a core from the others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Memory plans are kept for every batch size ever seen, and so would grow.
        options.enable_mem_pattern = False
        self.name = name
        # Skip the nodes that only the output not asked for needs.
        self._run_options = onnxruntime.RunOptions()
        self._run_options.only_execute_path_to_fetches = True
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, images: Pixels) -> Outputs:
        return self._run("outputs", images)

    def evidence(self, images: Pixels) -> Evidence:
        return self._run("evidence", images)

    def _run(self, output: str, images: Pixels) -> NDArray[np.float32]:
        (result,) = self._session.run([output], {"images": images}, self._run_options)
        return np.asarray(result, np.float32)


class TorchRuntime:
    """PyTorch: FP16 with FP32 BatchNorm and CUDA graphs on a GPU, FP32 on the CPU."""

    name = TORCH

    def __init__(self, artifact: Artifact, threads: int = 1, device_index: int = 0) -> None:
        try:
            import torch
            from safetensors.torch import load_file
        except ImportError as error:
            raise RuntimeUnavailableError(f"runtime 'torch' needs the packages of requirements.txt: {error}") from error
        from model.network import ServedNet, halve

        torch.set_num_threads(threads)
        self._torch = torch
        self._device = torch.device(f"cuda:{device_index}" if cuda_devices() else "cpu")
        network = ServedNet(artifact.config)
        network.load_state_dict(load_file(artifact.file(TORCH)))
        self._network = (halve(network) if self._device.type == "cuda" else network).to(self._device).eval()
        # A stream of its own: on the default one, which all threads share, a shadow's batches would come in between.
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._graphed = graphed_images(artifact.config.input_size)
        self._graphs = self._record((*artifact.config.input_size, 3)) if self._device.type == "cuda" else None

    def _record(self, shape: tuple[int, int, int]) -> Callable[[Pixels], Any] | None:
        """The network as CUDA graphs, or None where capture fails: it then runs without them, only slower."""
        from model.graphs import Graphs

        try:
            with self._torch.cuda.stream(self._stream):
                return Graphs(self._network, shape, self._graphed, self._device)
        except RuntimeError as error:
            logger.warning("no CUDA graphs", extra={"reason": str(error)})
            return None

    def __call__(self, images: Pixels) -> Outputs:
        if self._graphs and len(images) <= self._graphed:
            return self._run(self._graphs, images)
        return self._run(partial(self._eagerly, self._network), images)

    def evidence(self, images: Pixels) -> Evidence:
        return self._run(partial(self._eagerly, self._network.explain), images)

    def _eagerly(self, function: Callable[[Any], Any], images: Pixels) -> Any:
        with self._torch.inference_mode():
            return function(self._torch.from_numpy(images).to(self._device)).cpu()

    def _run(self, function: Callable[[Pixels], Any], images: Pixels) -> NDArray[np.float32]:
        """Raises ``EngineLostError`` when CUDA fails, except out of memory: a smaller batch may still fit."""
        try:
            with self._torch.cuda.stream(self._stream):  # None on a CPU, which changes nothing
                return np.asarray(function(images), np.float32)
        except self._torch.AcceleratorError as error:
            raise EngineLostError(str(error)) from error


def graphed_images(size: tuple[int, int]) -> int:
    """The largest batch of images of ``size`` (height, width) that gets a CUDA graph; a power of two."""
    most = max(1, GRAPHED_IMAGES * GRAPHED_PIXELS // (size[0] * size[1]))
    return min(GRAPHED_IMAGES, 1 << (most.bit_length() - 1))


def create(name: str, artifact: Artifact, threads: int = 1, device_index: int = 0) -> Runtime:
    """Load ``artifact`` into the runtime ``name``, on a CPU with ``threads`` or on GPU ``device_index``.

    Raises ``RuntimeUnavailableError`` for an unknown name, for one that ``artifact`` has no file for, and for ``torch``
    where it is not installed.
    """
    if name in RUNTIMES and name not in artifact.runtimes:
        raise RuntimeUnavailableError(f"{artifact.tag} has no {FILES[name]} for runtime {name!r}")
    if name == TORCH:
        return TorchRuntime(artifact, threads, device_index)
    if name in (ONNX, ONNX_INT8):
        return OnnxRuntime(artifact.file(name), name, threads)
    raise RuntimeUnavailableError(f"runtime {name!r}; expected one of {', '.join(RUNTIMES)}")
