"""Networks trained elsewhere, from their ONNX file to a server that answers with them."""

from __future__ import annotations

import copy
import functools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import requests
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import train.convert
import train.export
from model.artifact import FILES, ONNX, ONNX_INT8, Artifact
from model.ensemble import Ensemble, _on_grid
from model.explain import VIEWS
from model.network import NEIGHBOURS
from model.runtimes import OnnxRuntime, create
from tests import toy
from tests.live import encode, failed_start, picture, serve, store_model
from train import graphs
from train.data import Data, load
from train.export import BANK_IMAGES, ParityError, complete, evenly_spaced
from train.measure import THREADS

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NORMALISED = ("--mean", "0.5,0.4,0.3", "--std", "0.2,0.25,0.3")
SIZE = (toy.SIDE, toy.SIDE)


class Pooled(nn.Module):
    """Ends like a ResNet: a global average and one linear layer. Its first layer halves the image."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, 3)

    def features(self, x: Tensor) -> Tensor:
        maps: Tensor = self.maps(x)
        return torch.flatten(nn.functional.adaptive_avg_pool2d(maps, 1), 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


class Doubled(Pooled):
    """Ends nearly so: its head says half of what it adds."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.head.bias, self.features(x), self.head.weight.T, alpha=2.0)


class Shifted(Pooled):
    """Ends nearly so: the bias of its head depends on the image."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return torch.addmm(self.head.bias * features.mean(1, keepdim=True), features, self.head.weight.T)


class Ordinal(Pooled):
    """Ends nearly so: one score, to which each class adds its own threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 1, bias=False)
        self.thresholds = nn.Parameter(torch.tensor([-0.5, 0.0, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.thresholds


class Oblong(Pooled):
    """Ends nearly so: the cells of its last maps are twice as wide as high."""

    def __init__(self) -> None:
        super().__init__()
        self.maps.append(nn.MaxPool2d((1, 2)))


class Quartered(Pooled):
    """Ends nearly so: averages each quarter of its maps."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 32, 3)

    def features(self, x: Tensor) -> Tensor:
        return torch.flatten(nn.functional.avg_pool2d(self.maps(x), 3), 1)


class Flat(nn.Module):
    """Ends like a VGG: linear layers on all places."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.maps(x))
        return logits


def normalised(images: Any) -> Tensor:
    """(N, H, W, 3) uint8 to what the networks take."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    scaled: Tensor = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
    return scaled


@pytest.fixture(scope="module")
def data(toy_folder: Path) -> Data:
    return load(str(toy_folder), SIZE)


@pytest.fixture(scope="module")
def network(data: Data) -> Pooled:
    """Trained for seconds, well above chance."""
    torch.manual_seed(0)
    model = Pooled()
    images, labels = normalised(data.train.images), torch.from_numpy(data.train.labels)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(30):
        for chosen in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.eval()


def write(model: nn.Module, path: Path, dynamo: bool = False, **options: Any) -> Path:
    if dynamo:
        options = {"dynamic_shapes": ({0: torch.export.Dim("N")},), "verbose": False}
    else:
        options = {"input_names": ["input.1"], "dynamic_axes": {"input.1": {0: "batch"}}} | options
    path.parent.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (torch.zeros(2, 3, *SIZE),), path, dynamo=dynamo, **options)
    return path


def convert(source: Path, folder: Path, out: Path, *options: str, code: int = 0) -> str:
    return toy.run("train.convert", source, folder, "--name", "own", "--out", out, *NORMALISED, *options, code=code)


@pytest.fixture(scope="module")
def artifact(network: Pooled, toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("own")
    printed = convert(write(network, path / "own.onnx"), toy_folder, path / "artifact")
    assert "no evidence" not in printed
    return Artifact.load(path / "artifact")


@torch.no_grad()
def assert_computes(artifact: Artifact, network: Pooled, data: Data) -> None:
    """The logits, the familiarity and the evidence are those of ``network``."""
    engine = create(ONNX, artifact)
    images, shown = data.test.images, normalised(data.test.images)
    outputs = engine(images)
    np.testing.assert_allclose(outputs[:, :-1], network(shown), atol=1e-4)
    bank = nn.functional.normalize(network.features(normalised(evenly_spaced(data.train.images, BANK_IMAGES))))
    similarity = (nn.functional.normalize(network.features(shown)) @ bank.T).sort(dim=1, descending=True).values
    np.testing.assert_allclose(outputs[:, -1], similarity[:, NEIGHBOURS - 1], atol=1e-5)
    evidence = engine.evidence(images)
    assert evidence.shape == (len(images), 6, 6, 3)
    np.testing.assert_allclose(evidence.sum(axis=(1, 2)), network(shown), atol=1e-4)
    places = torch.einsum("nchw,kc->nhwk", network.maps(shown), network.head.weight)
    np.testing.assert_allclose(evidence * 36 - network.head.bias.numpy(), places, atol=1e-3)


def test_the_artifact_computes_what_the_network_does(artifact: Artifact, network: Pooled, data: Data) -> None:
    assert_computes(artifact, network, data)
    assert artifact.config.classes == toy.CLASSES
    assert artifact.config.stride == 4
    assert artifact.runtimes == (ONNX, ONNX_INT8)
    record = artifact.card["training"]
    assert record["network"] == "own.onnx"
    assert record["parameters"] >= sum(p.numel() for p in network.parameters()) - 3 * 64  # BatchNorm may be folded
    assert artifact.card["validation"]["agreement"] > 0.9


def test_a_file_of_torchs_new_exporter_is_converted_alike(
    network: Pooled, data: Data, toy_folder: Path, tmp_path: Path
) -> None:
    source = write(network, tmp_path / "own.onnx", dynamo=True)
    convert(source, toy_folder, tmp_path / "artifact", "--no-int8")
    assert_computes(Artifact.load(tmp_path / "artifact"), network, data)


def test_probabilities_are_traced_back_to_logits(network: Pooled, data: Data, toy_folder: Path, tmp_path: Path) -> None:
    source = write(nn.Sequential(network, nn.Softmax(dim=1)), tmp_path / "own.onnx")
    convert(source, toy_folder, tmp_path / "artifact", "--no-int8")
    assert_computes(Artifact.load(tmp_path / "artifact"), network, data)


class Last(nn.Module):
    """Takes images (N, height, width, 3), as Keras does."""

    def __init__(self, network: Pooled) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.permute(0, 3, 1, 2))
        return logits


def write_for(shape: tuple[int, ...], model: nn.Module, dynamic: dict[int, str], path: Path) -> Path:
    """Export ``model`` for images of ``shape``, whose dimensions ``dynamic`` may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": dynamic}
        torch.onnx.export(model.eval(), (torch.zeros(shape),), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    return path


class Bytes(Last):
    """Takes pixels from 0 to 255, and normalises them itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x / 255 - torch.tensor(MEAN)) / torch.tensor(STD))


class Caffe(Last):
    """Takes pixels from 0 to 255 less their mean, blue first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(3) / 255 / torch.tensor(STD))


BYTE = "0.00392157,0.00392157,0.00392157"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Bytes, ["--mean", "0,0,0", "--std", BYTE]),
        (Caffe, ["--std", BYTE, "--bgr"]),
    ],
)
def test_pixels_may_go_to_255_and_blue_may_be_first(
    kind: type[Last], options: list[str], network: Pooled, data: Data, toy_folder: Path, tmp_path: Path
) -> None:
    source = write_for((2, *SIZE, 3), kind(network), {0: "N"}, tmp_path / "own.onnx")
    convert(source, toy_folder, tmp_path / "artifact", "--no-int8", *options)
    assert_computes(Artifact.load(tmp_path / "artifact"), network, data)


