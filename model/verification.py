"""Whether an engine computes what its artifact says: the stored outputs for the reference images."""

from __future__ import annotations

import numpy as np

from model.artifact import ONNX, ONNX_INT8, TORCH, Outputs, Reference
from model.runtimes import Runtime

TOLERANCE = {TORCH: 0.1, ONNX: 0.01, ONNX_INT8: 0.35}
"""Largest difference from a reference output. FP32 differs only by summation order, FP16 by its 11-bit significand,
INT8 by a rounding step per layer between processors. A wrong weight, layout or normalisation is off by whole units."""


class VerificationError(RuntimeError):
    """An engine that does not reproduce the reference outputs of its artifact."""


def check(outputs: Outputs, reference: Reference, runtime_name: str) -> None:
    """Compare ``outputs`` for the reference images with the stored ones; raises ``VerificationError``."""
    if outputs.shape != reference.outputs.shape:
        raise VerificationError(
            f"runtime {runtime_name!r} gave outputs of shape {outputs.shape}; expected {reference.outputs.shape}"
        )
    difference = float(np.abs(outputs - reference.outputs).max())
    tolerance = TOLERANCE[runtime_name] * reference.tolerance
    # Not `difference > tolerance`, so that NaN fails too.
    if not difference <= tolerance:
        raise VerificationError(
            f"runtime {runtime_name!r} differs from the reference outputs by {difference:.3g}; "
            f"expected at most {tolerance:.3g}"
        )


def verify(runtime: Runtime, reference: Reference) -> None:
    """Run the reference images through ``runtime``, which also warms it up; raises ``VerificationError``."""
    check(runtime(reference.images), reference, runtime.name)
