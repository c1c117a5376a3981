"""ONNX Runtime: graphs, and packages that may be missing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .manifest import StandaloneError

PROBE_SIZE, PROBE_WEIGHT, PROBE_VALUE = 64, 127, 255


class Graph:
    """One ONNX graph, from arrays to arrays.

    Outputs are views of the runtime's memory; passing tensors of its own (``OrtValue``) takes
    longer.

    Raises:
        StandaloneError: onnxruntime is missing or cannot read the graph.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        runtime = needed("onnxruntime", "onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        # the threads of one graph must not spin while another graph computes
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # without VNNI the faster products of eight-bit integers cut off their sums
        options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has many exceptions without a common class
            raise StandaloneError(
                f"onnxruntime {runtime.__version__} cannot load {path} ({error}); install the"
                " version that the export was made with, or export again."
            ) from error
        self.inputs = {each.name: tuple(each.shape) for each in self._session.get_inputs()}
        self._outputs = [each.name for each in self._session.get_outputs()]

    def __call__(self, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run on those of ``values`` that are inputs; returns the outputs by name."""
        found = self._session.run(self._outputs, {name: values[name] for name in self.inputs})
        return dict(zip(self._outputs, found, strict=True))


def check_integer_products(probe: Graph) -> None:
    """Raise StandaloneError where products of the largest integers overflow.

    onnxruntime adds them in 16 bits on processors without VNNI, and silently cuts off the sums,
    unless it is told not to, as `Graph` does.
    """
    product = probe({"x": np.full((4, PROBE_SIZE), PROBE_VALUE, np.uint8)})["y"]
    if not (product == PROBE_SIZE * PROBE_VALUE * PROBE_WEIGHT).all():
        raise StandaloneError(
            "This onnxruntime does not multiply eight-bit integers exactly on this processor;"
            " export with --weights float32 for it."
        )


def needed(module: str, package: str) -> Any:
    """Import ``module``, or raise StandaloneError naming the ``package`` to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise StandaloneError(f"{package} is not installed: pip install {package}") from error