@pytest.mark.parametrize("dynamic", [{0: "N"}, {0: "N", 1: "height", 2: "width"}])
def test_a_network_that_takes_channels_last_is_converted_alike(
    dynamic: dict[int, str], network: Pooled, data: Data, toy_folder: Path, tmp_path: Path
) -> None:
    source = write_for((2, *SIZE, 3), Last(network), dynamic, tmp_path / "own.onnx")
    convert(source, toy_folder, tmp_path / "artifact", "--no-int8", "--size", str(toy.SIDE))
    assert_computes(Artifact.load(tmp_path / "artifact"), network, data)


def test_minus_one_stands_for_any_number_of_images(
    network: Pooled, data: Data, toy_folder: Path, tmp_path: Path
) -> None:
    """As Paddle's exporter writes it."""
    model = onnx.load(write(network, tmp_path / "own.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    onnx.save(model, tmp_path / "own.onnx")
    convert(tmp_path / "own.onnx", toy_folder, tmp_path / "artifact", "--no-int8")
    assert_computes(Artifact.load(tmp_path / "artifact"), network, data)


class Half(nn.Module):
    """Computes in FP16, as on a GPU; its probabilities are cast and reshaped behind the softmax."""

    def __init__(self, network: Pooled) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).half()

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.network(x.half()), 1).float().reshape(-1, 3)


