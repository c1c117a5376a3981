"""Prefix beam search over CTC frames: against enumeration, in the generator, with a teacher."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ctc_helpers import tiny_ctc_nat
from teacher_helpers import tiny_teacher
from torch.nn.functional import ctc_loss

from fairseq_vqem.errors import UserError
from fairseq_vqem.export.standalone.frames import likeliest_sentences
from fairseq_vqem.peers import ctc_nat
from fairseq_vqem.peers.ctc_nat import CTCNAT
from fairseq_vqem.peers.own_search import OwnSearchGenerator

BOS, PAD, EOS = 0, 1, 2
VOCABULARY, ALL = 4, 400


def random_frames(seed: int, batch: int = 3, frames: int = 5) -> Any:
    """Log-probabilities ``[B, T, V]`` with the blank first."""
    draw = np.random.default_rng(seed)
    scores = 1.5 * draw.normal(size=(batch, frames, VOCABULARY))
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def searched(
    scores: Any, frames: list[int], width: int, choices: int = VOCABULARY - 1
) -> tuple[list[list[list[int]]], Any]:
    """The search where each frame offers ``choices`` words, the likeliest first."""
    words = np.argsort(-scores[..., 1:], axis=-1)[..., :choices] + 1
    offered = np.take_along_axis(scores, words, -1)
    rows = zip(scores[..., 0], words, offered, frames, strict=True)
    found = [likeliest_sentences(b[:n], w[:n], s[:n], width) for b, w, s, n in rows]
    return [sentences for sentences, _ in found], np.array([totals for _, totals in found])


def enumerated(scores: Any) -> list[tuple[tuple[int, ...], float]]:
    """Every sentence that frames ``[T, V]`` can write, the likeliest first, by the definition."""
    totals: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(VOCABULARY), repeat=len(scores)):
        sentence = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)
        probability = math.exp(sum(scores[frame, symbol] for frame, symbol in enumerate(path)))
        totals[sentence] = totals.get(sentence, 0.0) + probability
    return sorted(totals.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("seed", range(8))
def test_a_wide_beam_finds_every_sentence_with_its_probability(seed: int) -> None:
    scores, frames = random_frames(seed), [5, 1 + seed % 5, 3]
    sentences, found = searched(scores, frames, ALL)
    for row, count in enumerate(frames):
        expected = enumerated(scores[row, :count])
        assert [tuple(each) for each in sentences[row][: len(expected)]] == [s for s, _ in expected]
        logs = [math.log(probability) for _, probability in expected]
        assert found[row, : len(expected)] == pytest.approx(logs)
        filled = sentences[row][len(expected) :]
        assert all(each == sentences[row][0] for each in filled)


def test_a_beam_of_a_few_finds_the_likeliest_and_no_sentence_twice() -> None:
    scores = random_frames(20, batch=30)
    sentences, found = searched(scores, [5] * 30, 8)
    assert all(len({tuple(each) for each in beams}) == 8 for beams in sentences)
    assert (np.diff(found, axis=1) <= 0).all()
    best = [enumerated(each)[0] for each in scores]
    assert sum(tuple(b[0]) == s for b, (s, _) in zip(sentences, best, strict=True)) >= 28


def test_words_that_a_frame_does_not_offer_count_for_nothing() -> None:
    scores = random_frames(7)
    dropped = np.argsort(-scores[..., 1:], axis=-1)[..., -1:] + 1
    without = scores.copy()
    np.put_along_axis(without, dropped, -np.inf, -1)
    sentences, found = searched(scores, [5, 5, 5], ALL, choices=VOCABULARY - 2)
    for row in range(3):
        expected = [(s, p) for s, p in enumerated(without[row]) if p > 0.0]
        assert [tuple(each) for each in sentences[row][: len(expected)]] == [s for s, _ in expected]
        logs = [math.log(probability) for _, probability in expected]
        assert found[row, : len(expected)] == pytest.approx(logs)


def plain_search(scores: Any, width: int) -> list[tuple[tuple[int, ...], float]]:
    """Prefix beam search over frames ``[T, V]`` by its definition, nothing left out."""
    beams = {(): (0.0, -math.inf)}
    for frame in scores:
        after: dict[tuple[int, ...], tuple[float, float]] = {}
        for sentence, (blank, word) in beams.items():
            either = np.logaddexp(blank, word)
            offers = [(sentence, either + frame[0], -math.inf)]
            if sentence:
                offers.append((sentence, -math.inf, word + frame[sentence[-1]]))
            for n in range(1, len(frame)):
                before = blank if sentence and sentence[-1] == n else either
                offers.append(((*sentence, n), -math.inf, before + frame[n]))
            for longer, *found in offers:
                known = after.get(longer, (-math.inf, -math.inf))
                after[longer] = tuple(np.logaddexp(known, found).tolist())
        best = sorted(after.items(), key=lambda item: -np.logaddexp(*item[1]))
        beams = dict(best[:width])
    return [(sentence, float(np.logaddexp(*ends))) for sentence, ends in beams.items()]


@pytest.mark.parametrize("width", [1, 2, 5, 20])
@pytest.mark.parametrize("sureness", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("impossible", [0.0, 0.3])
def test_what_is_left_out_would_not_have_been_kept(
    width: int, sureness: float, impossible: float
) -> None:
    for seed in range(10):
        scores = sureness * np.random.default_rng(seed).normal(size=(12, 6))
        scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
        scores[:, 1:][np.random.default_rng(seed).random((12, 5)) < impossible] = -np.inf
        (sentences,), (found,) = searched(scores[None], [12], width, 5)
        expected = plain_search(scores, width)
        assert [tuple(each) for each in sentences] == [sentence for sentence, _ in expected]
        assert found == pytest.approx([total for _, total in expected])


def batch_of(tiny: Any, count: int = 12) -> dict[str, Any]:
    torch.manual_seed(5)
    rows = [torch.randint(4, 24, (1 + 2 * n % 9,)).tolist() for n in range(count)]
    sample: dict[str, Any] = tiny.batch([([BOS, *row], [4]) for row in rows])
    return sample


def generator_of(task: Any, models: list[Any], beam: int, **options: Any) -> OwnSearchGenerator:
    arguments = SimpleNamespace(iter_decode_with_beam=beam, **options)
    generator = task.build_generator(models, arguments)
    assert isinstance(generator, OwnSearchGenerator)
    return generator


def encoded(model: CTCNAT, sample: dict[str, Any]) -> Any:
    inputs = sample["net_input"]
    return model.forward_encoder([inputs["src_tokens"], inputs["src_lengths"]])


@torch.no_grad()
def test_scores_are_those_of_the_loss(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctc_nat, "SYMBOLS_PER_FRAME", 100)
    model, _ = tiny_ctc_nat(tiny)
    for parameter in model.decoder.layer_norm.parameters():
        parameter.mul_(5.0)  # a few paths have nearly all of the probability
    output = encoded(model, batch_of(tiny))
    sentences, scores = model.search(output, 100, 0.0)
    log_probabilities, frames = model.read(output, 0.0)
    for row, beams in enumerate(sentences):
        count = int(frames[row].sum())
        loss = ctc_loss(
            log_probabilities[row, :count].unsqueeze(1),
            torch.tensor([beams[0]]),
            torch.tensor([count]),
            torch.tensor([len(beams[0])]),
            blank=model.blank,
            reduction="sum",
        )
        assert scores[row][0] <= -float(loss) + 1e-4
        assert scores[row][0] == pytest.approx(-float(loss), abs=0.05)


def test_generates_the_likeliest_whatever_the_batch(tiny: Any) -> None:
    model, task = tiny_ctc_nat(tiny)
    sample = batch_of(tiny)
    generator = generator_of(task, [model], 5)
    found = generator.generate([model], sample)
    sentences, scores = model.search(encoded(model, sample), 5, 0.0)
    assert [each[0]["tokens"].tolist()[1:-1] for each in found] == [b[0] for b in sentences]
    for (best,), (total, *_) in zip(found, scores, strict=True):
        assert float(best["positional_scores"].sum()) == pytest.approx(total, abs=1e-4)
        assert float(best["score"]) == pytest.approx(total / len(best["tokens"]), abs=1e-4)
    plain = task.build_generator([model], SimpleNamespace()).generate([model], sample)
    assert any(
        not torch.equal(a[0]["tokens"], b[0]["tokens"]) for a, b in zip(found, plain, strict=True)
    )
    for row in range(3):
        one = {name: sample["net_input"][name][row : row + 1] for name in ("src_tokens",)}
        one["src_lengths"] = sample["net_input"]["src_lengths"][row : row + 1]
        (alone,) = generator.generate([model], {"net_input": one})
        assert torch.equal(alone[0]["tokens"], found[row][0]["tokens"])


def test_repeats_are_removed_before_a_teacher_judges(tiny: Any) -> None:
    model, task = tiny_ctc_nat(tiny)
    teacher = tiny_teacher(tiny.task(), layers=2).eval()
    sample, arguments = batch_of(tiny, 40), SimpleNamespace(iter_decode_with_beam=4)
    reranked = SimpleNamespace(iter_decode_with_beam=4, iter_decode_with_external_reranker=True)
    for models, options in (([model], arguments), ([model, teacher], reranked)):
        outputs = []
        for task.cfg.remove_repeats in (False, True):
            generator = task.build_generator(models, options)
            found = generator.generate(models, sample)
            outputs.append([each[0]["tokens"].tolist() for each in found])
        doubled = [any(a == b for a, b in itertools.pairwise(each)) for each in outputs[0]]
        assert any(doubled)
        assert not any(a == b for each in outputs[1] for a, b in itertools.pairwise(each))


def test_history_is_kept_where_it_is_asked_for(tiny: Any) -> None:
    model, task = tiny_ctc_nat(tiny)
    generator = generator_of(task, [model], 3, retain_iter_history=True)
    for (best,) in generator.generate([model], batch_of(tiny)):
        assert torch.equal(best["history"][0]["tokens"], best["tokens"])


def test_penalty_on_the_blank_makes_sentences_longer(tiny: Any) -> None:
    model, _ = tiny_ctc_nat(tiny)
    output = encoded(model, batch_of(tiny))
    lengths = [
        sum(len(beams[0]) for beams in model.search(output, 5, penalty)[0])
        for penalty in (-4.0, 0.0, 4.0)
    ]
    assert lengths[0] < lengths[1] < lengths[2]


@torch.no_grad()
def test_the_teacher_chooses(tiny: Any) -> None:
    model, task = tiny_ctc_nat(tiny)
    teacher = tiny_teacher(tiny.task(), layers=2).eval()
    sample = batch_of(tiny)
    reranked = dict(iter_decode_with_external_reranker=True)
    generator = generator_of(task, [model, teacher], 4, **reranked)
    found = generator.generate([model, teacher], sample)
    sentences, _ = model.search(encoded(model, sample), 4, 0.0)
    source = sample["net_input"]["src_tokens"]
    chosen = []
    for row, beams in enumerate(sentences):
        begin = int(source[row].eq(BOS).nonzero()[0])
        words = source[row, begin + 1 :].unsqueeze(0)  # the batches are padded on the left
        words = words[:, : int(words.ne(PAD).sum())]
        scores = []
        for beam in beams:
            target = torch.tensor([[EOS, *beam, EOS]])
            out = teacher(words, torch.tensor([words.size(1)]), target[:, :-1])
            logs = teacher.get_normalized_probs(out, log_probs=True)[0]
            places = torch.arange(len(beam) + 1)
            scores.append(float(logs[places, target[0, 1:]].mean()))
        chosen.append(scores.index(max(scores)))
        assert found[row][0]["tokens"].tolist()[1:-1] == beams[chosen[-1]]
        assert float(found[row][0]["score"]) == pytest.approx(max(scores), abs=1e-4)
    assert len(set(chosen)) > 1


def test_a_teacher_without_candidates_is_refused(tiny: Any) -> None:
    model, task = tiny_ctc_nat(tiny)
    teacher = tiny_teacher(tiny.task(), layers=2).eval()
    with pytest.raises(UserError, match="add --iter-decode-with-beam 2 or more"):
        task.build_generator(
            [model, teacher], SimpleNamespace(iter_decode_with_external_reranker=True)
        )
