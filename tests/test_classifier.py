"""What is derived from outputs: probabilities, sets with a guaranteed coverage, foreign images, ensembles."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from model.artifact import FILES, ONNX, ONNX_INT8, TORCH, Artifact, Reference, seal
from model.classifier import Classifier, calibrated, fit_temperature, foreign_warning, least_familiarity, verdicts
from model.config import ModelConfig
from model.ensemble import Ensemble, EnsembleError
from model.statistics import edges
from tests import toy

CONFIG = ModelConfig(
    name="made", classes=("a", "b", "c"), input_size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), widths=(1,), temperature=2
)


def sample(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of a perfectly calibrated classifier, and labels drawn from its probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (count, 3))
    outputs = np.concatenate([logits, rng.uniform(0, 1, (count, 1))], axis=1).astype(np.float32)
    probabilities = calibrated(outputs, 2.0)
    labels = (probabilities.cumsum(axis=1) < rng.uniform(0, 1, (count, 1))).sum(axis=1).clip(0, 2)
    return outputs, labels


@pytest.fixture(scope="module")
def made() -> Classifier:
    outputs, labels = sample(4000, seed=0)
    images = np.zeros((1, 8, 8, 3), np.uint8)
    return Classifier(CONFIG, Reference(images, outputs[:1], outputs, labels, edges(images)), 0.1)


def test_probabilities_are_a_stable_tempered_softmax_of_all_outputs_but_the_last() -> None:
    outputs = np.array([[1000.0, 1001.0, 7.0], [0.0, 0.0, 9.0]], np.float32)
    assert calibrated(outputs, 1.0)[0] == pytest.approx([1 / (1 + np.e), np.e / (1 + np.e)], rel=1e-5)
    assert calibrated(outputs, 1.0)[1].tolist() == [0.5, 0.5]
    assert calibrated(outputs, 2.0)[0, 1] == pytest.approx(1 / (1 + np.exp(-0.5)), rel=1e-5)


def test_the_temperature_undoes_a_scaling_of_the_logits_and_ignores_their_level() -> None:
    rng = np.random.default_rng(0)
    outputs = rng.normal(0, 2, (20_000, 4)).astype(np.float32)
    # A label drawn from the probabilities given by the outputs.
    labels = (outputs[:, :-1] + rng.gumbel(size=(20_000, 3))).argmax(axis=1)
    for scale, level in ((1 / 8, 0), (1, 0), (1, 1000), (8, 0)):
        assert fit_temperature(outputs * scale + level, labels) == pytest.approx(scale, rel=0.05)


def test_the_temperature_of_a_perfect_network_stays_finite() -> None:
    labels = np.arange(2000) % 3
    outputs = np.append(4.0 * np.eye(3)[labels], np.zeros((2000, 1)), axis=1).astype(np.float32)
    few, many = (fit_temperature(outputs[:count], labels[:count]) for count in (20, 2000))
    # The loss is lowest where the right class has a probability of 21 / 22: 4 / T = log(2 * 21).
    assert few == pytest.approx(4 / np.log(42), rel=0.01)
    assert many == pytest.approx(4 / np.log(4002), rel=0.01)


def test_predictions_name_the_class_and_flag_foreign_images(made: Classifier) -> None:
    first, second = made(np.array([[0, 5, 0, 0.9], [5, 0, 0, 0.05]], np.float32))
    assert (first.class_index, first.class_name, first.in_distribution) == (1, "b", True)
    assert (second.class_name, second.in_distribution) == ("a", False)
    assert first.confidence == max(first.rounded)
    assert first.rounded == pytest.approx(first.probabilities.tolist(), abs=1e-8)


def test_the_promised_share_of_ordinary_images_is_called_foreign(made: Classifier) -> None:
    outputs, _ = sample(4000, seed=1)
    assert np.mean([not p.in_distribution for p in made(outputs)]) == pytest.approx(0.1, abs=0.02)


def test_an_image_as_familiar_as_every_validation_image_is_not_foreign() -> None:
    outputs, labels = sample(100, seed=1)
    outputs[:, -1] = 1
    blank = np.zeros((1, 8, 8, 3), np.uint8)
    alike = Classifier(CONFIG, Reference(blank, outputs[:1], outputs, labels, edges(blank)))
    assert all(p.in_distribution for p in alike(outputs))


def test_few_validation_images_do_not_raise_the_share_called_foreign() -> None:
    rng = np.random.default_rng(0)
    for count in (3, 15, 19, 100):
        shares = [
            (rng.uniform(size=500) < least_familiarity(rng.uniform(size=(count, 1)), 0.05)).mean() for _ in range(500)
        ]
        assert np.mean(shares) <= 0.055, count
    assert least_familiarity(rng.uniform(size=(18, 1)), 0.05) == -np.inf


@pytest.mark.parametrize(("images", "rate", "needed"), [(18, 0.05, 19), (19, 0.05, 0), (98, 0.01, 99), (99, 0.01, 0)])
def test_the_foreign_warning_says_how_many_images_are_needed(images: int, rate: float, needed: int) -> None:
    warning = foreign_warning(images, rate)
    assert warning.endswith(f"expected at least {needed}") if needed else warning == ""
    outputs = np.zeros((images, 1), np.float32)
    assert (least_familiarity(outputs, rate) == -np.inf) == bool(warning)


@pytest.mark.parametrize("images", [8, 19, 98, 99])
def test_the_prediction_set_warning_names_the_highest_usable_level(images: int) -> None:
    outputs, labels = sample(images, seed=1)
    blank = np.zeros((1, 8, 8, 3), np.uint8)
    few = Classifier(CONFIG, Reference(blank, outputs[:1], outputs, labels, edges(blank)))
    warning = re.search(r"above ([\d.]+)% a prediction set holds every class$", few.prediction_set_warning)
    assert bool(warning) is (images < 99)
    if warning:
        certain = np.array([1, 0, 0], np.float32)
        highest = float(warning[1]) / 100
        assert few.prediction_set(certain, highest + 0.001) == [0, 1, 2]
        assert few.prediction_set(certain, highest - 0.001) == [0]


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_sets_contain_the_true_class_as_often_as_promised(level: float, made: Classifier) -> None:
    outputs, labels = sample(4000, seed=2)
    predictions = made(outputs)
    sets = [made.prediction_set(p.probabilities, level) for p in predictions]
    coverage = np.mean([label in s for label, s in zip(labels.tolist(), sets, strict=True)])
    assert all(p.class_index in s for p, s in zip(predictions, sets, strict=True))
    # The likeliest class is always included, even if that exceeds the level.
    right = np.mean([p.class_index == label for p, label in zip(predictions, labels.tolist(), strict=True)])
    assert coverage == pytest.approx(max(level, right), abs=0.02)


def test_higher_levels_give_larger_sets_up_to_every_class(made: Classifier) -> None:
    probabilities = np.array([0.6, 0.3, 0.1], np.float32)
    sizes = [len(made.prediction_set(probabilities, level)) for level in (0.5, 0.9, 0.97, 0.99999)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert made.prediction_set(probabilities, 0.99999) == [0, 1, 2]


class TestEnsemble:
    @pytest.fixture(scope="class")
    @staticmethod
    def other(toy_artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
        """The same network under another name, with lower confidence."""
        path = shutil.copytree(toy_artifact.path, tmp_path_factory.mktemp("other") / "artifact")
        changes = {"name": "other", "temperature": 10 * toy_artifact.config.temperature}
        toy_artifact.config.model_copy(update=changes).save(path / "config.json")
        return seal(path, {key: value for key, value in toy_artifact.card.items() if key != "files"})

    @pytest.mark.parametrize("name", [ONNX, ONNX_INT8])
    def test_its_probabilities_are_the_mean_of_its_members(
        self, name: str, toy_artifact: Artifact, other: Artifact
    ) -> None:
        ensemble = Ensemble([toy_artifact, other])
        images = toy_artifact.reference(ONNX).images
        together = calibrated(ensemble.engine(name)(images), 1.0)
        alone = [calibrated(Ensemble([a]).engine(name)(images), a.config.temperature) for a in (toy_artifact, other)]
        assert np.abs(alone[0] - alone[1]).max() > 0.1
        assert np.abs(together - np.mean(alone, axis=0)).max() < 1e-4

    def test_the_mean_is_recalibrated(self, toy_artifact: Artifact, other: Artifact) -> None:
        """One member is far less confident than it is accurate, and so is the mean."""
        ensemble = Ensemble([toy_artifact, other])
        reference = ensemble.reference(ONNX)
        alone = calibrated(reference.validation, 1.0).max(axis=1).mean()
        together = calibrated(reference.validation, ensemble.config.temperature).max(axis=1).mean()
        right = (verdicts(reference.validation) == reference.labels).mean()
        assert alone < 0.9
        assert abs(together - right) < abs(alone - right) / 2
        assert Ensemble([toy_artifact]).config == toy_artifact.config

    def test_it_is_verified_and_calibrated_as_one_model(self, toy_artifact: Artifact, other: Artifact) -> None:
        ensemble = Ensemble([toy_artifact, other])
        reference = ensemble.reference(ONNX)
        assert np.abs(ensemble.engine(ONNX)(reference.images) - reference.outputs).max() < 0.01
        assert reference.validation.shape == (len(reference.labels), 4)
        maps = [Ensemble(a).engine(ONNX).evidence(reference.images) for a in ([toy_artifact], [toy_artifact, other])]
        assert np.abs(maps[0] - maps[1]).max() < 1e-5  # two copies of the same network

    def test_its_familiarity_is_the_mean_of_its_members(self, toy_artifact: Artifact, other: Artifact) -> None:
        outputs = toy_artifact.reference(ONNX).outputs
        together = Ensemble([toy_artifact, other]).combine([outputs, outputs + 0.5])
        assert together[:, -1] == pytest.approx(outputs[:, -1] + 0.25)

    def test_certain_members_stay_certain(self, toy_artifact: Artifact) -> None:
        """Their other probabilities are 0, of which there is no logarithm."""
        together = Ensemble([toy_artifact] * 2).combine([1000 * toy_artifact.reference(ONNX).outputs] * 2)
        assert np.isfinite(together).all()
        assert calibrated(together, 1.0).max(axis=1) == pytest.approx(1, abs=1e-6)

    def test_it_runs_on_what_every_member_has_a_file_for(self, toy_artifact: Artifact, tmp_path: Path) -> None:
        path = shutil.copytree(toy_artifact.path, tmp_path / "artifact")
        (path / FILES[ONNX_INT8]).unlink()
        lean = seal(path, {"training": toy_artifact.card["training"]})
        assert Ensemble([toy_artifact, lean]).runtimes == Ensemble([lean, toy_artifact]).runtimes == [TORCH, ONNX]

    def test_members_trained_on_other_data_are_refused(self, toy_artifact: Artifact, tmp_path: Path) -> None:
        path = shutil.copytree(toy_artifact.path, tmp_path / "artifact")
        training = {**toy_artifact.card["training"], "data_sha256": "0" * 64}
        stranger = seal(path, {"training": training})
        with pytest.raises(EnsembleError, match="trained on other data"):
            Ensemble([toy_artifact, stranger])

    @pytest.mark.parametrize("changes", [{"classes": ("x", "y", "z")}, {"input_size": (toy.SIDE, 2 * toy.SIDE)}])
    def test_a_shadow_must_have_the_same_inputs_and_classes(
        self, changes: dict[str, object], toy_artifact: Artifact, tmp_path: Path
    ) -> None:
        path = shutil.copytree(toy_artifact.path, tmp_path / "artifact")
        toy_artifact.config.model_copy(update=changes).save(path / "config.json")
        stranger = Ensemble([seal(path, {"training": toy_artifact.card["training"]})])
        with pytest.raises(EnsembleError, match="expected those of the model"):
            Ensemble([toy_artifact]).expect_interchangeable(stranger)
        assert toy_artifact.config.classes == toy.CLASSES
