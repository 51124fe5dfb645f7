"""The network in training: its whitening and bank, convolutions in strips, Muon, half precision."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from model.network import NEIGHBOURS, ConvNet, ServedNet
from tests.training import begin
from train import data, precision
from train.muon import Muon, orthogonalize
from train.options import build_config
from train.recipe import Recipe
from train.runs import Trained
from train.strips import WIDEST_MAP, StripConv2d, use_strips


def test_whitening_is_the_same_when_computed_in_parts(loaded: data.Data) -> None:
    """Each part needs a bounded amount of memory."""
    images = torch.from_numpy(loaded.train.images)
    whole, parts = (ConvNet(build_config("toy", loaded, Recipe())) for _ in range(2))
    whole.init_whitening(images, len(images))
    parts.init_whitening(images, 7)
    assert torch.allclose(whole.whiten.weight.abs(), parts.whiten.weight.abs(), rtol=1e-3, atol=1e-4)
    patches = F.unfold(whole.normalize(images), 2).transpose(1, 2).reshape(-1, 12)
    white = patches @ whole.whiten.weight[:12].reshape(12, -1).T
    assert torch.allclose(white.T @ white / len(white), torch.eye(12), atol=0.05)


def test_familiarity_is_the_cosine_similarity_to_the_nth_nearest_features_of_the_bank(loaded: data.Data) -> None:
    config = build_config("net", loaded, Recipe(widths="4,8", depth=2)).model_copy(update={"bank": 2 * NEIGHBOURS})
    network = ServedNet(config).eval()
    images = torch.from_numpy(loaded.train.images)
    network.init_bank(images[: config.bank], batch=3)
    with torch.no_grad():
        features = network.network.feature_maps(network.network.stem(images)).amax(dim=(2, 3))
        cosines = F.cosine_similarity(features[:, None], features[: config.bank], dim=2)
        familiarity = network(images)[:, -1]
    assert torch.allclose(familiarity, cosines.sort(descending=True).values[:, NEIGHBOURS - 1], atol=1e-5)


def test_a_bank_may_have_fewer_images_than_neighbours_requested(loaded: data.Data) -> None:
    config = build_config("net", loaded, Recipe(widths="4,8", depth=2)).model_copy(update={"bank": 2})
    network = ServedNet(config).eval()
    images = torch.from_numpy(loaded.train.images[:2])
    network.init_bank(images)
    assert network(images)[:, -1].max() < 1, "the farther of the two, which is not the image itself"


@pytest.mark.parametrize("side", [2, 7, 8, 9])
@pytest.mark.parametrize("halves", [False, True], ids=["float32", "bfloat16"])
def test_convolving_small_maps_in_strips_gives_the_same_results_and_gradients(side: int, halves: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 8, 3, padding=1, bias=False)
    strips = nn.Sequential(plain)
    use_strips(strips)
    assert isinstance(strips[0], StripConv2d)
    maps, weighting = torch.randn(5, 6, side, side), torch.randn(5, 8, side, side)
    found = []
    for convolution in (plain, strips):
        images = maps.clone(memory_format=torch.channels_last).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=halves):
            result = convolution(images)
        (result * weighting).sum().backward()
        if convolution is strips:
            assert ("_Convolve" in type(result.grad_fn).__name__) is (side <= WIDEST_MAP)
        assert images.grad is not None
        assert plain.weight.grad is not None
        found.append((result.detach(), images.grad, plain.weight.grad))
        plain.weight.grad = None
    for one, other in zip(*found, strict=True):
        assert one.dtype is other.dtype
        # bfloat16 has 8 bits of precision, and processors round to them at different points.
        assert float((one - other).norm() / one.norm()) < (0.02 if halves else 1e-5)


def test_strips_change_neither_a_networks_outputs_nor_its_weight_names(loaded: data.Data) -> None:
    network = ConvNet(build_config("net", loaded, Recipe(widths="4,8", depth=2))).eval()
    names, images = list(network.state_dict()), torch.from_numpy(loaded.val.images)
    before = network(images)
    use_strips(network)
    assert sum(isinstance(module, StripConv2d) for module in network.modules()) == 6
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(images), before)


def test_training_uses_strips_where_they_pay(loaded: data.Data, toy_run: Path, tmp_path: Path) -> None:
    fit = begin(loaded, tmp_path)
    fit.take_teacher(Trained.read(toy_run))
    has_amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    for network in (fit.network, *fit.teachers):
        assert any(isinstance(module, StripConv2d) for module in network.modules()) is has_amx


def test_muon_steps_are_orthogonal_and_preserve_weight_norms() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(8, 36)
    unchanged = matrix.clone()
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    assert torch.equal(matrix, unchanged)
    assert 0.5 < values.min() <= values.max() < 1.3
    assert torch.equal(orthogonalize(matrix.T), orthogonalize(matrix).T)
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, 3))
    optimizer = Muon([weight], lr=0.1, momentum=0.6)
    target = torch.randn(8, 4, 3, 3)
    distances = []
    for _ in range(30):
        optimizer.zero_grad()
        distance = (torch.nn.functional.normalize(weight.flatten(), dim=0) * target.flatten()).sum().neg()
        distance.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        distances.append(float(distance.detach()))
    assert distances[-1] < distances[0] - 5
    assert float(weight.detach().norm()) == pytest.approx(8**0.5, rel=0.05)


def test_muon_updates_its_momentum_in_place() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 4, 3, 3))
    optimizer = Muon([weight], lr=0.1, momentum=0.6)
    places = set()
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        places.add(optimizer.state[weight]["momentum_buffer"].data_ptr())
    assert len(places) == 1


def test_half_precision_is_used_only_where_the_cpu_supports_it() -> None:
    instructions = re.findall(r"\b(?:avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text())
    assert precision.compute_dtype(torch.device("cpu")) is (torch.bfloat16 if instructions else torch.float32)
    assert precision.compute_dtype(torch.device("cuda")) is torch.float16
