"""Peer models through fairseq's generator: complete, batch-invariant, blind to references."""

from __future__ import annotations

import itertools
from argparse import Namespace

import pytest
import torch
from fairseq.models import ARCH_MODEL_REGISTRY
from peer_helpers import (
    BOS,
    EOS,
    FAIRSEQ,
    PAD,
    PEERS,
    SOURCES,
    WITH_CANDIDATES,
    batch,
    best,
    candidates_of,
    decode,
    make_model,
    make_task,
    make_teacher,
    model_config,
    sentences,
    teacher_score,
)

from fairseq_vqem.generation import parts
from fairseq_vqem.peers.generator import ParallelGenerator


@pytest.mark.parametrize("kind", PEERS)
def test_options_that_an_older_checkpoint_lacks_get_their_defaults(kind: str) -> None:
    """As a checkpoint of a named architecture, whose options fairseq does not complete."""
    config = Namespace(arch=f"{kind}_small", **vars(model_config(kind)))
    new = "max_fertility" if kind == "fertility_nat" else "glat_schedule"
    delattr(config, new)
    ARCH_MODEL_REGISTRY[kind].build_model(config, make_task())
    assert getattr(config, new) == {"glat_schedule": "0", "max_fertility": 50}[new]


@pytest.mark.parametrize(
    ("kind", "beam"),
    [*((kind, 1) for kind in (*PEERS, *FAIRSEQ)), *((kind, 5) for kind in WITH_CANDIDATES)],
)
def test_batches_and_padding_never_change_a_hypothesis(kind: str, beam: int) -> None:
    model = make_model(kind)
    options = {"iter_decode_with_beam": beam}
    together = decode([model], batch(SOURCES), **options)
    assert len(together) == len(SOURCES)
    assert len({tuple(tokens) for tokens in together}) > 6
    assert decode([model], batch(SOURCES, padding=3), **options) == together
    assert decode([model], batch(SOURCES[::-1]), **options) == together[::-1]
    assert [decode([model], batch([source]), **options)[0] for source in SOURCES] == together


@pytest.mark.parametrize("kind", FAIRSEQ[:2])
def test_ensembles_never_change_a_hypothesis_with_the_batch(kind: str) -> None:
    alone = decode([make_model(kind)], batch(SOURCES))
    models = [make_model(kind), make_model(kind)]
    for parameter in models[1].parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    together = decode(models, batch(SOURCES))
    assert together != alone
    assert [decode(models, batch([source]))[0] for source in SOURCES] == together


@pytest.mark.parametrize("kind", [*PEERS, *FAIRSEQ])
def test_references_never_change_a_hypothesis(kind: str) -> None:
    model = make_model(kind)
    blind = decode([model], batch(SOURCES))
    assert decode([model], batch(SOURCES, sentences(len(SOURCES), seed=5))) == blind


@pytest.mark.parametrize("kind", PEERS)
def test_hypotheses_begin_end_and_hold_words_only(kind: str) -> None:
    model = make_model(kind)
    model.decoder.embed_tokens.weight.data[[PAD, EOS]] *= 30  # would be chosen if they were allowed
    for tokens in decode([model], batch(SOURCES)):
        assert tokens[0] == BOS and tokens[-1] == EOS
        assert not {BOS, PAD, EOS} & set(tokens[1:-1])


@pytest.mark.parametrize("kind", [*PEERS, *FAIRSEQ])
def test_history_and_scores(kind: str) -> None:
    model = make_model(kind)
    options = Namespace(retain_iter_history=True)
    generator = ParallelGenerator(model.encoder.dictionary, [model], options)
    for (hypothesis,) in generator.generate([model], batch(SOURCES)):
        assert hypothesis["positional_scores"].shape == hypothesis["tokens"].shape
        assert hypothesis["history"][-1]["tokens"].tolist() == hypothesis["tokens"].tolist()
        assert float(hypothesis["score"]) <= 0.0
        assert (hypothesis["steps"] == 0) == (kind in PEERS or kind == FAIRSEQ[0])


