"""Every setting of the service: read from the environment once, validated, immutable.

A setting is an environment variable of the field's name in capitals: ``RUNTIME=onnx WORKERS=4 bentoml serve``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from model import runtimes
from model.artifact import ACCURATE, CONFIG, ONNX_INT8, SHIPPED, TORCH
from model.config import ModelConfig
from model.preprocess import MAX_PIXELS

Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


def _writable(directory: Path, mode: int = 0o777) -> Path:
    with suppress(OSError):
        directory.mkdir(mode, parents=True, exist_ok=True)  # one that is there keeps the mode that somebody chose
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PydanticCustomError("writable", "a directory that can be written")
    return directory


WritableDirectory = Annotated[Path, AfterValidator(_writable)]
"""Made when missing; found out at the start, not with the first request."""
PrivateDirectory = Annotated[Path, AfterValidator(partial(_writable, mode=0o700))]
"""The same, for what only this user is to read."""


class SettingsError(SystemExit):
    """A setting that cannot be used: the process stops with one line on standard error."""


class Settings(BaseSettings):
    """The environment, typed. Sizes are in bytes, times in seconds, queue lengths in images."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, allow_inf_nan=False)

    model: str | None = None
    """``name`` or ``name:version`` in the model store; without a version the promoted one. Several, with commas in
    between, answer together as an ensemble. By default a shipped one: the fast on a CPU, the accurate on a GPU."""
    shadow: str | None = None
    """``name:version`` of a model that sees the same images; its disagreement is counted, its answer never sent."""
    foreign_rate: float = Field(default=0.05, gt=0, lt=1)
    """Share of ordinary images that may wrongly be called foreign: more makes ``in_distribution`` stricter."""
    runtime: Literal["auto", "fastest", "torch", "onnx", "onnx-int8"] = "auto"
    """Engine: ``torch`` where it is installed and there is an NVIDIA GPU, else ``onnx-int8``. ``fastest`` times the two
    formats of ONNX at the start instead, for INT8 is not faster on every processor."""
    topology: Literal["auto", "embedded", "runner"] = "auto"
    """``embedded``: each API worker owns an engine. ``runner``: a process per GPU owns it. A GPU decides ``auto``."""
    workers: Annotated[int, Field(ge=1)] | Literal["cpu_count"] = "cpu_count"
    """API worker processes."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one engine."""
    max_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Images in the largest batch of an engine. ``auto`` measures, and keeps the smallest size within 3 % of the best
    rate, for on a CPU more is slower. With a runner it is the limit of the runner's batches, by ``auto`` those of its
    largest CUDA graph, and of what a worker sends it at once, by ``auto`` 32."""
    max_queue: int = Field(default=512, ge=1)
    """Images that may wait in one API worker; a request with more of them is answered 429."""
    max_wait: float = Field(default=0.5, gt=0)
    """Longest wait for an engine, or of large images for a decoder, as estimated from the rate at which that queue
    drained lately. A request that would wait longer is answered 429; an empty queue takes every request."""
    max_request_images: int = Field(default=256, ge=1)
    """Most images in one ``/classify/batch`` request."""
    request_timeout: float = Field(default=10.0, gt=0)
    """Deadline of a request; one that waits longer is answered 504 and not computed. A caller may ask for a shorter one
    by the header ``X-Request-Timeout``."""
    drain_seconds: float = Field(default=0.0, ge=0)
    """After SIGTERM, how long requests are still taken while readiness is off, for a load balancer to notice that."""
    max_body_bytes: int = Field(default=32 * 2**20, ge=1024)
    """Largest body of a request."""
    max_image_bytes: int = Field(default=16 * 2**20, ge=1024)
    """Largest image, as it was sent."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Most pixels of an image, width times height; a quarter of that with transparency. No side may exceed 32,767."""
    api_keys: Path | None = None
    """File of API keys (serving/access.py), read again when it changes; without it anyone may call."""
    usage_file: Path | None = None
    """SQLite file of what each key has used; by default a temporary one, and a restart forgets the quotas."""
    audit_directory: PrivateDirectory | None = None
    """Folder of the audit log, a rotating file for each process; none by default."""
    review_directory: PrivateDirectory | None = None
    """Folder that keeps images of low confidence for labelling and retraining; none by default."""
    review_below: float = Field(default=0.5, gt=0, le=1)
    """Confidence under which an image is kept for review."""
    review_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the images under ``REVIEW_BELOW`` that is kept, drawn at random."""
    review_days: float = Field(default=30.0, gt=0)
    """Age at which a kept image is removed."""
    review_bytes: int = Field(default=2**30, ge=2**20)
    """Size of the folder at which the oldest images are removed."""
    log_level: Level = "INFO"
    """Lowest level that is written to standard error."""
    log_requests: bool = True
    """Whether each request is one line of the log."""
    log_directory: WritableDirectory | None = None
    """Folder of rotating files of WARNING and above, one file a process; none by default."""
    smtp_host: str | None = None
    """Mail server for CRITICAL lines; none by default. ``SMTP_TO`` goes with it."""
    smtp_port: int = Field(default=25, ge=1, le=65535)
    """Port of ``SMTP_HOST``."""
    smtp_from: str = "classifier@localhost"
    """Sender of those mails."""
    smtp_to: str | None = None
    """Recipients of those mails, with commas between."""
    smtp_user: str | None = None
    """User name, for a server that wants a login; STARTTLS is then required."""
    smtp_password: SecretStr | None = None
    """Password of ``SMTP_USER``."""

    def resolved_runtime(self) -> str:
        """The runtime that is meant; ``fastest`` is left to be measured."""
        if self.runtime != "auto":
            return self.runtime
        return TORCH if runtimes.cuda_devices() else ONNX_INT8

    def resolved_topology(self) -> str:
        if self.topology != "auto":
            return self.topology
        return "runner" if self._computes_on_gpu() else "embedded"

    def resolved_model(self) -> str:
        if self.model:
            return self.model
        is_accurate = (ACCURATE / CONFIG).exists() and self._computes_on_gpu()
        return ModelConfig.load((ACCURATE if is_accurate else SHIPPED) / CONFIG).name

    def _computes_on_gpu(self) -> bool:
        return self.resolved_runtime() == TORCH and runtimes.cuda_devices() > 0


def load(**overrides: Any) -> Settings:
    """The settings; ``overrides`` take precedence over the environment. Raises ``SettingsError`` naming the value."""
    if sys.platform != "linux":
        raise SettingsError(f"error: platform {sys.platform!r}; expected Linux, of which a container will do")
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        raise SettingsError("error: " + "; ".join(_explain(error))) from None
    if settings.runtime == TORCH and not find_spec("torch"):
        raise SettingsError("error: RUNTIME='torch'; expected PyTorch to be installed, or another runtime")
    if settings.runtime == TORCH and not runtimes.cuda_devices() and runtimes.has_gpu():
        raise SettingsError("error: RUNTIME='torch'; expected a GPU that PyTorch can use, or another runtime")
    if (settings.smtp_host is None) != (settings.smtp_to is None):
        raise SettingsError("error: SMTP_HOST and SMTP_TO go together; found only one of them")
    if settings.max_queue < settings.max_request_images:
        raise SettingsError(
            f"error: MAX_QUEUE={settings.max_queue}; expected at least MAX_REQUEST_IMAGES={settings.max_request_images}"
        )
    return settings


def _explain(error: ValidationError) -> Iterator[str]:
    """``RUNTIME='tpu'; expected …`` for each setting that is wrong."""
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
