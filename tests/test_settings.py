"""The environment, read once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from model.runtimes import cuda_devices
from settings import SettingsError, load


def test_defaults_follow_the_hardware() -> None:
    settings = load()
    assert settings.resolved_runtime() == ("torch" if cuda_devices() else "onnx-int8")
    assert settings.resolved_topology() == ("runner" if cuda_devices() else "embedded")


def test_an_environment_variable_sets_a_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_BATCH", "7")
    monkeypatch.setenv("RUNTIME", "onnx")
    assert (load().max_batch, load().resolved_runtime()) == (7, "onnx")


def test_a_runtime_that_is_not_installed_is_one_line() -> None:
    code = "import sys; sys.modules['torch'] = None; import settings; settings.load(runtime='torch')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "error: RUNTIME='torch'; expected PyTorch to be installed, or another runtime\n"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"runtime": "tpu"}, "error: RUNTIME='tpu'; expected one of auto, fastest, torch, onnx, onnx-int8"),
        ({"max_batch": 0}, "error: MAX_BATCH=0; expected greater than or equal to 1 or auto"),
        ({"max_queue": 8, "max_request_images": 9}, "error: MAX_QUEUE=8; expected at least MAX_REQUEST_IMAGES=9"),
        ({"smtp_host": "mail"}, "error: SMTP_HOST and SMTP_TO go together; found only one of them"),
    ],
)
def test_a_bad_setting_is_one_line(setting: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(**setting)
    assert str(caught.value) == message
