"""Every setting of the service: read from the environment once, validated, immutable.

A setting is the environment variable named after the field, in capitals: ``RUNTIME=onnx WORKERS=4 bentoml serve``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from model import gpus
from model.artifact import ACCURATE, CONFIG, ONNX, ONNX_INT8, RUNTIMES, SHIPPED, TORCH
from model.config import ModelConfig
from model.preprocess import MAX_PIXELS

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


def _writable(directory: Path, mode: int = 0o777) -> Path:
    with suppress(OSError):
        directory.mkdir(mode, parents=True, exist_ok=True)  # an existing one keeps its mode
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PydanticCustomError("writable", "a directory that can be written")
    return directory


WritableDirectory = Annotated[Path, AfterValidator(_writable)]
"""Created if missing. One that cannot be written stops the start instead of failing the first request."""
PrivateDirectory = Annotated[Path, AfterValidator(partial(_writable, mode=0o700))]
"""The same, but created for this user alone."""


class SettingsError(SystemExit):
    """An unusable setting: the process stops with one line on standard error."""


class Settings(BaseSettings):
    """The environment, typed. Sizes are in bytes, times in seconds, queue lengths in images."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, allow_inf_nan=False)

    model: str | None = None
    """``name`` or ``name:version`` in the model store; without a version, the promoted one. Several, separated by
    commas, answer as an ensemble. By default the one that a Bento was built with; in a checkout a shipped one: the fast
    one on a CPU, the accurate one on a GPU."""
    shadow: str | None = None
    """``name:version`` of a model that sees the same images; its disagreements are counted, its answers never sent."""
    foreign_rate: float = Field(default=0.05, gt=0, lt=1)
    """Share of ordinary images that may be flagged as foreign by mistake; more makes ``in_distribution`` stricter."""
    runtime: Literal["auto", "fastest", "torch", "onnx", "onnx-int8"] = "auto"
    """Engine. ``auto`` is ``torch`` where PyTorch is installed and can use an NVIDIA GPU, else ``onnx-int8``. A network
    trained elsewhere has no ``torch`` and may lack INT8: ``auto`` is then ``onnx-int8``, or ``onnx``.
    ``fastest`` times both ONNX formats at startup instead, because INT8 is not faster on every processor."""
    topology: Literal["auto", "embedded", "runner"] = "auto"
    """``embedded``: each API worker owns an engine. ``runner``: one process per GPU owns it. ``auto`` is ``runner`` on
    a GPU, else ``embedded``."""
    workers: Annotated[int, Field(ge=1)] | Literal["cpu_count"] = "cpu_count"
    """Number of API worker processes. ``cpu_count``: one per CPU that the process affinity and the quota of its
    cgroup, such as a container's or systemd's ``CPUQuota=``, allow."""
    threads: int = Field(default=1, ge=1)
    """CPU threads per engine."""
    max_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Largest batch of an engine, in images. ``auto`` measures, and keeps the smallest size within 3 % of the best
    rate, because larger batches are slower on a CPU. With a runner it limits both the runner's batches (``auto``: its
    largest CUDA graph, 32 without a GPU) and what a worker sends it at once (``auto``: 32)."""
    max_queue: int = Field(default=512, ge=1)
    """Images that may wait in one API worker; a request that would exceed this is answered 429."""
    max_wait: float = Field(default=0.5, gt=0)
    """Longest wait for an engine or, unless an image is small and plain, a decoder, estimated from the recent drain
    rate of that queue. A request that would wait longer is answered 429; an empty queue accepts every request."""
    max_request_images: int = Field(default=256, ge=1)
    """Most images in one ``/classify/batch`` request."""
    request_timeout: float = Field(default=10.0, gt=0)
    """Deadline of a request; one that waits longer is answered 504 and not computed. A caller can shorten it with the
    ``X-Request-Timeout`` header."""
    drain_seconds: float = Field(default=0.0, ge=0)
    """How long requests are still accepted after SIGTERM, with readiness off and each connection closed after its next
    reply, so that load balancers and clients can leave."""
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    """Largest request body."""
    max_image_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Largest image file, as sent."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Most pixels in an image, width times height; a quarter of that with transparency. No side may exceed 32,767."""
    api_keys: Path | None = None
    """File of API keys (serving/access.py), reread when it changes. Without it, anyone may call."""
    usage_file: Path | None = None
    """SQLite file that records what each key has used. By default a temporary one, so a restart resets the counts."""
    audit_directory: PrivateDirectory | None = None
    """Folder for the audit log, one rotating file per process. Off by default."""
    review_directory: PrivateDirectory | None = None
    """Folder that keeps low-confidence images for labelling and retraining. Off by default."""
    review_below: float = Field(default=0.5, gt=0, le=1)
    """Confidence below which an image may be kept for review."""
    review_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the images below ``REVIEW_BELOW`` that is kept, drawn at random."""
    review_days: float = Field(default=30.0, gt=0)
    """Age, in days, at which a kept image is removed."""
    review_bytes: int = Field(default=2**30, ge=2**20)
    """Size of the folder at which the oldest images are removed."""
    log_level: Level = "INFO"
    """Lowest level written to standard error."""
    log_requests: bool = True
    """Whether each request is logged, one line each."""
    log_directory: WritableDirectory | None = None
    """Folder for rotating log files of WARNING and above, one per process. Off by default."""
    smtp_host: str | None = None
    """Mail server for CRITICAL log lines; needs ``SMTP_TO``. Off by default."""
    smtp_port: int = Field(default=25, ge=1, le=65535)
    """Port of ``SMTP_HOST``."""
    smtp_from: str = "classifier@localhost"
    """Sender of those mails."""
    smtp_to: str | None = None
    """Recipients of those mails, separated by commas."""
    smtp_user: str | None = None
    """User name for a server that requires a login; STARTTLS is then required too."""
    smtp_password: SecretStr | None = None
    """Password of ``SMTP_USER``."""

    def resolved_runtime(self, available: Sequence[str] = RUNTIMES) -> str:
        """The runtime to use, of those ``available`` for the model; ``fastest`` is left for the caller to measure.

        Raises ``SettingsError`` for one that is not available.
        """
        if self.runtime == "auto":
            preferred = (TORCH, ONNX_INT8, ONNX) if gpus.cuda_devices() else (ONNX_INT8, ONNX)
            return next(name for name in preferred if name in available)
        if self.runtime not in ("fastest", *available):
            names = ", ".join(available)
            owners = "MODEL and SHADOW both have" if self.shadow else "the model has"
            raise SettingsError(f"error: RUNTIME={self.runtime!r}; expected one that {owners}: {names}")
        return self.runtime

    def resolved_topology(self, runtime: str) -> str:
        if self.topology != "auto":
            return self.topology
        return "runner" if runtime == TORCH and gpus.cuda_devices() else "embedded"

    def resolved_model(self) -> str:
        if self.model:
            return self.model
        is_on_gpu = self.resolved_runtime() == TORCH and gpus.cuda_devices() > 0
        is_accurate = (ACCURATE / CONFIG).exists() and is_on_gpu
        return ModelConfig.load((ACCURATE if is_accurate else SHIPPED) / CONFIG).name


def load(**overrides: Any) -> Settings:
    """The settings; ``overrides`` take precedence over the environment. Raises ``SettingsError`` naming the value."""
    if sys.platform != "linux":
        raise SettingsError(f"error: platform {sys.platform!r}; expected Linux; a container will do")
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        raise SettingsError("error: " + "; ".join(_explain(error))) from None
    if settings.runtime == TORCH and not find_spec("torch"):
        raise SettingsError("error: RUNTIME='torch'; expected PyTorch to be installed, or another runtime")
    if settings.runtime == TORCH and not gpus.cuda_devices() and gpus.has_gpu():
        raise SettingsError("error: RUNTIME='torch'; expected a GPU that PyTorch can use, or another runtime")
    if (settings.smtp_host is None) != (settings.smtp_to is None):
        raise SettingsError("error: SMTP_HOST and SMTP_TO go together; found only one of them")
    if settings.max_queue < settings.max_request_images:
        raise SettingsError(
            f"error: MAX_QUEUE={settings.max_queue}; expected at least MAX_REQUEST_IMAGES={settings.max_request_images}"
        )
    return settings


def _explain(error: ValidationError) -> Iterator[str]:
    """``RUNTIME='tpu'; expected …`` for each invalid setting."""
    found: dict[str, tuple[Any, list[str]]] = {}
    for one in error.errors():
        _, expected = found.setdefault(str(one["loc"][0]).upper(), (one["input"], []))
        expected.append(_expectation(one))
    for name, (value, expected) in found.items():
        yield f"{name}={value!r}; expected {' or '.join(expected)}"


def _expectation(error: Any) -> str:
    names = error.get("ctx", {}).get("expected")
    if names is None:
        return str(error["msg"].removeprefix("Input should be ").partition(", unable to parse")[0])
    choices = names.replace(" or ", ", ").replace("'", "")
    return f"one of {choices}" if "," in choices else choices
