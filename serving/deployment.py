"""What a server serves, and how: resolved once from the settings, the model store and the machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from model import runtimes, store
from model.artifact import TORCH, Artifact, ArtifactError, Outputs
from model.ensemble import Ensemble, EnsembleError
from model.gpus import cuda_devices
from model.preprocess import Pixels
from model.runtimes import Runtime
from model.tuning import compare
from serving.access import AccessError
from serving.cpus import usable_cpus
from serving.keys import Keys
from serving.shadow import Shadowed
from serving.usage import Usage
from settings import Settings, SettingsError

logger = logging.getLogger("classifier.deployment")

MEASURED = "RUNTIME_MEASURED"
"""Environment variable that tells the workers what was measured before they started."""


@dataclass(frozen=True)
class Deployment:
    """The same in every process of a server: the first one resolves it, the workers follow through the environment."""

    settings: Settings
    tags: tuple[str, ...]
    """``name:version`` of the model that answers; of each member, if it is an ensemble."""
    shadow: str | None
    """``name:version`` of the shadow model."""
    runtime: str
    measured: dict[str, Any] | None
    """The ``Comparison`` by which ``RUNTIME=fastest`` chose ``runtime``."""
    topology: str
    cores: int
    """Whole CPUs available to this process, by its affinity and its quota."""
    workers: int
    gpus: int
    """GPUs that ``runtime`` computes on."""
    keys: Keys | None
    usage: Usage | None

    @classmethod
    def resolve(cls, settings: Settings, is_worker: bool) -> Deployment:
        """Decide everything that ``settings`` leave open; raises ``SettingsError``, one line, for what is impossible.

        Unless ``is_worker``, it also loads the models, so that an error is one line, not a traceback of every worker,
        and sets the environment from which the workers resolve the same.
        """
        model = settings.model or store.packed() or settings.resolved_model()
        with _errors_in_one_line(model, settings.shadow):
            tags = tuple(store.resolve_all(model))
            shadow = store.resolve(settings.shadow) if settings.shadow else None
            keys = Keys(settings.api_keys, is_running=is_worker) if settings.api_keys else None
            usage = Usage(settings.usage_file, is_running=is_worker) if keys else None
            # Last, because it may take half a minute of measuring, after which no other setting should stop the start.
            runtime, measured = _inherited(settings) if is_worker else _choose_runtime(settings, tags, shadow)
        cores = usable_cpus()
        deployment = cls(
            settings=settings,
            tags=tags,
            shadow=shadow,
            runtime=runtime,
            measured=measured,
            topology=settings.resolved_topology(runtime),
            cores=cores,
            workers=cores if settings.workers == "cpu_count" else settings.workers,
            gpus=cuda_devices() if runtime == TORCH else 0,
            keys=keys,
            usage=usage,
        )
        if not is_worker:
            deployment._hand_down()
        return deployment

    def _hand_down(self) -> None:
        if self.runtime == TORCH and not self.gpus:
            logger.warning("RUNTIME='torch' finds no GPU and computes on the CPU, slower than the other runtimes")
        os.environ.update({"MODEL": self.tag, "SHADOW": self.shadow or "", "RUNTIME": self.runtime})
        if self.measured:
            os.environ[MEASURED] = orjson.dumps(self.measured).decode()
        if self.usage:
            os.environ["USAGE_FILE"] = str(self.usage.file)

    @property
    def tag(self) -> str:
        """What replies name as their model."""
        return ",".join(self.tags)

    def load_models(self) -> tuple[Ensemble, Ensemble | None]:
        """The models that answer, and the shadow model if there is one."""
        return _load(self.tags, self.shadow)

    def start_engine(
        self, worker: int, served: Ensemble, shadow: Ensemble | None
    ) -> tuple[Runtime, Callable[[Pixels], Outputs]]:
        """The warmed-up engine of ``worker`` (from 1), and how to infer with it: shadowed if there is a shadow model.

        It may be wrong; readiness will tell. A worker that exited here would be restarted for ever.
        """
        device = (worker - 1) % max(1, self.gpus)
        engine = served.engine(self.runtime, self.settings.threads, device)
        engine(served.reference(self.runtime).images)
        if shadow is None:
            return engine, engine
        return engine, Shadowed(engine, shadow.engine(self.runtime, self.settings.threads, device))

    def card(self, served: Ensemble) -> dict[str, Any]:
        """The document of ``GET /model``."""
        cards = [_describe(artifact) for artifact in served.artifacts]
        members = {"members": cards} if len(cards) > 1 else {}
        about = {
            "runtime": self.runtime,
            "topology": self.topology,
            "shadow": self.shadow,
            "measured": self.measured,
        }
        return {**cards[0], **about, **members}


@contextmanager
def _errors_in_one_line(model: str, shadow: str | None) -> Iterator[None]:
    try:
        yield
    except (store.StoreError, ArtifactError, EnsembleError, OSError) as error:  # OSError: from the disk
        asked = f"MODEL={model!r}" + (f", SHADOW={shadow!r}" if shadow else "")
        raise SettingsError(f"error: {asked}: {error}") from None
    except (runtimes.RuntimeUnavailableError, AccessError) as error:
        raise SettingsError(f"error: {error}") from None


def _inherited(settings: Settings) -> tuple[str, dict[str, Any] | None]:
    """The runtime that the first process chose, and what it measured."""
    return settings.resolved_runtime(), orjson.loads(os.environ.get(MEASURED, "null"))


def _choose_runtime(settings: Settings, tags: tuple[str, ...], shadow: str | None) -> tuple[str, dict[str, Any] | None]:
    """A runtime that the models can be loaded for, and what was measured to choose it."""
    served, shadowing = _load(tags, shadow)
    available = [name for name in served.runtimes if shadowing is None or name in shadowing.runtimes]
    runtime, measured = settings.resolved_runtime(available), None
    if runtime == "fastest":
        comparison = compare(served, settings.threads, [name for name in available if name != TORCH])
        runtime, measured = comparison.fastest, comparison._asdict()
    served.reference(runtime)  # raises here, in one line, what would be a traceback of every worker
    return runtime, measured


def _load(tags: tuple[str, ...], shadow: str | None) -> tuple[Ensemble, Ensemble | None]:
    served = Ensemble([store.get(tag) for tag in tags])
    shadowing = Ensemble([store.get(shadow)]) if shadow else None
    if shadowing:
        served.expect_interchangeable(shadowing)
    return served, shadowing


def _describe(artifact: Artifact) -> dict[str, Any]:
    config = artifact.config
    return {
        "name": config.name,
        "version": artifact.version,
        "classes": config.classes,
        "input_size": config.input_size,
        "temperature": config.temperature,
        **{key: value for key, value in artifact.card.items() if key != "files"},
    }
