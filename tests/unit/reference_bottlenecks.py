"""The bottlenecks other than EM in float64 numpy, from their formulae. Loops are deliberate.

Gradients are central differences of a scalar. A stop-gradient sg(v) is a value taken ``at`` a fixed
point: moving the inputs leaves it alone, so that the differences are those of the path that the
formula names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from reference_em import Array, Ids, distances, nearest

Values = dict[str, Array]


@dataclass
class Result:
    """As ``BottleneckOutput``; ``scores`` and ``noisy_scores`` are what argmax decides by."""

    latents: Array
    losses: Values
    scores: Array
    noisy_scores: Array
    statistics: Values = field(default_factory=dict)


def log_softmax(scores: Array) -> Array:
    result = np.zeros_like(scores)
    for i, row in enumerate(scores):
        result[i] = row - row.max() - np.log(np.exp(row - row.max()).sum())
    return result


def relaxed(logs: Array, noise: Array, scale: float, temperature: float) -> Array:
    """softmax((log p + a·g) / τ), ``[N, K]``."""
    return np.exp(log_softmax((logs + scale * noise) / temperature))


def gradient_vq(inputs: Values, at: Values) -> Result:
    """Eq. 1-3: latents x + sg(e_z - x), losses mean (x - sg(e_z))² and mean (sg(x) - e_z)²."""
    x, e, x0, e0 = inputs["x"], inputs["embeddings"], at["x"], at["embeddings"]
    z = nearest(x0, e0)
    n, d = x.shape
    commitment, codebook = np.zeros(n), np.zeros(n)
    for i in range(n):
        commitment[i] = sum((x[i, k] - e0[z[i], k]) ** 2 for k in range(d)) / d
        codebook[i] = sum((x0[i, k] - e[z[i], k]) ** 2 for k in range(d)) / d
    latents = x + (e0[z] - x0)
    score = -distances(x0, e0)
    return Result(latents, {"commitment": commitment, "codebook": codebook}, score, score)


def gumbel(inputs: Values, noise: Array, scale: float, temperature: float) -> Result:
    """Latents softmax((log_softmax(Wx + b) + a·g) / τ) · E."""
    x = inputs["x"]
    logs = log_softmax(x @ inputs["projection.weight"].T + inputs["projection.bias"])
    latents = relaxed(logs, noise, scale, temperature) @ inputs["embeddings"]
    statistics = {"posterior_entropy": -(np.exp(logs) * logs).sum(1)}
    return Result(latents, {"commitment": np.zeros(len(x))}, logs, logs + scale * noise, statistics)


def saturate(v: Array) -> Array:
    return np.minimum(1.0, np.maximum(0.0, 1.2 / (1.0 + np.exp(-v)) - 0.1))


def semhash(inputs: Values, at: Values, noise: Array, uniform: Array, share: float) -> Result:
    """y = sat(Wx + b + n); c = sg(d) + y - sg(y) where uniform < share, else y; decoded."""

    def affine(values: Array, name: str) -> Array:
        return values @ inputs[f"{name}.weight"].T + inputs[f"{name}.bias"]

    def activations(values: Values) -> Array:
        return values["x"] @ values["projection.weight"].T + values["projection.bias"]

    y, y0 = saturate(activations(inputs) + noise), saturate(activations(at) + noise)
    c = y.copy()
    for i in range(len(y)):
        if uniform[i, 0] < share:
            for k in range(y.shape[1]):
                c[i, k] = (1.0 if y0[i, k] > 0.5 else 0.0) + y[i, k] - y0[i, k]
    hidden = np.maximum(0.0, affine(c, "on") + affine(1.0 - c, "off"))
    latents = affine(np.maximum(0.0, affine(hidden, "inner")), "outer")
    zeros = {"commitment": np.zeros(len(y))}
    return Result(latents, zeros, saturate(activations(at)), y0)


def number(bits: NDArray[np.bool_]) -> Ids:
    """Σ_k 2^k b_k of each row of ``bits`` ``[N, B]``."""
    return np.array([sum(2**k for k, b in enumerate(row) if b) for row in bits], dtype=np.int64)


def gm_vq(
    inputs: Values,
    noise: Array,
    normal: Array,
    scale: float,
    temperature: float,
    posterior_temperature: float,
    gamma: float,
    beta: float,
) -> Result:
    """Field notes, section 6, with 2σ² = T and w = 1/T; see the class for the other choices."""
    x, means = inputs["x"], inputs["embeddings"]
    (n, d), size = x.shape, len(means)
    far = distances(x, means)
    logs = log_softmax(-far / posterior_temperature)
    q, s = np.exp(logs), relaxed(logs, noise, scale, temperature)
    latents = s @ means
    for i in range(n):
        variance = sum(s[i, c] * far[i, c] / (posterior_temperature * d) for c in range(size))
        latents[i] += scale * np.sqrt(max(variance, 1e-6)) * normal[i]
    aggregate = q.mean(0) if n else np.zeros(size)
    nearness, surplus = np.zeros(n), np.zeros(n)
    for i in range(n):
        nearness[i] = gamma * sum(q[i, c] * far[i, c] / d for c in range(size))
        surplus[i] = beta * sum(
            q[i, c] * np.log(size * max(aggregate[c], 1e-30)) for c in range(size)
        )
    losses = {"commitment": np.zeros(n), "distance": nearness, "aggregate": surplus}
    statistics = {"posterior_entropy": -(q * logs).sum(1)}
    return Result(latents, losses, -far, logs + scale * noise, statistics)


def differences(value: Callable[[Values], float], inputs: Values, step: float = 1e-5) -> Values:
    """Central differences of ``value`` by every entry of every input."""
    result = {name: np.zeros_like(array) for name, array in inputs.items()}
    moved = {name: array.copy() for name, array in inputs.items()}
    for name, array in inputs.items():
        for place in np.ndindex(array.shape):
            moved[name][place] = array[place] + step
            above = value(moved)
            moved[name][place] = array[place] - step
            result[name][place] = (above - value(moved)) / (2 * step)
            moved[name][place] = array[place]
    return result
