"""Products, embeddings and convolutions of exported graphs against plain numpy and torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="needs pip install 'fairseq_vqem[export]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'fairseq_vqem[export]'")

from fairseq_vqem.export import quantise
from fairseq_vqem.export.layers import ExpanderLayers, transposed_as_product
from fairseq_vqem.export.onnx_graph import WEIGHTS_FILE, GraphBuilder, WeightFile
from fairseq_vqem.export.standalone.runtime import Graph


def run_graph(folder: Path, quantised: bool, build: Any, **values: np.ndarray) -> Any:
    """The outputs of the graph that ``build(graph, *inputs)`` makes."""
    with WeightFile(folder / WEIGHTS_FILE) as weights:
        graph = GraphBuilder("test", weights, quantised)
        inputs = [
            graph.input(name, value.dtype, [f"{name}{axis}" for axis in range(value.ndim)])
            for name, value in values.items()
        ]
        for number, name in enumerate(build(graph, *inputs)):
            graph.output(f"y{number}", name, np.float32, ["a"] * 2)
        model = graph.model()
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    (folder / "test.onnx").write_bytes(model.SerializeToString())
    return list(Graph(folder / "test.onnx", 1)(values).values())


def test_integers_are_the_nearest_and_zeros_stay_zero() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    weight[2] = 0.0
    integers, scales = quantise.by_row(weight)
    error = np.abs(integers * scales[:, None] - weight)
    assert (error <= scales[:, None] * 0.5001).all() and np.abs(integers).max() == 127
    assert not integers[2].any()
    blocks, scales = quantise.by_block(weight)
    assert blocks.shape == (6, 3, 16)  # 40 is padded to 48
    back = ((blocks.astype(np.float32) - 128) * scales[..., None]).reshape(6, -1)
    assert np.abs(back[:, :40] - weight).max() <= scales.max() * 0.5001
    assert not back[:, 40:].any() and not back[2].any()
    assert quantise.by_block(np.ones((1, 256), np.float32))[0].shape == (1, 2, 128)


@pytest.mark.parametrize("few_rows", [True, False])
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("width", [16, 20, 64, 384])
def test_eight_bit_products_are_near_and_do_not_mix_rows(
    tmp_path: Path, few_rows: bool, positive: bool, width: int
) -> None:
    draw = np.random.default_rng(width)
    x = draw.standard_normal((7, width)).astype(np.float32) * draw.uniform(0.1, 9, (7, 1))
    x = np.abs(x) if positive else x
    x[4] = 0.0
    x = x.astype(np.float32)
    weight, bias = (torch.from_numpy(draw.standard_normal(n)).float() for n in ((24, width), 24))

    def build(graph: GraphBuilder, x: str) -> list[str]:
        kind = {"few_rows": few_rows, "positive": positive}
        return [
            graph.linear(x, "one", weight, bias, **kind),
            graph.linear(x, "two", weight, **kind, skip_rows=3),
        ]

    with_bias, without = run_graph(tmp_path, True, build, x=x)
    exact = x @ weight.numpy().T
    tolerance = 0.02 * np.abs(x).max(1, keepdims=True) * np.abs(weight.numpy()).max() * width**0.5
    assert (np.abs(with_bias - bias.numpy() - exact) <= tolerance + 1e-6).all()
    assert (np.abs(without - exact[:, 3:]) <= tolerance + 1e-6).all()
    assert np.array_equal(with_bias[4], bias.numpy())
    for row in range(7):
        alone = run_graph(tmp_path, True, build, x=x[row : row + 1])[0]
        rounding = 1e-5 * np.abs(with_bias[row]).max()
        assert np.allclose(alone, with_bias[row : row + 1], rtol=0.0, atol=rounding)


def test_float_product_and_embedding(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((3, 8)).astype(np.float32)
    weight = torch.from_numpy(draw.standard_normal((5, 8))).float()
    ids = np.array([[4, 0], [1, 1]])

    def build(graph: GraphBuilder, x: str, ids: str) -> list[str]:
        return [graph.linear(x, "w", weight, skip_rows=2), graph.embed("w", weight, ids)]

    product, rows = run_graph(tmp_path, False, build, x=x, ids=ids)
    assert np.allclose(product, x @ weight.numpy()[2:].T, atol=1e-5)
    assert np.array_equal(rows, weight.numpy()[ids])
    assert (tmp_path / WEIGHTS_FILE).stat().st_size == weight.numel() * 4  # stored once
    rows = run_graph(tmp_path, True, build, x=x, ids=ids)[1]
    assert np.abs(rows - weight.numpy()[ids]).max() < np.abs(weight.numpy()).max() / 250


def test_transposed_convolution_is_a_product() -> None:
    torch.manual_seed(0)
    convolution = torch.nn.ConvTranspose1d(6, 6, kernel_size=4, stride=2, padding=1)
    x = torch.randn(2, 5, 6)
    weight, bias = transposed_as_product(convolution.weight, convolution.bias)
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
    seen = torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], -1)
    found = (seen @ weight.t() + bias).reshape(2, 10, 6)
    expected = convolution(x.transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["projection", "transposed-conv"])
def test_expander(tiny: Any, tmp_path: Path, kind: str) -> None:
    expander = tiny.model(expander=kind).expander
    x, mask = torch.randn(3, 4, 16), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    found, found_mask = run_graph(
        *(tmp_path, False, lambda graph, x, mask: ExpanderLayers(graph, expander)(x, mask)),
        x=x.numpy(),
        mask=mask.unsqueeze(-1).float().numpy(),
    )
    with torch.no_grad():
        expected, expected_mask = expander(x, mask.bool())
    assert np.allclose(found, expected.numpy(), atol=1e-5)
    assert np.array_equal(found_mask[..., 0] > 0, expected_mask.numpy())
