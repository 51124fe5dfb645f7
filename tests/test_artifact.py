"""The artifact on disk, its runtimes, and their verification."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from model.artifact import (
    CARD,
    CONFIG,
    HASHED,
    ONNX,
    REFERENCE,
    RUNTIMES,
    Artifact,
    ArtifactError,
    save_reference,
    seal,
)
from model.config import ConfigError, ModelConfig
from model.runtimes import EngineLostError, OnnxRuntime, RuntimeUnavailableError, TorchRuntime, create
from model.verification import TOLERANCE, VerificationError, check, verify
from tests import toy


@pytest.fixture
def copied(toy_artifact: Artifact, tmp_path: Path) -> Path:
    return shutil.copytree(toy_artifact.path, tmp_path / "artifact")


@pytest.mark.parametrize("name", HASHED)
def test_one_flipped_byte_in_any_file_is_detected_and_the_file_named(name: str, copied: Path) -> None:
    content = bytearray((copied / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copied / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        Artifact.load(copied)


@pytest.mark.parametrize("name", [*HASHED, CARD])
def test_a_missing_file_is_refused_and_named(name: str, copied: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(ArtifactError, match=f"not a whole artifact: .*{re.escape(name)}: No such file"):
        Artifact.load(copied)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", "JSONDecodeError("),
        ("[]", "TypeError("),
        ("{}", "KeyError('files')"),
        ('{"files": {}}', "KeyError('config.json')"),
    ],
)
def test_a_card_that_does_not_list_every_file_is_refused_and_named(content: str, error: str, copied: Path) -> None:
    (copied / CARD).write_text(content)
    with pytest.raises(ArtifactError, match=re.escape(f"{CARD}: not that of a whole artifact: {error}")):
        Artifact.load(copied)


def test_a_file_in_place_of_a_folder_is_refused_and_named(copied: Path) -> None:
    with pytest.raises(ArtifactError, match=rf"not a whole artifact: .*{CONFIG}/{CARD}: Not a directory"):
        Artifact.load(copied / CONFIG)


def test_references_of_too_old_a_version_are_refused_with_the_way_out(copied: Path) -> None:
    with np.load(copied / REFERENCE) as arrays:
        older = {name: arrays[name] for name in arrays.files if name != "edges"}
    np.savez(copied / REFERENCE, allow_pickle=False, **older)
    with pytest.raises(ArtifactError, match=f"{REFERENCE}: edges .*; expected it: export anew"):
        seal(copied, {}).reference(ONNX)


def test_the_version_follows_from_the_content(toy_artifact: Artifact, copied: Path) -> None:
    assert Artifact.load(copied).version == toy_artifact.version
    assert re.fullmatch("[0-9a-f]{12}", toy_artifact.version)
    assert seal(copied, {**toy_artifact.card, "note": "another"}).version != toy_artifact.version


def test_the_numbers_of_a_list_are_on_one_line_of_the_card(toy_artifact: Artifact, copied: Path) -> None:
    """Of a thousand classes, the confusion matrices alone were 39 MB."""
    noted = {"matrix": [[1, 0], [0, -2]], "shares": [0.25, 1e-05], "texts": ["a\n 1", "[\n 2]"], "none": []}
    card = {**toy_artifact.card, "note": noted}
    sealed = seal(copied, card)
    assert {**sealed.card, "files": None} == {**card, "files": None}
    written = (copied / CARD).read_text()
    assert '"matrix": [\n      [1,0],\n      [0,-2]],\n' in written
    assert '"shares": [0.25,1e-05],\n' in written


def test_nearly_identical_familiarities_keep_their_order(toy_artifact: Artifact, copied: Path) -> None:
    """With a fixed camera, all familiarities are 1 up to the fifth digit."""
    full = toy_artifact.reference(ONNX)
    validation = full.validation.copy()
    validation[:, -1] = np.linspace(0.9999, 1.0001, len(validation))
    save_reference(copied, full._replace(validation=validation), full)
    kept = seal(copied, toy_artifact.card).reference(ONNX)
    np.testing.assert_array_equal(kept.validation, validation)


def test_no_file_is_a_pickle(toy_artifact: Artifact) -> None:
    with np.load(toy_artifact.path / "reference.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_reproduces_the_reference(name: str, toy_artifact: Artifact) -> None:
    verify(create(name, toy_artifact), toy_artifact.reference(name))


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("count", [1, 3, 40])
def test_any_batch_size_gives_the_same_answers(name: str, count: int, toy_artifact: Artifact) -> None:
    runtime = create(name, toy_artifact)
    images = np.resize(toy_artifact.reference(ONNX).images, (count, toy.SIDE, toy.SIDE, 3))
    outputs = runtime(images)
    assert outputs.shape == (count, 4)
    assert outputs.dtype == np.float32
    alone = np.concatenate([runtime(image[None]) for image in images])
    assert np.abs(outputs - alone).max() < 1e-3


def test_wrong_weights_layout_nan_and_a_single_output_fail_the_check(toy_artifact: Artifact) -> None:
    runtime = OnnxRuntime(toy_artifact.file(ONNX), ONNX)
    reference = toy_artifact.reference(ONNX)
    images, expected = reference.images, reference.outputs
    one_off = expected.copy()
    one_off[0, 0] += 0.02
    for wrong in (runtime(images[..., ::-1]), runtime(images[:, ::-1]), expected * np.nan, expected[:, :2], one_off):
        with pytest.raises(VerificationError):
            check(wrong, reference, ONNX)


def test_tolerances_are_far_below_what_separates_classes(toy_artifact: Artifact) -> None:
    logits = np.sort(toy_artifact.reference(ONNX).outputs[:, :-1], axis=1)
    assert max(TOLERANCE.values()) < np.median(logits[:, -1] - logits[:, -2])


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_evidence_sums_to_the_logits(name: str, toy_artifact: Artifact) -> None:
    runtime = create(name, toy_artifact)
    images = toy_artifact.reference(ONNX).images
    evidence = runtime.evidence(images)
    assert evidence.shape[0] == len(images)
    assert evidence.shape[3] == 3
    assert np.abs(evidence.sum(axis=(1, 2)) - runtime(images)[:, :-1]).max() < 1e-3
    assert np.abs(evidence).std(axis=(1, 2)).min() > 0  # evidence varies over the image


def test_a_cuda_error_loses_the_engine_and_lack_of_memory_does_not(toy_artifact: Artifact) -> None:
    """Raised inside the network, as they would be on a GPU."""
    runtime = TorchRuntime(toy_artifact)

    def fail(error: Exception) -> Callable[..., None]:
        def hook(*_: object) -> None:
            raise error

        return hook

    images = toy_artifact.reference(ONNX).images
    for error, expected in (
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), EngineLostError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ):
        hook = runtime._network.register_forward_pre_hook(fail(error))
        with pytest.raises(expected, match="CUDA"):
            runtime(images)
        hook.remove()
    runtime(images)


def test_an_unknown_runtime_names_the_known_ones(toy_artifact: Artifact) -> None:
    with pytest.raises(RuntimeUnavailableError, match="'tpu'; expected one of torch, onnx, onnx-int8"):
        create("tpu", toy_artifact)


def test_a_config_error_names_file_and_field(tmp_path: Path, toy_artifact: Artifact) -> None:
    path = tmp_path / "config.json"
    path.write_text(toy_artifact.config.model_dump_json().replace('"temperature":', '"temprature":'))
    with pytest.raises(ConfigError, match="temprature"):
        ModelConfig.load(path)


def test_an_artifact_with_an_invalid_config_is_refused(toy_artifact: Artifact, copied: Path) -> None:
    toy_artifact.config.model_copy(update={"temperature": -1.0}).save(copied / CONFIG)
    seal_anyway = {name: {"sha256": hashlib.sha256((copied / name).read_bytes()).hexdigest()} for name in HASHED}
    (copied / CARD).write_text(json.dumps({**toy_artifact.card, "files": seal_anyway}))
    with pytest.raises(ArtifactError, match="temperature"):
        Artifact.load(copied)
