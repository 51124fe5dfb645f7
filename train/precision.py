"""Precision of training: 16 bits where the device has arithmetic for them."""

from __future__ import annotations

import torch

BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""Extensions of x86 and of ARM, as ``torch.cpu.get_capabilities`` names them."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16. Other processors emulate it, at least ten times slower than float32."""
    if device.type == "cuda":
        return True
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in BFLOAT16_INSTRUCTIONS)


def compute_dtype(device: torch.device) -> torch.dtype:
    """Type of convolutions: FP16 on CUDA; elsewhere bfloat16 if the processor has it, otherwise float32."""
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def autocast(device: torch.device) -> torch.autocast:
    """A context in which convolutions are computed in ``compute_dtype``."""
    dtype = compute_dtype(device)
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
