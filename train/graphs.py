"""Give an ONNX graph trained elsewhere the inputs and outputs of an artifact's.

The network stays as it is. Before it come the normalisation of the pixels and the layout that it wants; behind it, the
familiarity of an image and the evidence for each class, as in ``model.network.ServedNet``, from the features and the
feature maps that its head is computed from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    compose,
    helper,
    numpy_helper,
    parser,
    version_converter,
)

from model.network import NEIGHBOURS
from train.command import CommandError
from train.to_onnx import OPSET

Triple = tuple[float, float, float]
PASSING = ("Flatten", "Reshape", "Squeeze", "Identity", "Dropout", "Cast")
"""Operators behind the pooling, the head, its product or the softmax that only change the shape or the type."""
PREFIX = "network/"
IMAGES, FEATURES, LOGITS, MAPS = "pixels", "features", "logits", "maps"
"""Names by which the parts are joined."""
SHAPES = {FEATURES: "N,D", LOGITS: "N,K", MAPS: "N,D,h,w"}


class Network(NamedTuple):
    """A network trained elsewhere, as a graph with the input ``IMAGES`` (N, 3, H, W) and these outputs.

    ``LOGITS`` (N, K); ``FEATURES`` (N, D), the input of the head; and ``MAPS`` (N, D, h, w) if the features are their
    mean over all places.
    """

    model: ModelProto
    size: tuple[int | None, int | None]
    """Height and width of the input; None if the graph takes any."""
    head: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    """Weight (K, D) and bias (K,) by which the features become logits; None without ``MAPS``."""
    is_bgr: bool
    """Whether its input has blue first."""

    @property
    def parameters(self) -> int:
        return sum(math.prod(constant.dims) for constant in self.model.graph.initializer)

    def explains(self, maps: NDArray[np.float32], logits: NDArray[np.float32]) -> bool:
        """Whether the head, applied to the mean of ``maps`` (N, D, h, w), gives ``logits`` (N, K)."""
        if self.head is None:
            return False
        weight, bias = self.head
        if maps.shape[1] != weight.shape[1]:
            return False
        return close(maps.mean(axis=(2, 3)) @ weight.T + bias, logits)


def close(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    """Whether two computations of the same logits (N, K) differ by no more than rounding does."""
    return bool(np.allclose(one, other, rtol=1e-3, atol=1e-3 * float(np.abs(other).max())))


def read(path: Path, is_bgr: bool = False) -> Network:
    """The network in the ONNX file ``path``; raises ``CommandError`` for one that cannot be served, saying why."""
    with expecting("a valid ONNX file", f"{path}: "):
        model = onnx.load(path)
        onnx.checker.check_model(model)
        if opset_of(model) < OPSET:
            model = version_converter.convert_version(model, OPSET)
    graph = model.graph
    constants = _constants(graph)
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise CommandError(f"{path}: {len(inputs)} inputs, {len(graph.output)} outputs; expected one of each")
    size, places = _layout(path, inputs[0])
    producers = {name: node for node in graph.node for name in node.output}
    logits = _before(graph.output[0].name, producers, (*PASSING, "Softmax", "LogSoftmax"))
    if logits in producers and producers[logits].op_type == "Sigmoid":
        raise CommandError(f"{path}: ends in a sigmoid, for classes that do not exclude each other; expected a softmax")
    features, head = _head(logits, producers, constants)
    maps, order = _maps(features, producers, constants) if head else (None, [])
    outputs = [(logits, LOGITS), (features, FEATURES), *([(maps, MAPS)] if maps else [])]
    return Network(_joinable(model, inputs[0].name, places, outputs, order), size, head if maps else None, is_bgr)


@contextmanager
def expecting(what: str, prefix: str = "") -> Iterator[None]:
    """Make any error a ``CommandError`` of one line: those of ONNX and ONNX Runtime have no common base class."""
    try:
        yield
    except Exception as error:
        message = str(error).partition("\n")[0]  # below come their traces
        raise CommandError(f"{prefix}{message}; expected {what}") from error


def _constants(graph: GraphProto) -> dict[str, NDArray[np.float32]]:
    values = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type in ("Cast", "Identity") and node.input[0] in values:  # weights stored as FP16, or shared
            values[node.output[0]] = values[node.input[0]]
    return values


def _before(name: str, producers: dict[str, NodeProto], passed: tuple[str, ...]) -> str:
    """The value that ``name`` is computed from by the operators ``passed`` alone."""
    while name in producers and producers[name].op_type in passed:
        name = producers[name].input[0]
    return name


def opset_of(model: ModelProto) -> int:
    """The version of the standard operators that ``model`` uses; raises ``CommandError`` if it uses none."""
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            return int(entry.version)
    raise CommandError("it has none of the standard operators")


def _layout(path: Path, images: onnx.ValueInfoProto) -> tuple[tuple[int | None, int | None], list[int]]:
    """Height and width of the input ``images``, None where it takes any; and where in it each of N, 3, H, W is."""
    kind = images.type.tensor_type
    dims = [dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim]  # Paddle writes -1 for any
    is_last = len(dims) == 4 and dims[3] == 3 and dims[1] != 3
    is_first = len(dims) == 4 and dims[1] in (3, None)
    if kind.elem_type != TensorProto.FLOAT or not (is_first or is_last):
        shown = f"{TensorProto.DataType.Name(kind.elem_type).lower()} {dims}"
        expected = "float (N, 3, height, width) or (N, height, width, 3)"
        raise CommandError(f"{path}: its input {images.name!r} is {shown}; expected {expected}")
    if dims[0] is not None:
        raise CommandError(
            f"{path}: its input is fixed at {dims[0]} images; expected any number: export it with dynamic_shapes, or "
            "dynamic_axes, for the first dimension"
        )
    return ((dims[1], dims[2]), [0, 2, 3, 1]) if is_last else ((dims[2], dims[3]), [0, 1, 2, 3])


def _head(
    logits: str, producers: dict[str, NodeProto], constants: dict[str, NDArray[np.float32]]
) -> tuple[str, tuple[NDArray[np.float32], NDArray[np.float32]] | None]:
    """The features that the last layer takes, and its weight and bias; the logits themselves if it is not linear."""
    node, bias = producers.get(logits), np.zeros(1, np.float32)
    if node is not None and node.op_type == "Add":
        product, constant = sorted(node.input, key=lambda name: name in constants)  # they come in either order
        if constant in constants:
            node, bias = producers.get(_before(product, producers, PASSING)), constants[constant]
    if node is None or node.op_type not in ("Gemm", "MatMul") or node.input[1] not in constants:
        return logits, None
    weight = constants[node.input[1]].astype(np.float32)
    options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if not options.get("transB"):
        weight = weight.T
    if len(node.input) > 2:
        bias = constants.get(node.input[2], bias)
    bias = bias.astype(np.float32).ravel()
    if len(bias) not in (1, len(weight)):  # one score with a threshold for each class, as in ordinal regression
        return logits, None
    return node.input[0], (weight, np.broadcast_to(bias, len(weight)))


def _maps(
    features: str, producers: dict[str, NodeProto], constants: dict[str, NDArray[np.float32]]
) -> tuple[str | None, list[int]]:
    """The feature maps whose mean over all places the features are, and where in them each of N, D, h, w is.

    None and nothing if the features are something else. A mean over windows may be one: ``Network.explains`` decides.
    """
    node = producers.get(_before(features, producers, PASSING))
    if node is None:
        return None, []
    axes = set()
    if node.op_type == "ReduceMean" and len(node.input) > 1 and node.input[1] in constants:
        axes = {int(axis) % 4 for axis in constants[node.input[1]]}
    if node.op_type in ("GlobalAveragePool", "AveragePool") or axes == {2, 3}:
        return node.input[0], [0, 1, 2, 3]
    return (node.input[0], [0, 3, 1, 2]) if axes == {1, 2} else (None, [])


def _joinable(
    model: ModelProto, images: str, places: list[int], outputs: list[tuple[str, str]], order: list[int]
) -> ModelProto:
    """``model`` with its names behind ``PREFIX``, but for its input ``IMAGES`` and the new names of its ``outputs``.

    ``IMAGES`` are (N, 3, H, W); ``places`` puts them into the order that the model takes, and ``order`` its maps into
    that of ``MAPS``.
    """
    model = compose.add_prefix(model, PREFIX)
    graph = model.graph
    graph.input.remove(next(value for value in graph.input if value.name == PREFIX + images))
    graph.input.append(helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, ["N", 3, "H", "W"]))
    graph.node.insert(0, helper.make_node("Transpose", [IMAGES], [PREFIX + images], perm=places))
    del graph.output[:]
    for old, new in outputs:  # copied, because other nodes may take them too
        shaped = f"{new}/shaped"
        if new == MAPS:
            graph.node.append(helper.make_node("Transpose", [PREFIX + old], [shaped], perm=order))
        else:
            graph.node.append(helper.make_node("Flatten", [PREFIX + old], [shaped]))
        graph.node.append(helper.make_node("Cast", [shaped], [new], to=TensorProto.FLOAT))
        graph.output.append(helper.make_tensor_value_info(new, TensorProto.FLOAT, SHAPES[new].split(",")))
    return model


def with_pixels(network: Network, size: tuple[int, int], mean: Triple, std: Triple) -> ModelProto:
    """The network with the input ``images`` (N, H, W, 3) uint8 RGB; ``mean`` and ``std`` in units of 0..255."""
    ordered = "ordered = Gather<axis=3>(normalised, reverse)" if network.is_bgr else ""
    before = _part(
        network,
        f"(uint8[N,{size[0]},{size[1]},3] images) => (float[N,3,{size[0]},{size[1]}] {IMAGES})",
        f"""
        values = Cast<to=1>(images)
        centred = Sub(values, mean)
        normalised = Div(centred, std)
        {ordered}
        {IMAGES} = Transpose<perm=[0,3,1,2]>({"ordered" if ordered else "normalised"})
        """,
        {
            "mean": np.asarray(mean, np.float32),
            "std": np.asarray(std, np.float32),
            "reverse": np.asarray([2, 1, 0], np.int64),
        },
    )
    return _joined(network, before, network.model, [IMAGES])


def with_outputs(network: Network, model: ModelProto, bank: NDArray[np.float32], cells: tuple[int, int]) -> ModelProto:
    """``with_pixels`` ready to serve: its outputs are ``outputs`` (N, K + 1) and ``evidence`` (N, h, w, K).

    ``bank`` (B, D) are the features of training images, ``cells`` the height and width of the feature maps. Each place
    adds its features times the head to the logits (Zhou et al., 2016, arXiv:1512.04150). Without feature maps the image
    is one place, which adds everything.
    """
    unit = bank / np.maximum(np.linalg.norm(bank, axis=1, keepdims=True), 1e-12)
    constants: dict[str, NDArray[np.generic]] = {
        "bank": np.ascontiguousarray(unit.T),
        "one": np.asarray([1], np.int64),
        "places": np.asarray([1, 2], np.int64),
        "neighbours": np.asarray([min(NEIGHBOURS, len(bank))], np.int64),
        "least": np.asarray([1e-12], np.float32),
    }
    nodes = f"""
        norm = ReduceL2<keepdims=1>({FEATURES}, one)
        length = Max(norm, least)
        direction = Div({FEATURES}, length)
        similarity = MatMul(direction, bank)
        nearest, indices = TopK<axis=1>(similarity, neighbours)
        familiarity = ReduceMin<keepdims=1>(nearest, one)
        outputs = Concat<axis=1>({LOGITS}, familiarity)
        """
    if network.head:
        weight, bias = network.head
        places = cells[0] * cells[1]
        constants |= {"head": np.ascontiguousarray(weight.T / places), "share": bias / places}
        nodes += f"""
        rows = Transpose<perm=[0,2,3,1]>({MAPS})
        weighed = MatMul(rows, head)
        evidence = Add(weighed, share)
        """
    else:
        nodes += f"evidence = Unsqueeze({LOGITS}, places)\n"
    given = [name for name in (LOGITS, FEATURES, MAPS) if name != MAPS or network.head]
    signature = ", ".join(f"float[{SHAPES[name]}] {name}" for name in given)
    after = _part(network, f"({signature}) => (float[N,L] outputs, float[N,h,w,K] evidence)", nodes, constants)
    return _joined(network, model, after, given)


def _joined(network: Network, first: ModelProto, second: ModelProto, names: list[str]) -> ModelProto:
    joined = compose.merge_models(first, second, io_map=[(name, name) for name in names])
    # It lists the standard operators once for each part, which ONNX Runtime's quantiser refuses.
    del joined.opset_import[:]
    joined.opset_import.extend(network.model.opset_import)
    return joined


def _part(network: Network, signature: str, nodes: str, constants: dict[str, NDArray[np.generic]]) -> ModelProto:
    """A model of ``nodes`` in ONNX's textual syntax, of the versions of ``network``."""
    header = f'<ir_version: {network.model.ir_version}, opset_import: ["": {opset_of(network.model)}]>'
    part = parser.parse_model(f"{header} part {signature} {{ {nodes} }}")
    used = {name for node in part.graph.node for name in node.input}
    kept = {name: value for name, value in constants.items() if name in used}
    part.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in kept.items())
    return part