@torch.no_grad()
@pytest.mark.parametrize("dynamo", [False, True])
def test_a_network_in_fp16_is_traced_back_to_its_logits_and_maps(
    dynamo: bool, network: Pooled, data: Data, toy_folder: Path, tmp_path: Path
) -> None:
    source = write(Half(network), tmp_path / "own.onnx", dynamo=dynamo)
    printed = convert(source, toy_folder, tmp_path / "artifact", "--no-int8")
    assert "no evidence" not in printed
    engine = create(ONNX, Artifact.load(tmp_path / "artifact"))
    logits = network(normalised(data.test.images)).numpy()
    np.testing.assert_allclose(engine(data.test.images)[:, :-1], logits, atol=0.05)
    np.testing.assert_allclose(engine.evidence(data.test.images).sum(axis=(1, 2)), logits, atol=0.05)


class Windowed(Pooled):
    """Averages its maps in one window of their size, as Keras' ``AveragePooling2D`` does."""

    def features(self, x: Tensor) -> Tensor:
        return torch.flatten(nn.functional.avg_pool2d(self.maps(x), 6), 1)


class MeanLast(Pooled):
    """Has the channels of its maps last, as Keras and Swin transformers do."""

    def features(self, x: Tensor) -> Tensor:
        return self.maps(x).permute(0, 2, 3, 1).mean((1, 2))


@pytest.mark.parametrize("kind", [Windowed, MeanLast])
def test_a_mean_over_all_places_is_recognised_however_written(
    kind: type[Pooled], network: Pooled, data: Data, toy_folder: Path, tmp_path: Path
) -> None:
    written = kind()
    written.load_state_dict(network.state_dict())
    convert(write(written, tmp_path / "own.onnx"), toy_folder, tmp_path / "artifact", "--no-int8")
    assert_computes(Artifact.load(tmp_path / "artifact"), network, data)


def as_matmul(path: Path, is_bias_first: bool) -> None:
    """The head of the ONNX file as a product and a sum, as other exporters write it; its bias is (1, K).

    A cast lies between them, as in mixed precision.
    """
    model = onnx.load(path)
    graph = model.graph
    (head,) = (node for node in graph.node if node.op_type == "Gemm")
    features, weight, bias = head.input
    for constant in graph.initializer:
        values = numpy_helper.to_array(constant)
        if constant.name == weight:
            constant.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values.T), weight))
        elif constant.name == bias:
            constant.CopyFrom(numpy_helper.from_array(values[None], bias))
    terms = [bias, "cast"] if is_bias_first else ["cast", bias]
    graph.node.append(helper.make_node("MatMul", [features, weight], ["product"]))
    graph.node.append(helper.make_node("Cast", ["product"], ["cast"], to=TensorProto.FLOAT))
    graph.node.append(helper.make_node("Add", terms, list(head.output)))
    graph.node.remove(head)
    onnx.save(model, path)


