"""The settings, read once from the environment."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from model.artifact import ACCURATE, CONFIG, SHIPPED
from model.config import ModelConfig
from model.gpus import PROBED, cuda_devices
from settings import SettingsError, load
from tests.live import environment, python, serve

DRIVER = """
class NVMLError(Exception): pass
class NVMLError_LibraryNotFound(NVMLError): pass
class NVMLError_DriverNotLoaded(NVMLError): pass
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlDeviceGetCount(): {answer}
"""
"""A fake ``pynvml`` that reports a driver on a machine where torch cannot use the GPU."""


def test_defaults_follow_the_hardware() -> None:
    settings = load()
    assert settings.resolved_runtime() == ("torch" if cuda_devices() else "onnx-int8")
    assert settings.resolved_topology(settings.resolved_runtime()) == ("runner" if cuda_devices() else "embedded")


def test_an_environment_variable_sets_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_BATCH", "7")
    monkeypatch.setenv("RUNTIME", "onnx")
    assert (load().max_batch, load().resolved_runtime()) == (7, "onnx")


def test_a_runtime_that_is_not_installed_is_one_clear_line(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; import settings; settings.load(runtime='torch')"
    said = python(tmp_path, "-c", code, code=1).stderr
    assert said == "error: RUNTIME='torch'; expected PyTorch to be installed, or another runtime\n"


def driver(folder: Path, answer: str) -> str:
    """Write the fake driver and return its folder for ``PYTHONPATH``."""
    (folder / "pynvml.py").write_text(DRIVER.format(answer=answer))
    return str(folder)


def loaded(folder: Path, code: str, answer: str = "return 1") -> subprocess.CompletedProcess[str]:
    """Run ``code`` after ``import settings`` on a machine whose GPU its torch cannot use."""
    env = environment(folder, PYTHONPATH=driver(folder, answer))
    del env["CUDA_VISIBLE_DEVICES"]
    command = [sys.executable, "-c", f"import settings; {code}"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_an_unusable_gpu_is_reported_and_the_cpu_serves(tmp_path: Path) -> None:
    done = loaded(tmp_path, "s = settings.load(); r = s.resolved_runtime(); print(r, s.resolved_topology(r))")
    assert done.stdout == "onnx-int8 embedded\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("torch cannot use the GPU of this machine: ")
    assert len(line) > 60, "which says why"


@pytest.mark.parametrize("answer", ["return 1", "raise NVMLError('Driver/library version mismatch')"])
def test_torch_requested_by_name_does_not_start_on_an_unusable_gpu(answer: str, tmp_path: Path) -> None:
    done = loaded(tmp_path, "settings.load(runtime='torch')", answer)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: RUNTIME='torch'; expected a GPU that PyTorch can use, or another runtime"
    )


TORCH = """
class cuda:
    device_count = staticmethod(lambda: 3)
class zeros:
    def __init__(self, count, device):
        if device == "cuda:1":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\\nCompile with")
    def add(self, number): return self
    def cpu(self): return self
"""
"""A torch too new for the second of three GPUs."""


def test_gpus_are_used_up_to_the_first_unusable_one(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    done = loaded(tmp_path, "print(settings.gpus.cuda_devices())", "return 3")
    assert done.stdout == "1\n"
    assert done.stderr == (
        "torch cannot use GPU 1, nor those after it: "
        "CUDA error: no kernel image is available for execution on the device\n"
    )


def test_child_processes_do_not_probe_the_gpus_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROBED, "3")
    assert cuda_devices() == 3


@pytest.mark.parametrize(
    ("gpus", "settings", "directory"),
    [
        ("0", {}, SHIPPED),
        ("1", {}, ACCURATE if ACCURATE.exists() else SHIPPED),
        ("1", {"runtime": "onnx-int8"}, SHIPPED),
    ],
)
def test_the_default_on_a_gpu_is_the_accurate_model(
    gpus: str, settings: dict[str, str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROBED, gpus)
    name = ModelConfig.load(directory / CONFIG).name
    assert load(**settings).resolved_model() == name
    assert load(**settings, model="mine:1").resolved_model() == "mine:1"


def test_a_driver_that_does_not_answer_does_not_stop_a_cpu_server(tmp_path: Path) -> None:
    path = driver(tmp_path, "raise NVMLError('Driver/library version mismatch')")
    with serve("embedded", tmp_path, PYTHONPATH=path, RUNTIME="auto", CUDA_VISIBLE_DEVICES="0", WORKERS=1):
        pass  # reached only if the server becomes ready


def test_there_are_at_most_as_many_workers_as_usable_cpus(tmp_path: Path) -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "import service; print(service.deployment.workers)"
    )
    assert python(tmp_path, "-c", code).stdout == "1\n"


def test_there_are_at_most_as_many_workers_as_the_quota_allows(tmp_path: Path) -> None:
    code = (
        "from serving import cpus; cpus.cpu_quota = lambda root: 1.9; import service; print(service.deployment.workers)"
    )
    assert python(tmp_path, "-c", code).stdout == "1\n"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"runtime": "tpu"}, "error: RUNTIME='tpu'; expected one of auto, fastest, torch, onnx, onnx-int8"),
        ({"max_batch": 0}, "error: MAX_BATCH=0; expected greater than or equal to 1 or auto"),
        ({"max_queue": "0"}, "error: MAX_QUEUE='0'; expected greater than or equal to 1"),
        ({"max_queue": 8, "max_request_images": 9}, "error: MAX_QUEUE=8; expected at least MAX_REQUEST_IMAGES=9"),
        ({"workers": "many"}, "error: WORKERS='many'; expected a valid integer or cpu_count"),
        ({"workers": "0"}, "error: WORKERS='0'; expected greater than or equal to 1 or cpu_count"),
        ({"drain_seconds": "inf"}, "error: DRAIN_SECONDS='inf'; expected a finite number"),
        ({"smtp_host": "mail"}, "error: SMTP_HOST and SMTP_TO go together; found only one of them"),
        (
            {"log_directory": "/proc/logs"},
            "error: LOG_DIRECTORY='/proc/logs'; expected a directory that can be written",
        ),
    ],
)
def test_a_bad_setting_is_one_clear_line(setting: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(**setting)
    assert str(caught.value) == message


def test_folders_with_user_data_are_only_readable_by_their_owner(tmp_path: Path) -> None:
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    chosen.chmod(0o750)
    mask = os.umask(0o022)
    load(audit_directory=tmp_path / "new" / "audit", review_directory=chosen, log_directory=tmp_path / "log")
    os.umask(mask)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new/audit", chosen, tmp_path / "log")}
    assert list(modes.values()) == [0o700, 0o750, 0o755]
