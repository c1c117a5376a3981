"""Graphs over words: every quantity against the enumeration of all paths."""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from typing import Any

import numpy as np
import pytest
import torch
from peer_helpers import (
    BOS,
    EOS,
    PAD,
    SOURCES,
    TARGETS,
    batch,
    decode,
    make_model,
    make_task,
    make_teacher,
    sentences,
    teacher_score,
)
from torch import Tensor

from fairseq_vqem.export.standalone.vertices import best_of_lengths
from fairseq_vqem.modules.dag import (
    Edges,
    GraphOutput,
    best_path,
    fits,
    log_likelihood,
    lookahead,
    word_scores,
    words_to_show,
)
from fairseq_vqem.peers.losses import DAGNATLoss

VOCABULARY = 6
VERTICES, COUNTS = [7, 5, 6, 3], [3, 2, 0, 1]


def random_graph(seed: int = 0, spread: float = 2.0) -> GraphOutput:
    torch.manual_seed(seed)
    place = torch.arange(max(VERTICES))
    vertices = place < torch.tensor(VERTICES).unsqueeze(1)
    edges = Edges(8, 2)
    states = spread * torch.randn(len(VERTICES), len(place), 8)
    found = edges(states, torch.randn_like(states), vertices)
    logits = spread * torch.randn(len(VERTICES), len(place), VOCABULARY)
    words = torch.randint(VOCABULARY, (len(VERTICES), max(COUNTS)))
    shown = torch.zeros_like(words, dtype=torch.bool)
    return GraphOutput(logits, found, vertices, shown, words, torch.tensor(COUNTS))


def paths_of(graph: GraphOutput, row: int, count: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(1, VERTICES[row] - 1), count))


def score_of(graph: GraphOutput, row: int, path: tuple[int, ...], words: list[int]) -> float:
    """By hand: each edge of the path, the one to the end included, and each word."""
    stops = [0, *path, VERTICES[row] - 1]
    total = sum(float(graph.edges[row, a, b]) for a, b in itertools.pairwise(stops))
    logs = torch.log_softmax(graph.logits[row], -1)
    return total + sum(float(logs[v, w]) for v, w in zip(path, words, strict=True))


