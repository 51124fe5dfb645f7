"""The engines that turn pixels into logits, behind one protocol.

``torch`` and ``onnxruntime`` are imported by the engine that needs them, so that serving on a CPU never loads torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from model.artifact import Artifact, Outputs
from model.preprocess import Pixels

TORCH, ONNX, ONNX_INT8 = "torch", "onnx", "onnx-int8"
RUNTIMES = (TORCH, ONNX, ONNX_INT8)
GRAPHED_IMAGES = 256
"""Of the largest batch that a CUDA graph is recorded for, a power of two."""

logger = logging.getLogger("classifier.runtimes")


class RuntimeUnavailableError(RuntimeError):
    """A runtime whose name, library or hardware is missing here."""


class Runtime(Protocol):
    """An engine with a model loaded. Called from one thread at a time."""

    name: str

    def __call__(self, images: Pixels) -> Outputs:
        """(N, H, W, 3) uint8 RGB to (N, K + 1) float32 outputs."""
        ...

    def evidence(self, images: Pixels) -> NDArray[np.float32]:
        """(N, H, W, 3) uint8 RGB to (N, h, w, K): what each place of a coarse grid adds to each logit."""
        ...


class OnnxRuntime:
    """ONNX Runtime on the CPU, in FP32 or INT8."""

    def __init__(self, path: Path, name: str, threads: int = 1) -> None:
        # From 1.29 on its Linux wheels report to Microsoft, from the moment of the import.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Workers share the cores: a thread that spins while it waits takes them from the others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # A plan of the memory for every size of a batch that ever comes is itself memory that grows.
        options.enable_mem_pattern = False
        self.name = name
        # What only the output that was not asked for needs is left out.
        self._run_options = onnxruntime.RunOptions()
        self._run_options.only_execute_path_to_fetches = True
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, images: Pixels) -> Outputs:
        return self._run("outputs", images)

    def evidence(self, images: Pixels) -> NDArray[np.float32]:
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

        if cuda_devices() and not torch.cuda.is_available():
            raise RuntimeUnavailableError(
                f"torch {torch.__version__} cannot use this machine's GPU: is its driver too old?"
            )
        torch.set_num_threads(threads)
        self._torch = torch
        self._device = torch.device(f"cuda:{device_index}" if torch.cuda.is_available() else "cpu")
        network = ServedNet(artifact.config)
        network.load_state_dict(load_file(artifact.weights))
        self._network = (halve(network) if self._device.type == "cuda" else network).to(self._device).eval()
        self._graphs = self._record((*artifact.config.input_size, 3)) if self._device.type == "cuda" else None

    def _record(self, shape: tuple[int, int, int]) -> Callable[[Pixels], Any] | None:
        """The network as CUDA graphs, or None where they cannot be had: it answers without them, only later."""
        from model.graphs import Graphs

        try:
            return Graphs(self._network, shape, GRAPHED_IMAGES, self._device)
        except RuntimeError as error:
            logger.warning("no CUDA graphs", extra={"reason": str(error)})
            return None

    def __call__(self, images: Pixels) -> Outputs:
        if self._graphs and len(images) <= GRAPHED_IMAGES:
            return np.asarray(self._graphs(images), np.float32)
        return self._run(self._network, images)

    def evidence(self, images: Pixels) -> NDArray[np.float32]:
        return self._run(self._network.explain, images)

    def _run(self, function: Callable[[Any], Any], images: Pixels) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            result = function(self._torch.from_numpy(images).to(self._device))
        return np.asarray(result.cpu(), np.float32)


def cuda_devices() -> int:
    """How many NVIDIA GPUs this process may use; asks the driver, so that torch need not be loaded to find none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        count = int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    return min(count, sum(device.strip() not in ("", "-1") for device in visible.split(",")))


def create(name: str, artifact: Artifact, threads: int = 1, device_index: int = 0) -> Runtime:
    """Load ``artifact`` into the runtime called ``name``, with ``threads`` on a CPU or on GPU ``device_index``.

    Raises ``RuntimeUnavailableError`` for an unknown name or a library that is not installed.
    """
    if name == TORCH:
        return TorchRuntime(artifact, threads, device_index)
    if name in (ONNX, ONNX_INT8):
        return OnnxRuntime(artifact.onnx_int8 if name == ONNX_INT8 else artifact.onnx, name, threads)
    raise RuntimeUnavailableError(f"runtime {name!r}; expected one of {', '.join(RUNTIMES)}")
