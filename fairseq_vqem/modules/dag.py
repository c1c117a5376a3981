"""The arithmetic of directed acyclic graphs over words (Huang et al., DA-Transformer, 2022).

Each position of the output is a vertex; edges lead forwards. A path begins at the first vertex and
ends at the last real one, and what stands at the vertices between them is the sentence: a sentence
has the probability of all of its paths. B sentences, L vertices, W words, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fairseq_vqem.export.standalone.vertices import path_of
from fairseq_vqem.modules.ctc import random_choice

NEVER = -1e9  # the logarithm of what cannot be; finite, so that differences have gradients
RAREST = 1e-30  # least probability of a possible edge: keeps every sentence that fits possible


@dataclass
class GraphOutput:
    """What one training forward over a graph gives.

    Attributes:
        logits: ``[B, L, V]`` words at each vertex.
        edges: ``[B, L, L]`` log-probability of each edge, see `Edges`.
        vertices: ``[B, L]`` true at real vertices, which come first.
        glanced: ``[B, W]`` true at words that the decoder was shown.
        words: ``[B, W]`` target words without BOS and EOS, arbitrary beyond ``counts`` ``[B]``.
    """

    logits: Tensor
    edges: Tensor
    vertices: Tensor
    glanced: Tensor
    words: Tensor
    counts: Tensor


class Edges(nn.Module):
    """Log-probabilities of where a path goes next (section 3.2 of the paper).

    Each head has a distribution over all later vertices, and each vertex mixes the heads with
    weights of its own.

    Args:
        dimension: size D of a vertex's state.
        heads: H, of which D must be a multiple.
    """

    def __init__(self, dimension: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(2 * dimension, dimension)
        self.key = nn.Linear(2 * dimension, dimension)
        self.gate = nn.Linear(2 * dimension, heads)

    def forward(self, states: Tensor, positions: Tensor, vertices: Tensor) -> Tensor:
        """``[B, L, L]``: row by row where a path goes from there; -inf where it cannot.

        Args:
            states: ``[B, L, D]`` of the decoder's last layer.
            positions: ``[B, L, D]`` embeddings of the vertices' places.
            vertices: ``[B, L]`` true at real vertices, which come first.
        """
        x = torch.cat([states, positions], -1)
        query, key, gate = (layer(x).float() for layer in (self.query, self.key, self.gate))
        with torch.autocast(x.device.type, enabled=False):
            return mixed_edges(query, key, gate, vertices)


def mixed_edges(query: Tensor, key: Tensor, gate: Tensor, vertices: Tensor) -> Tensor:
    """`Edges.forward` of projected vertices: ``[B, L, D]`` twice, and ``[B, L, H]``."""
    heads = gate.size(-1)
    query, key = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key))
    scores = query @ key.transpose(2, 3) / math.sqrt(key.size(-1))  # [B, H, L, L]
    later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
    possible = later & vertices.unsqueeze(1) & vertices.unsqueeze(2)
    scores = torch.log_softmax(scores.masked_fill(~possible.unsqueeze(1), NEVER), -1)
    weights = torch.log_softmax(gate, -1).transpose(1, 2)
    mixed = torch.logsumexp(scores + weights.unsqueeze(-1), 1)
    return mixed.masked_fill(~possible, float("-inf"))


def word_scores(logits: Tensor, words: Tensor) -> Tensor:
    """Log-probability ``[B, L, W]`` of each of ``words`` ``[B, W]`` at each vertex."""
    logits = logits.float()
    index = words.unsqueeze(1).expand(-1, logits.size(1), -1)
    return logits.gather(2, index) - logits.logsumexp(-1, keepdim=True)


def fits(counts: Tensor, vertices: Tensor) -> Tensor:
    """``[B]`` true where there are vertices for ``counts`` ``[B]`` words beside the two ends."""
    return counts <= vertices.sum(1) - 2


def log_likelihood(edges: Tensor, scores: Tensor, counts: Tensor, vertices: Tensor) -> Tensor:
    """Log-probability ``[B]`` of each sentence over all of its paths (equations 4 and 5).

    A path that is e^87 times less probable than the best one of as many words is lost, even if it
    would be the better one in the end.

    Args:
        edges: ``[B, L, L]``, see `Edges`.
        scores: ``[B, L, W]``, see `word_scores`.
        counts: how many of the words are a sentence's, ``[B]``.
        vertices: ``[B, L]``.

    Returns:
        Arbitrary where the words do not fit, see `fits`.
    """
    with torch.autocast(edges.device.type, enabled=False):
        return _log_likelihood(edges.float(), scores.float(), counts, vertices)


def _log_likelihood(edges: Tensor, scores: Tensor, counts: Tensor, vertices: Tensor) -> Tensor:
    ends = vertices.sum(1, keepdim=True) - 1
    place = torch.arange(edges.size(1), device=edges.device)
    possible = edges.isfinite()
    steps = edges.exp().clamp(min=RAREST) * possible
    reached = torch.where(place.eq(0), 0.0, NEVER).expand(edges.size(0), -1)
    for word in range(scores.size(2)):
        # a vertex from which the remaining words would not fit before the end is left out, lest it
        # outweigh the others beyond what floating point holds
        room = place <= ends - counts.unsqueeze(1) + word
        arrived = _through(reached, steps) + scores[..., word]
        arrived = arrived.masked_fill(~room, NEVER)
        within = (word < counts).unsqueeze(1)
        reached = torch.where(within, arrived, reached)
    last = steps.gather(2, ends.unsqueeze(1).expand(-1, edges.size(1), 1))
    return _through(reached, last).squeeze(1)


def _through(reached: Tensor, steps: Tensor) -> Tensor:
    """``log(exp(reached) @ steps)``: ``[B, L]`` and ``[B, L, N]`` to ``[B, N]``."""
    most = reached.detach().amax(1, keepdim=True)
    arrived = ((reached - most).exp().unsqueeze(1) @ steps).squeeze(1)
    return arrived.clamp(min=1e-37).log().masked_fill(arrived <= 0, NEVER) + most


@torch.no_grad()
def best_path(edges: Tensor, scores: Tensor, counts: Tensor, vertices: Tensor) -> Tensor:
    """The vertex ``[B, W]`` of each word on the most probable path (Viterbi).

    Arguments as for `log_likelihood`. Arbitrary beyond ``counts``, and where the words do not fit.
    """
    ends = vertices.sum(1, keepdim=True) - 1
    place = torch.arange(edges.size(1), device=edges.device)
    reached = torch.where(place.eq(0), 0.0, NEVER).expand(edges.size(0), -1)
    origins = []
    for word in range(scores.size(2)):
        arrived, origin = (reached.unsqueeze(2) + edges).max(1)
        within = (word < counts).unsqueeze(1)
        reached = torch.where(within, (arrived + scores[..., word]).clamp(min=NEVER), reached)
        origins.append(torch.where(within, origin, place))
    last = edges.gather(2, ends.unsqueeze(1).expand(-1, edges.size(1), 1)).squeeze(2)
    vertex = (reached + last).argmax(1, keepdim=True)
    path = []
    for origin in reversed(origins):
        path.append(vertex)
        vertex = origin.gather(1, vertex)
    return torch.cat(path[::-1], 1) if path else counts.new_zeros(counts.size(0), 0)


@torch.no_grad()
def words_to_show(output: GraphOutput, ratio: float) -> tuple[Tensor, Tensor]:
    """Vertices ``[B, W]`` of the words on their best path, and the words ``[B, W]`` to reveal.

    As many as ``ratio`` times those that their vertex would not write (section 3.4, after Qian et
    al., 2021), drawn among all; none where the target does not fit.
    """
    words, counts = output.words, output.counts
    scores = word_scores(output.logits, words)
    path = best_path(output.edges, scores, counts, output.vertices)
    written = output.logits.argmax(-1).gather(1, path)
    real = torch.arange(words.size(1), device=words.device) < counts.unsqueeze(1)
    wrong = (written.ne(words) & real).sum(1)
    return path, random_choice(real, (wrong * ratio).long() * fits(counts, output.vertices))


def lookahead(edges: Tensor, likeliest: Tensor, vertices: Tensor) -> list[list[int]]:
    """The vertices of each sentence, each chosen by its edge and its likeliest word together.

    Section 3.5 of the paper. The ends are left out.

    Args:
        edges: ``[B, L, L]``.
        likeliest: ``[B, L]`` log-probability of the likeliest word of each vertex.
        vertices: ``[B, L]``.
    """
    ends = vertices.sum(1) - 1
    likeliest = likeliest.scatter(1, ends.unsqueeze(1), 0.0)  # the end writes nothing
    following = (edges + likeliest.unsqueeze(1)).argmax(2)
    return [
        path_of(successors, end)
        for successors, end in zip(following.tolist(), ends.tolist(), strict=True)
    ]
