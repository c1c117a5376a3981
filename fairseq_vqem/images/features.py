"""A Fréchet distance between sets of pictures, in the features of a small classifier.

The formula is that of the FID (Heusel et al., 2017), but the features are those of a small
convolutional network that is trained here, on the labels of the data set at hand, instead of an
Inception network trained on ImageNet. So the numbers compare models under one such network; they
are no FIDs and cannot be compared with published ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_vqem.benchmark.signature import software
from fairseq_vqem.corpora.files import replacing
from fairseq_vqem.images.evaluate import batches
from fairseq_vqem.images.folder import PictureFolder
from fairseq_vqem.images.shapes import PictureShape, to_unit

FEATURES = 64
BATCH = 128
LEARNING_RATE = 2e-3


class FeatureNetwork(nn.Module):
    """Three strided 3×3 convolutions and a dense layer of 64 features, then the classes."""

    def __init__(self, shape: PictureShape, classes: int) -> None:
        super().__init__()
        channels = (shape.channels, 32, 64, 64)
        self.shape = shape
        self.convolutions = nn.ModuleList(
            nn.Conv2d(n_in, n_out, kernel_size=3, stride=2, padding=1)
            for n_in, n_out in pairwise(channels)
        )
        self.dense = nn.Linear(64 * 4 * 4, FEATURES)
        self.output = nn.Linear(FEATURES, classes)

    def features(self, pictures: Tensor) -> Tensor:
        """``[B, 64]`` of uint8 ``pictures`` ``[B, C, H, W]``."""
        x = to_unit(self.shape.pad(pictures))
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return F.relu(self.dense(x.flatten(1)))

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits of the classes ``[B, Y]``."""
        return self.output(self.features(pictures))


@dataclass(frozen=True)
class FeatureSpace:
    """A trained network and its share of right classes on the test split."""

    network: FeatureNetwork
    accuracy: float

    @torch.no_grad()
    def describe(self, pictures: np.ndarray) -> np.ndarray:
        """Features ``[N, 64]`` of ``pictures`` ``[N, C, H, W]``."""
        parts = [self.network.features(torch.from_numpy(b)).numpy() for b in batches(pictures)]
        return np.concatenate(parts).astype(np.float64)


def feature_space(folder: PictureFolder, path: Path, epochs: int, seed: int) -> FeatureSpace:
    """Train the network on the folder's labels, or read it from ``path`` where it is there.

    It is trained again where ``path`` was made of other data, with other options or other code.
    """
    network = FeatureNetwork(folder.shape, len(folder.classes))
    origin = {"data": folder.checksum, "epochs": epochs, "seed": seed, **software()}
    if path.is_file():
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["origin"] == origin:
            network.load_state_dict(state["network"])
            return FeatureSpace(network.eval(), state["accuracy"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FeatureNetwork(folder.shape, len(folder.classes))
        _train(network, *folder.read("train"), epochs)
    accuracy = _accuracy(network.eval(), *folder.read("test"))
    with replacing(path) as temporary:
        state = {"origin": origin, "accuracy": accuracy, "network": network.state_dict()}
        torch.save(state, temporary)
    return FeatureSpace(network, accuracy)


def _train(network: FeatureNetwork, pictures: np.ndarray, labels: np.ndarray, epochs: int) -> None:
    steps = -(-len(labels) // BATCH) * epochs
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, total_iters=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels)).split(BATCH):
            logits = network(torch.from_numpy(pictures[chosen.numpy()]))
            loss = F.cross_entropy(logits, torch.from_numpy(labels[chosen.numpy()]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decay.step()


@torch.no_grad()
def _accuracy(network: FeatureNetwork, pictures: np.ndarray, labels: np.ndarray) -> float:
    guesses = [network(torch.from_numpy(batch)).argmax(1).numpy() for batch in batches(pictures)]
    return float((np.concatenate(guesses) == labels).mean())


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Between the normal distributions fitted to two sets of features ``[N, F]``.

    ``‖m₁ - m₂‖² + tr(C₁ + C₂ - 2 (C₁^½ C₂ C₁^½)^½)``, each N at least 2.
    """
    means = [features.mean(0) for features in (one, other)]
    covariances = [np.cov(features, rowvar=False) for features in (one, other)]
    root = _root(covariances[0])
    middle = np.linalg.eigvalsh(root @ covariances[1] @ root)
    shared = np.sqrt(middle.clip(min=0.0)).sum()  # rounding may make zeros negative
    traces = sum(float(np.trace(each)) for each in covariances)
    return float(((means[0] - means[1]) ** 2).sum() + traces - 2.0 * shared)


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    result: np.ndarray = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    return result
