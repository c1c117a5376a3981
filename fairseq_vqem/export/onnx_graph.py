"""Writing ONNX graphs node by node, with weights that several graphs share.

Tracing the PyTorch modules instead would keep their shapes and their many small operations; what
limits batch size 1 is exactly how many operations there are and how many bytes of weights they
read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from fairseq_vqem.export import quantise

WEIGHTS_FILE = "weights.bin"
ONNX_OPSET = 21
IR_VERSION = 10
RUNTIME = "com.microsoft"  # operators that only ONNX Runtime has
ALIGNMENT = 64
NORM_EPSILON = 1e-5
ACTIVATION_ZERO = 128  # what stands for 0 in eight-bit activations of both signs

Value = str | np.ndarray | np.generic
"""The name of a tensor of the graph, "" for an absent optional input, or a constant."""

Advance = Callable[["GraphBuilder", str, dict[str, str]], tuple[str, dict[str, str]]]
"""Builds a step of a loop, see ``GraphBuilder.loop``."""


class WeightFile:
    """The one file of weights of all graphs; what has the same name is stored once."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._arrays: dict[str, tuple[int, Any, tuple[int, ...]]] = {}

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *unused: object) -> None:
        self._stream.close()

    def add(self, name: str, make: Callable[[], NDArray[Any]], skip_rows: int = 0) -> TensorProto:
        """A reference to the array ``name``, without its first rows; ``make`` it if it is new."""
        if name not in self._arrays:
            array = np.ascontiguousarray(make())
            self._stream.write(b"\0" * (-self._stream.tell() % ALIGNMENT))
            self._arrays[name] = (self._stream.tell(), array.dtype, array.shape)
            self._stream.write(array.tobytes())
        offset, dtype, (rows, *rest) = self._arrays[name]
        row_bytes = int(np.prod(rest, dtype=np.int64)) * dtype.itemsize
        tensor = TensorProto(
            name=f"{name}[{skip_rows}:]" if skip_rows else name,
            data_type=helper.np_dtype_to_tensor_dtype(dtype),
            dims=[rows - skip_rows, *rest],
            data_location=TensorProto.EXTERNAL,
        )
        place = {
            "location": WEIGHTS_FILE,
            "offset": offset + skip_rows * row_bytes,
            "length": (rows - skip_rows) * row_bytes,
        }
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor


class GraphBuilder:
    """One graph under construction.

    Args:
        name: of the graph.
        weights: file that receives its weights.
        quantised: whether matrix products are computed in eight-bit integers.
    """

    def __init__(self, name: str, weights: WeightFile, quantised: bool) -> None:
        self.name, self.weights, self.quantised = name, weights, quantised
        self._prefix = ""
        self._nodes: list[Any] = []
        self._constants: dict[str, TensorProto] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._rows: dict[tuple[str, bool], tuple[str, str, Value]] = {}

    # ------------------------------------------------------------------ nodes

    def input(self, name: str, dtype: Any, shape: Sequence[str | int]) -> str:
        """Declare an input; returns its name."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def output(self, name: str, value: str, dtype: Any, shape: Sequence[str | int]) -> None:
        """Declare ``value`` to be the output ``name``."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, kind, list(shape)))

    def op(self, kind: str, *inputs: Value, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, outputs: int, *inputs: Value, domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; returns their names."""
        place = f"{self._prefix}{kind}.{len(self._nodes)}"
        names = [f"{place}.{number}" for number in range(outputs)]
        words = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        node = helper.make_node(kind, words, names, name=place, domain=domain, **attributes)
        self._nodes.append(node)
        return names

    def loop(self, start: Mapping[str, str], advance: Advance) -> dict[str, str]:
        """Repeat a step until it says that it was the last; there is at least one.

        Args:
            start: the values that change from step to step, by name.
            advance: called once with a builder of the step, the number of steps before ``[]`` and
                the values by name; returns whether to go on ``[]``, a truth value, and the values
                of the next step. It may use everything that this graph has made so far.

        Returns:
            The last values by name.
        """
        body = GraphBuilder(f"step{len(self._nodes)}", self.weights, self.quantised)
        body._prefix = f"{self._prefix}{body.name}/"
        body._constants = self._constants  # a step reads those of the graph around it
        state = {name: f"{body._prefix}{name}" for name in start}
        iteration, going = f"{body._prefix}iteration", f"{body._prefix}going"
        go_on, following = advance(body, iteration, state)
        outputs = [go_on, *(following[name] for name in start)]
        step = helper.make_graph(
            body._nodes,
            body.name,
            [
                helper.make_tensor_value_info(iteration, TensorProto.INT64, []),
                helper.make_tensor_value_info(going, TensorProto.BOOL, []),
                # of the other values the runtime finds out what they are
                *(helper.make_empty_tensor_value_info(name) for name in state.values()),
            ],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
        )
        found = self.ops("Loop", len(start), "", np.bool_(True), *start.values(), body=step)
        return dict(zip(start, found, strict=True))

    def model(self) -> onnx.ModelProto:
        """The finished graph."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._constants.values())
        )
        sets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(RUNTIME, 1)]
        return helper.make_model(graph, opset_imports=sets, ir_version=IR_VERSION)

    def _constant(self, value: np.ndarray | np.generic) -> str:
        array = np.asarray(value)
        name = f"constant.{array.dtype}.{array.shape}.{array.tobytes().hex()}"
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(array, name)
        return name

    # ------------------------------------------------------------------ shapes

    def size(self, x: str, axis: int) -> str:
        """Length of an axis, ``[1]``."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def shape(self, *parts: str | int) -> str:
        """A shape ``[parts]`` of known numbers and of ``[1]`` or longer tensors."""
        values = [part if isinstance(part, str) else np.array([part]) for part in parts]
        return self.op("Concat", *values, axis=0)

    def reshape(self, x: str, *parts: str | int) -> str:
        """``x`` in the shape of ``parts``, as ``shape`` takes them; -1 is what is left."""
        if all(isinstance(part, int) for part in parts):
            return self.op("Reshape", x, np.array(parts))
        return self.op("Reshape", x, self.shape(*parts))

    def split(self, x: str, parts: int) -> list[str]:
        """``x`` cut into equal parts along the last axis."""
        return self.ops("Split", parts, x, axis=-1, num_outputs=parts)

    def first(self, table: str, count: str) -> str:
        """The first ``count`` ``[1]`` rows of ``table``."""
        return self.op("Slice", table, np.array([0]), count)

    # ------------------------------------------------------------------ layers

    def weight(self, name: str, values: Tensor | NDArray[Any], skip_rows: int = 0) -> str:
        """A weight ``[N, …]`` without its first rows."""
        tensor = self.weights.add(name, lambda: _array(values), skip_rows)
        self._constants[tensor.name] = tensor
        return str(tensor.name)

    def norm(self, x: str, name: str, layer: Any) -> str:
        """Layer normalisation over the last axis."""
        weight = self.weight(f"{name}.weight", layer.weight)
        bias = self.weight(f"{name}.bias", layer.bias)
        return self.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=NORM_EPSILON)

    def embed(self, name: str, table: Tensor, ids: str) -> str:
        """Rows ``[…, D]`` of ``table`` ``[V, D]``."""
        if not self.quantised:
            return self.op("Gather", self.weight(f"{name}.weight", table), ids)
        integers, scales = quantise.by_row(_array(table))
        rows = self.op("Gather", self.weight(f"{name}.rows", integers), ids)
        scale = self.op("Gather", self.weight(f"{name}.row_scales", scales[:, None]), ids)
        return self.op("Mul", self.op("Cast", rows, to=TensorProto.FLOAT), scale)

    def linear(
        self,
        x: str,
        name: str,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        few_rows: bool = False,
        positive: bool = False,
        skip_rows: int = 0,
        only_order: bool = False,
    ) -> str:
        """``x Wᵀ + b``, ``[R, N]`` of ``x`` ``[R, K]`` and ``weight`` ``[N, K]``.

        Args:
            few_rows: R is small at batch size 1, so that reading the weights takes the time.
            positive: ``x`` has no negative value.
            skip_rows: leaves out the first rows of ``weight``, but stores them with the others.
            only_order: each row of the result may be scaled by a positive number (without bias).
        """
        terms = [] if bias is None else [self.weight(f"{name}.bias", bias)]
        if not self.quantised:
            stored = self.weight(f"{name}.weight", weight, skip_rows)
            return self.op("Gemm", x, stored, *terms, transB=1)
        values = _array(weight)[skip_rows:]
        if few_rows:
            return self._blockwise_product(x, name, values, terms)
        product, scales = self._rowwise_product(x, name, values, positive)
        if only_order:
            return product
        product = self.op("Mul", product, scales)
        return self.op("Add", product, *terms) if terms else product

    def _blockwise_product(self, x: str, name: str, weight: Any, bias: list[str]) -> str:
        integers, scales = quantise.by_block(weight)
        return self.op(
            "MatMulNBits",
            x,
            self.weight(f"{name}.integers", integers),
            self.weight(f"{name}.scales", scales),
            *(["", "", *bias] if bias else []),
            domain=RUNTIME,
            N=weight.shape[0],
            K=weight.shape[1],
            bits=8,
            block_size=integers.shape[2],
            accuracy_level=4,  # activations in eight bits as well
        )

    def _rowwise_product(self, x: str, name: str, weight: Any, positive: bool) -> tuple[str, str]:
        """The product up to the scales ``[R, 1]`` of its rows, and these."""
        integers, scales = quantise.by_row(weight)
        rows, row_scales, zero = self._quantised_rows(x, positive)
        return self.integer_product(rows, name, integers.T, scales, zero), row_scales

    def integer_product(
        self, x: str, name: str, integers: Any, scales: NDArray[np.float32], zero: Value
    ) -> str:
        """``(x - zero) W`` in float32; W is ``integers`` ``[K, N]`` times ``scales`` ``[N]``."""
        return self.op(
            "MatMulIntegerToFloat",
            x,
            self.weight(f"{name}.integers", integers),
            np.float32(1.0),
            self.weight(f"{name}.scales", scales),
            zero,
            domain=RUNTIME,
        )

    def _quantised_rows(self, x: str, positive: bool) -> tuple[str, str, Value]:
        """``x`` ``[R, K]`` as unsigned integers, the scales ``[R, 1]`` and what stands for 0.

        Each row has its own scale: ONNX Runtime's own dynamic quantisation takes one for all rows,
        so that the sentences of a batch would change each other.
        """
        if (x, positive) not in self._rows:
            top = self.op("ReduceMax", x if positive else self.op("Abs", x), np.array([1]))
            # a row of zeros has scale 0, so that it stays 0 whatever its integers become
            scales = self.op("Mul", top, np.float32(1.0 / (255 if positive else quantise.LEVELS)))
            zero = np.uint8(0 if positive else ACTIVATION_ZERO)
            flat = self.reshape(scales, -1)
            zeros = self.op("Expand", zero, self.op("Shape", flat))
            rows = self.op("QuantizeLinear", x, flat, zeros, axis=0)
            self._rows[x, positive] = (rows, scales, zero)
        return self._rows[x, positive]


def _array(values: Tensor | NDArray[Any]) -> NDArray[Any]:
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else values