def test_edges_lead_forwards_to_real_vertices_and_sum_to_one() -> None:
    graph = random_graph()
    for row, count in enumerate(VERTICES):
        probabilities = graph.edges[row].exp()
        for vertex in range(max(VERTICES)):
            later = range(vertex + 1, count) if vertex < count - 1 else range(0)
            possible = [place in later for place in range(max(VERTICES))]
            assert (probabilities[vertex] > 0).tolist() == possible
            total = float(probabilities[vertex].sum())
            assert total == pytest.approx(1.0 if any(possible) else 0.0, abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_likelihood_is_the_sum_over_all_paths(seed: int) -> None:
    graph = random_graph(seed)
    scores = word_scores(graph.logits, graph.words)
    found = log_likelihood(graph.edges, scores, graph.counts, graph.vertices)
    for row, count in enumerate(COUNTS):
        words = graph.words[row, :count].tolist()
        each = [score_of(graph, row, path, words) for path in paths_of(graph, row, count)]
        wanted = math.log(sum(math.exp(score) for score in each))
        assert float(found[row]) == pytest.approx(wanted, abs=1e-4)


def test_all_sentences_together_have_probability_one() -> None:
    graph = random_graph()
    total = 0.0
    for count in range(VERTICES[1] - 1):
        for words in itertools.product(range(VOCABULARY), repeat=count):
            scores = word_scores(graph.logits[1:2], torch.tensor([words], dtype=torch.long))
            parts = (graph.edges[1:2], scores, torch.tensor([count]), graph.vertices[1:2])
            total += float(log_likelihood(*parts).exp())
    assert total == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("spread", [0.5, 30.0])
def test_gradients_are_those_of_the_enumeration_and_finite(spread: float) -> None:
    graph = random_graph(4, spread)
    edges, logits = (each.detach().requires_grad_() for each in (graph.edges, graph.logits))
    scores = word_scores(logits, graph.words)
    found = log_likelihood(edges, scores, graph.counts, graph.vertices)
    assert found.isfinite().all()
    found.sum().backward()
    assert edges.grad is not None and edges.grad.isfinite().all()
    assert logits.grad is not None and logits.grad.isfinite().all()
    mine, by_hand = edges.grad[0], torch.zeros_like(edges[0])
    words = graph.words[0, : COUNTS[0]].tolist()
    paths = paths_of(graph, 0, COUNTS[0])
    each = torch.tensor([score_of(graph, 0, path, words) for path in paths])
    for share, path in zip(each.softmax(0), paths, strict=True):  # the posterior of each path
        for a, b in itertools.pairwise([0, *path, VERTICES[0] - 1]):
            by_hand[a, b] += share
    if spread < 1:
        assert torch.allclose(mine, by_hand, atol=1e-4)


def test_autocast_does_not_reach_the_likelihood() -> None:
    graph = random_graph(3)
    scores = word_scores(graph.logits, graph.words)
    wanted = log_likelihood(graph.edges, scores, graph.counts, graph.vertices)
    module, states = Edges(8, 2), torch.randn(2, 5, 8)
    real = torch.ones(2, 5, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = log_likelihood(graph.edges, scores, graph.counts, graph.vertices)
        edges = module(states, states, real)
    assert torch.equal(found, wanted)
    assert edges.dtype == torch.float32
    assert torch.allclose(edges, module(states, states, real), atol=0.1)
    assert torch.allclose(edges.exp()[:, :-1].sum(2), torch.ones(2, 4), atol=1e-5)


def test_probabilities_that_are_no_numbers_end_the_path() -> None:
    nothing = torch.full((1, 4, 4), math.nan)
    vertices = torch.ones(1, 4, dtype=torch.bool)
    assert lookahead(nothing, nothing[0, :1], vertices) == [[]]
    paths, _ = best_of_lengths(nothing.numpy(), nothing[0, :1].numpy(), np.array([4]), 2)
    assert paths == [[[], []]]


def test_best_path_is_the_likeliest_of_all() -> None:
    for seed in range(5):
        graph = random_graph(seed)
        scores = word_scores(graph.logits, graph.words)
        found = best_path(graph.edges, scores, graph.counts, graph.vertices)
        for row, count in enumerate(COUNTS):
            words = graph.words[row, :count].tolist()
            wanted = max(
                paths_of(graph, row, count), key=lambda path: score_of(graph, row, path, words)
            )
            assert found[row, :count].tolist() == list(wanted)


def likeliest_of(graph: GraphOutput) -> tuple[Tensor, Tensor]:
    scores, words = torch.log_softmax(graph.logits, -1).max(-1)
    return scores, words


def test_lookahead_chooses_edge_and_word_together() -> None:
    graph = random_graph(1)
    scores, _ = likeliest_of(graph)
    for row, path in enumerate(lookahead(graph.edges, scores, graph.vertices)):
        end, vertex, wanted = VERTICES[row] - 1, 0, []
        while True:
            totals = {
                place: float(graph.edges[row, vertex, place])
                + (0.0 if place == end else float(scores[row, place]))
                for place in range(vertex + 1, end + 1)
            }
            vertex = max(totals, key=lambda place: totals[place])
            if vertex == end:
                break
            wanted.append(vertex)
        assert path == wanted


@pytest.mark.parametrize("width", [1, 3, 9])
def test_best_path_of_each_length(width: int) -> None:
    graph = random_graph(2)
    scores, words = likeliest_of(graph)
    counts = np.array(VERTICES)
    paths, totals = best_of_lengths(graph.edges.detach().numpy(), scores.numpy(), counts, width)
    for row, count in enumerate(VERTICES):
        of_length = []
        for length in range(count - 1):
            each = [
                (score_of(graph, row, path, words[row, list(path)].tolist()), path)
                for path in paths_of(graph, row, length)
            ]
            of_length.append(max(each))
        of_length.sort(key=lambda found: found[0] / (len(found[1]) + 1), reverse=True)
        of_length += of_length[-1:] * width
        assert paths[row] == [list(path) for _, path in of_length[:width]]
        assert totals[row] == pytest.approx([score for score, _ in of_length[:width]], abs=1e-4)


def test_what_does_not_fit() -> None:
    vertices = torch.tensor([[True] * 4, [True, True, False, False]])
    assert fits(torch.tensor([2, 1]), vertices).tolist() == [True, False]
    assert fits(torch.tensor([3, 0]), vertices).tolist() == [False, True]


def test_loss_leaves_out_what_does_not_fit() -> None:
    task = make_task()
    model = make_model("dag_nat", task, upsample_scale=2)
    sources, targets = [[4], [], [4, 5], [6]], [[5, 6], [7] * 3, [8], []]  # 2 words fit the second
    criterion = DAGNATLoss(task)
    loss, size, log = criterion(model, batch(sources, targets))
    kept = [0, 2, 3]
    rest = batch([sources[i] for i in kept], [targets[i] for i in kept])
    alone, alone_size, alone_log = criterion(model, rest)
    assert size == alone_size == 3 + 2 + 1  # words and ends
    assert int(log["unfit"]) == 1 and int(alone_log["unfit"]) == 0
    assert float(loss) == pytest.approx(float(alone), rel=1e-5)
    loss.backward()
    assert all(each.grad is None or each.grad.isfinite().all() for each in model.parameters())


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_glancing_shows_words_on_their_best_path(ratio: float) -> None:
    model = make_model("dag_nat", glat_schedule=f"{ratio}:0@10", upsample_scale=3).train()
    sources = SOURCES[:8]
    targets = [*sentences(7, seed=2, longest=6), [5] * 60]  # the last does not fit
    sample = batch(sources, targets)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    forward = model.graph
    model.graph = lambda x, mask, out: seen.append((x, *forward(x, mask, out))) or seen[-1][1:]
    output = model(**sample["net_input"], target=sample["target"])
    (plain, logits, edges), (shown, *_) = seen
    first = GraphOutput(logits, edges, output.vertices, output.glanced, output.words, output.counts)
    path, _ = words_to_show(first, ratio)
    embed = model.decoder.embed_scale * model.decoder.embed_tokens.weight
    for row in range(len(sources)):
        count = int(output.counts[row])
        places = path[row, :count][output.glanced[row, :count]].tolist()
        changed = (plain[row] != shown[row]).any(-1).nonzero().flatten().tolist()
        assert set(changed) <= set(places)  # a source word may be shown as itself
        revealed = output.words[row, :count][output.glanced[row, :count]]
        for place, word in zip(places, revealed, strict=True):
            assert torch.allclose(shown[row, place], embed[word])
        written = logits[row].argmax(-1)[path[row, :count]]
        wrong = int((written != output.words[row, :count]).sum())
        assert int(output.glanced[row].sum()) == (int(ratio * wrong) if row < 7 else 0)
    assert output.glanced.any()
    model.set_num_updates(10)
    assert not model(**sample["net_input"], target=sample["target"]).glanced.any()


def test_a_few_updates_learn_to_translate() -> None:
    task = make_task()
    model = make_model("dag_nat", task, upsample_scale=3, glat_schedule="0.5").train()
    sources, targets = SOURCES[:3], TARGETS
    sample, criterion = batch(sources, targets), DAGNATLoss(task)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(120):
        optimiser.zero_grad()
        criterion(model, sample)[0].backward()
        optimiser.step()
    wanted = [[BOS, *target, EOS] for target in targets]
    assert decode([model.eval()], batch(sources)) == wanted
    assert generated(task, [model], sources, iter_decode_with_beam=3) == wanted


def test_candidates_of_other_lengths_and_the_teachers_choice() -> None:
    task = make_task()
    model, teacher = make_model("dag_nat", task, upsample_scale=2), make_teacher(task)
    sources = SOURCES[:6]
    inputs = batch(sources)["net_input"]
    encoder_out = model.forward_encoder([inputs["src_tokens"], inputs["src_lengths"]])
    candidates, scores = model.search(encoder_out, 4, 0.0)
    own = generated(task, [model], sources, iter_decode_with_beam=4)
    options: dict[str, Any] = {"iter_decode_with_external_reranker": True}
    taught = generated(task, [model, teacher], sources, iter_decode_with_beam=4, **options)
    for row, source in enumerate(sources):
        assert own[row] == [BOS, *candidates[row][0], EOS]
        judged = [
            teacher_score(teacher, source, torch.tensor([BOS, *words, EOS]))
            for words in candidates[row]
        ]
        assert taught[row] == [BOS, *candidates[row][judged.index(max(judged))], EOS]
        assert scores[row][0] <= 0
        assert not {BOS, PAD, EOS} & {word for words in candidates[row] for word in words}


def generated(task: Any, models: list[Any], sources: list[list[int]], **options: Any) -> Any:
    generator = task.build_generator(models, Namespace(**options))
    return [each[0]["tokens"].tolist() for each in generator.generate(models, batch(sources))]