@pytest.mark.parametrize("is_bias_first", [False, True])
def test_a_head_written_as_product_and_sum_is_recognised(
    is_bias_first: bool, network: Pooled, data: Data, toy_folder: Path, tmp_path: Path
) -> None:
    source = write(network, tmp_path / "own.onnx")
    as_matmul(source, is_bias_first)
    convert(source, toy_folder, tmp_path / "artifact", "--no-int8")
    assert_computes(Artifact.load(tmp_path / "artifact"), network, data)


@pytest.mark.parametrize("kind", [Flat, Doubled, Shifted, Ordinal, Oblong, Quartered])
def test_what_the_last_maps_do_not_explain_is_explained_as_a_whole(
    kind: type[nn.Module], data: Data, toy_folder: Path, tmp_path: Path
) -> None:
    model = kind()
    printed = convert(write(model, tmp_path / "own.onnx"), toy_folder, tmp_path / "artifact", "--no-int8")
    assert "no evidence: the network does not end in a global average of square cells and one linear layer" in printed
    artifact = Artifact.load(tmp_path / "artifact")
    images = data.test.images[:5]
    with torch.no_grad():
        logits = model.eval()(normalised(images)).numpy()
    engine = create(ONNX, artifact)
    np.testing.assert_allclose(engine(images)[:, :-1], logits, atol=1e-4)
    np.testing.assert_allclose(engine.evidence(images), logits[:, None, None], atol=1e-4)
    assert artifact.config.stride == toy.SIDE


def test_without_evidence_explain_says_so(toy_folder: Path, tmp_path: Path) -> None:
    """Not with a picture, of which the middle would be bright whatever is there."""
    convert(write(Flat(), tmp_path / "own.onnx"), toy_folder, tmp_path / "artifact", "--no-int8")
    store_model(tmp_path / "home", tmp_path / "artifact")
    with serve("embedded", tmp_path / "home", MODEL="own", RUNTIME=ONNX, WORKERS=1) as url:
        replies = [
            requests.post(f"{url}/{path}", files={"image": encode(picture())}, timeout=60)
            for path in ("classify", "explain")
        ]
    assert [reply.status_code for reply in replies] == [200, 404]
    assert replies[1].json()["error"]["code"] == "no_evidence"


@pytest.mark.parametrize("kind", [Pooled, Flat])
def test_an_ensemble_of_different_grids_explains_on_the_finest(
    kind: type[nn.Module], data: Data, toy_artifact: Artifact, toy_folder: Path, tmp_path: Path
) -> None:
    convert(write(kind(), tmp_path / "own.onnx"), toy_folder, tmp_path / "artifact", "--no-int8")
    members = [Artifact.load(tmp_path / "artifact"), toy_artifact]
    images = data.test.images[:5]
    alone = [create(ONNX, member).evidence(images) for member in members]
    together = Ensemble(members).engine(ONNX).evidence(images)
    assert alone[0].shape != alone[1].shape
    assert together.shape[1] == max(evidence.shape[1] for evidence in alone)
    sums = np.mean([evidence.sum(axis=(1, 2)) for evidence in alone], axis=0)
    np.testing.assert_allclose(together.sum(axis=(1, 2)), sums, rtol=1e-4, atol=1e-4)
    assert Ensemble(members).config.stride == min(member.config.stride for member in members)