@pytest.mark.parametrize("kind", WITH_CANDIDATES)
@pytest.mark.parametrize("count", [2, 10, 100])
def test_no_empty_candidate_wins_where_there_are_words(kind: str, count: int) -> None:
    """fairseq counts the ends as two sure words, which makes the empty one the best of all."""
    found = decode([make_model(kind)], batch(SOURCES[:8]), iter_decode_with_beam=count)
    alone = decode([make_model(kind)], batch(SOURCES[:8]))
    assert sum(len(tokens) == 2 for tokens in found) <= sum(len(tokens) == 2 for tokens in alone)
    assert any(len(tokens) > 2 for tokens in found)


@pytest.mark.parametrize("kind", ["fertility_nat", "nonautoregressive_transformer"])
@pytest.mark.parametrize("count", [2, 10, 100])
def test_best_candidate_by_own_and_by_teachers_score(kind: str, count: int) -> None:
    task = make_task()
    model, teacher = make_model(kind, task), make_teacher(task)
    sources = [*SOURCES[:3], []]
    options = dict(iter_decode_with_beam=count)
    own = decode([model], batch(sources), **options)
    options["iter_decode_with_external_reranker"] = True
    taught = best([model, teacher], batch(sources), **options)
    for row, source in enumerate(sources):
        candidates = candidates_of(model, source, count)
        assert len(candidates) == count
        likeliest = max(candidates, key=lambda candidate: candidate["score"])
        assert own[row] == likeliest["tokens"].tolist()
        scores = [teacher_score(teacher, source, each["tokens"]) for each in candidates]
        chosen = candidates[max(range(count), key=lambda i: scores[i])]
        assert taught[row]["tokens"].tolist() == chosen["tokens"].tolist()
        assert float(taught[row]["score"]) == pytest.approx(max(scores), abs=1e-5)


def test_first_candidate_is_the_most_probable() -> None:
    model = make_model("fertility_nat")
    for source, tokens in zip(SOURCES, decode([model], batch(SOURCES)), strict=True):
        assert candidates_of(model, source, 3)[0]["tokens"].tolist() == tokens


def test_large_batches_of_candidates_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("fertility_nat")
    whole = decode([model], batch(SOURCES), iter_decode_with_beam=5)
    rows = []
    forward = model.forward_decoder
    width = max(map(len, SOURCES)) + 2
    monkeypatch.setattr(parts, "MOST_TOKENS", 11 * width)
    monkeypatch.setattr(
        model,
        "forward_decoder",
        lambda out, *a, **k: rows.append(len(out[0])) or forward(out, *a, **k),
    )
    assert decode([model], batch(SOURCES), iter_decode_with_beam=5) == whole
    assert rows == [10] * 6


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("kind", ["nonautoregressive_transformer", "fertility_nat"])
def test_repeats_are_removed_before_the_teacher_judges(kind: str, count: int) -> None:
    task = make_task()
    model, teacher = make_model(kind, task), make_teacher(task)
    options = {"iter_decode_with_beam": count}
    plain = decode([model], batch(SOURCES), **options)
    removed = best([model], batch(SOURCES), remove_repeats=True, **options)
    assert [each["tokens"].tolist() for each in removed] == [collapsed(tokens) for tokens in plain]
    assert any(collapsed(tokens) != tokens for tokens in plain)
    if count > 1:
        options["iter_decode_with_external_reranker"] = True
        taught = best([model, teacher], batch(SOURCES), remove_repeats=True, **options)
        for source, each in zip(SOURCES, taught, strict=True):
            assert collapsed(each["tokens"].tolist()) == each["tokens"].tolist()
            wanted = teacher_score(teacher, source, each["tokens"])
            assert float(each["score"]) == pytest.approx(wanted, abs=1e-5)


def collapsed(tokens: list[int]) -> list[int]:
    return [token for token, _ in itertools.groupby(tokens)]