def test_evidence_keeps_its_place_on_a_finer_grid() -> None:
    evidence = np.arange(1, 7, dtype=np.float32).reshape(1, 2, 3, 1)
    doubled = np.kron(evidence[0, ..., 0], np.full((2, 2), 1 / 4))
    np.testing.assert_allclose(_on_grid(evidence, 4, 6)[0, ..., 0], doubled, rtol=1e-6)
    # The middle one of three rows overlaps a third of either of two.
    rows = np.stack([2 * evidence[0, 0], evidence[0].sum(axis=0), 2 * evidence[0, 1]]) / 3
    np.testing.assert_allclose(_on_grid(evidence, 3, 3)[0], rows, rtol=1e-6)


def test_leaving_int8_out_leaves_none_of_an_earlier_artifact(
    artifact: Artifact, network: Pooled, toy_folder: Path, tmp_path: Path
) -> None:
    artifact.copy_to(tmp_path)
    assert (tmp_path / FILES[ONNX_INT8]).exists()
    convert(write(network, tmp_path / "own.onnx"), toy_folder, tmp_path, "--no-int8")
    assert not (tmp_path / FILES[ONNX_INT8]).exists()
    assert Artifact.load(tmp_path).runtimes == (ONNX,)


def test_it_is_measured_reported_and_served(artifact: Artifact, toy_folder: Path, tmp_path: Path) -> None:
    printed = toy.run("train.evaluate", artifact.path, toy_folder)
    assert "onnx-int8: accuracy" in printed
    assert "torch: accuracy" not in printed
    toy.run("train.report", artifact.path, toy_folder, "--out", tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text()
    assert "Trained elsewhere: `own.onnx`" in card
    home = tmp_path / "home"
    tag = store_model(home, artifact.path)
    with serve("embedded", home, MODEL="own", RUNTIME="auto", WORKERS=1) as url:
        shown = requests.get(f"{url}/model", timeout=60).json()
        image = encode(picture(1, 48, 48))
        reply = requests.post(f"{url}/classify?prediction_set=0.9", files={"image": image}, timeout=60)
        explained = requests.post(f"{url}/explain", files={"image": image}, timeout=60)
        evidence = requests.post(
            f"{url}/explain", files={"image": image}, headers={"accept": "application/json"}, timeout=60
        ).json()["evidence"]
    assert (shown["runtime"], shown["classes"]) == ("onnx-int8", list(toy.CLASSES))
    assert reply.status_code == 200
    assert (reply.json()["model"], reply.json()["class_name"] in toy.CLASSES) == (tag, True)
    assert explained.headers["content-type"] == "image/png"
    assert np.asarray(evidence).shape == SIZE
    assert VIEWS * np.asarray(evidence).sum() == pytest.approx(VIEWS, rel=1e-3)
    stopped = failed_start(home, MODEL="own", RUNTIME="torch")
    assert stopped == ["error: RUNTIME='torch'; expected one that the model has: onnx, onnx-int8"]


@pytest.mark.parametrize(
    ("option", "expected"), [("--like", "one trained here"), ("--start", "a finished run, or an artifact trained here")]
)
def test_no_training_begins_from_a_network_trained_elsewhere(
    option: str, expected: str, artifact: Artifact, toy_folder: Path, tmp_path: Path
) -> None:
    typed = [toy_folder, "--name", "it", "--out", tmp_path / "run", option, artifact.path]
    printed = toy.run("train.fit", *typed, code=1)
    assert printed.endswith(f"; expected {expected}\n")


def test_without_int8_a_cpu_serves_fp32(network: Pooled, toy_folder: Path, tmp_path: Path) -> None:
    convert(write(network, tmp_path / "own.onnx"), toy_folder, tmp_path / "artifact", "--no-int8")
    store_model(tmp_path / "home", tmp_path / "artifact")
    with serve("embedded", tmp_path / "home", MODEL="own", RUNTIME="auto", WORKERS=1) as url:
        assert requests.get(f"{url}/model", timeout=60).json()["runtime"] == ONNX
        assert requests.post(f"{url}/classify", files={"image": encode(picture())}, timeout=60).status_code == 200


class TwoOutputs(Pooled):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.head(self.features(x)), self.features(x)


def any_size(path: Path) -> Path:
    return write(Pooled(), path, dynamic_axes={"input.1": {0: "batch", 2: "height", 3: "width"}})


class Fixed(Pooled):
    """Made for one image, although its input takes more."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x).reshape(1, 32))
        return logits


class Clipped(Pooled):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(super().forward(x), 1).clamp(1e-6, 1)


class Centred(Pooled):
    """Depends on the batch at hand, as BatchNorm does in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits - logits.mean(0)


def nothing(path: Path) -> Path:
    """Gives its input back."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, *SIZE])
    graph, versions = helper.make_graph([], "nothing", [value], [value]), [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=versions), path)
    return path


def no_standard_operator(path: Path) -> Path:
    """Is of the operators for classical machine learning alone, as converters of scikit-learn's models write it."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, *SIZE])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])
    node = helper.make_node("Normalizer", ["x"], ["y"], domain="ai.onnx.ml")
    graph, versions = helper.make_graph([node], "ml", [value], [output]), [helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=versions), path)
    return path


def unknown_operator(path: Path) -> Path:
    model = onnx.load(write(Pooled(), path))
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    model.graph.node[0].domain = "com.acme"
    onnx.save(model, path)
    return path


def no_onnx(path: Path) -> Path:
    path.write_bytes(b"not ONNX at all")
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_onnx, "expected a valid ONNX file"),
        (lambda path: path, "expected a valid ONNX file"),
        (functools.partial(write, Pooled(), dynamic_axes=None), "its input is fixed at 2 images; expected any number"),
        (functools.partial(write, TwoOutputs()), "1 inputs, 2 outputs; expected one of each"),
        (
            functools.partial(write, nn.Sequential(Pooled(), nn.Linear(3, 4))),
            "the network gives outputs of shape (32, 4); expected (32, 3): for each image, one for each class",
        ),
        (any_size, "takes images of any size; expected --size"),
        (
            functools.partial(write_for, (2, *SIZE, 1), nn.Flatten(), {0: "N"}),
            "its input 'x' is float [None, 24, 24, 1]; expected float (N, 3, height, width) or (N, height, width, 3)",
        ),
        (
            functools.partial(write_for, (1, 3, *SIZE), Fixed(), {0: "N"}),
            "expected a network for images (32, 3, 24, 24), and any number of them",
        ),
        (nothing, "the network gives outputs of shape (32, 1728); expected (32, 3)"),
        (no_standard_operator, "own.onnx: it has none of the standard operators; expected a valid ONNX file"),
        (unknown_operator, "expected a network that ONNX Runtime can run"),
        (functools.partial(write, nn.Sequential(Pooled(), nn.Sigmoid())), "ends in a sigmoid, for classes"),
        (functools.partial(write, Clipped()), "gives probabilities, but not straight from a softmax; expected logits"),
        (functools.partial(write, Centred()), "among 32; expected the same: export it in inference mode, model.eval()"),
        (
            functools.partial(write, nn.Sequential(nn.Flatten(), nn.Linear(3 * toy.SIDE**2, 3))),
            "no convolution to quantise; expected a network that has an INT8 form, or --no-int8",
        ),
    ],
)
def test_a_network_that_cannot_be_served_is_refused_with_one_line(
    make: Callable[[Path], Path], message: str, toy_folder: Path, tmp_path: Path
) -> None:
    printed = convert(make(tmp_path / "own.onnx"), toy_folder, tmp_path / "artifact", code=1)
    assert message in printed.splitlines()[-1]
    assert printed.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "artifact").exists()


def test_int8_that_loses_accuracy_is_refused_with_the_way_out(
    artifact: Artifact, network: Pooled, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Artifact:
        raise ParityError("expected a loss of at most 0.0030")

    monkeypatch.setattr(train.convert, "complete", refuse)
    source = graphs.read(write(network, tmp_path / "own.onnx"))
    with pytest.raises(ParityError, match=r"at most 0\.0030, or --no-int8"):
        train.convert.convert(source, load(str(toy_folder), SIZE), artifact.config, {}, True, tmp_path / "out")


def test_the_validation_images_are_computed_on_every_core(
    artifact: Artifact, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def runtime(path: Path, name: str, threads: int = 1) -> OnnxRuntime:
        used.append(threads)
        return OnnxRuntime(path, name, threads)

    monkeypatch.setattr(train.export, "OnnxRuntime", runtime)
    out = shutil.copytree(artifact.path, tmp_path / "artifact")
    complete(out, artifact.config, artifact.card["training"], load(str(toy_folder), SIZE))
    assert used == [THREADS, THREADS]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--size", "32"], 1, "--size 32x32; expected 24x24, which"),
        (["--size", "12"], 1, "--size 12x12; expected 24x24, which"),
        (["--size", "24x48"], 1, "--size 24x48; expected 24x24, which"),
        (["--size", "0"], 2, "argument --size: '0'; expected a number of pixels, or height and width, such as 48x192"),
        (["--size", "24x"], 2, "argument --size: '24x'; expected a number of pixels"),
        (["--size", "24x-1"], 2, "argument --size: '24x-1'; expected a number of pixels"),
        (["--mean", "0.5"], 2, "argument --mean: '0.5'; expected three numbers, R,G,B"),
        (["--mean", "123.7,116.3,103.5"], 2, "'123.7,116.3,103.5'; expected numbers from 0 to 1, for pixels divided"),
        (["--std", "0.2,0,0.2"], 2, "argument --std: '0.2,0,0.2'; expected numbers above 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], code: int, message: str, toy_folder: Path, tmp_path: Path
) -> None:
    source = write(Pooled(), tmp_path / "own.onnx")
    printed = convert(source, toy_folder, tmp_path / "artifact", *options, code=code)
    assert message in printed.splitlines()[-1]
    assert not (tmp_path / "artifact").exists()


def test_the_record_tells_networks_apart_whose_weights_lie_beside(toy_folder: Path, tmp_path: Path) -> None:
    hashes = []
    for index in (1, 2):
        source = write(Pooled(), tmp_path / f"{index}" / "own.onnx", dynamo=True)
        assert source.with_name("own.onnx.data").exists()
        convert(source, toy_folder, tmp_path / f"{index}" / "artifact", "--no-int8")
        hashes.append(Artifact.load(tmp_path / f"{index}" / "artifact").card["training"]["network_sha256"])
    assert hashes[0] != hashes[1]


def test_a_side_that_the_file_fixes_is_not_another_one(toy_folder: Path, tmp_path: Path) -> None:
    source = write(Pooled(), tmp_path / "own.onnx", dynamic_axes={"input.1": {0: "batch", 3: "width"}})
    printed = convert(source, toy_folder, tmp_path / "artifact", "--size", "32x48", code=1)
    assert "--size 32x48; expected 24x48, which" in printed.splitlines()[-1]
    convert(source, toy_folder, tmp_path / "artifact", "--no-int8", "--size", "48")
    assert Artifact.load(tmp_path / "artifact").config.input_size == (24, 48)


@pytest.mark.parametrize(("asked", "size"), [("24", SIZE), ("24x48", (24, 48))])
def test_a_network_for_any_size_takes_the_one_given(
    asked: str, size: tuple[int, int], toy_folder: Path, tmp_path: Path
) -> None:
    printed = convert(any_size(tmp_path / "own.onnx"), toy_folder, tmp_path / "artifact", "--no-int8", "--size", asked)
    artifact = Artifact.load(tmp_path / "artifact")
    assert artifact.config.input_size == size
    assert "no evidence" not in printed
    assert create(ONNX, artifact).evidence(artifact.reference(ONNX).images).shape[1:3] == (size[0] // 4, size[1] // 4)
