"""Candidates of several lengths stay near the predicted length."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from peer_helpers import (
    BOS,
    EOS,
    PAD,
    SOURCES,
    batch,
    make_model,
    make_task,
    make_teacher,
    teacher_score,
)

from fairseq_vqem.errors import UserError
from fairseq_vqem.peers.generator import ParallelGenerator
from fairseq_vqem.peers.length_beam import candidate_lengths, near_lengths, to_be_written

BEAM = 20
KINDS = ("nonautoregressive_transformer", "cmlm_transformer")


def test_lengths_are_consecutive_and_bounded() -> None:
    lengths = candidate_lengths(torch.tensor([10, 2, 0]), 8, 0.3)
    assert lengths.tolist() == [
        [7, 7, 8, 9, 10, 11, 12, 13],
        [1, 1, 1, 1, 2, 3, 3, 3],
        [0, 0, 0, 0, 0, 1, 1, 1],
    ]


def test_each_candidate_has_places_for_its_words() -> None:
    model = make_model(KINDS[0])
    tokens = to_be_written(torch.tensor([0, 2]), model)
    assert tokens.tolist() == [[BOS, EOS, PAD, PAD], [BOS, model.unk, model.unk, EOS]]


@torch.no_grad()
def start_of(model: Any, source: list[int]) -> Any:
    inputs = batch([source])["net_input"]
    encoder_out = model.forward_encoder([inputs["src_tokens"], inputs["src_lengths"]])
    return model.initialize_output_tokens(encoder_out, inputs["src_tokens"])


@pytest.mark.parametrize("kind", KINDS)
def test_few_candidates_are_those_of_fairseq(kind: str) -> None:
    model = make_model(kind)
    for source in SOURCES:
        start = start_of(model, source)
        usual = model.regenerate_length_beam(start, 3).output_tokens
        if int(usual.ne(PAD).sum(1).min()) == 2:
            continue  # fairseq offers an empty candidate
        with near_lengths(model, 1.0):
            found = model.regenerate_length_beam(start, 3).output_tokens
        assert found.tolist() == usual.tolist()
    assert "regenerate_length_beam" not in vars(model)


def length_of_source(length_out: Any, encoder_out: Any, **_: Any) -> torch.Tensor:
    return encoder_out["encoder_padding_mask"][0].logical_not().sum(1)


@torch.no_grad()
def likeliest_by_teacher(model: Any, teacher: Any, source: list[int], span: float) -> list[int]:
    """The teacher's choice among the lengths allowed, each decoded alone."""
    inputs = batch([source])["net_input"]
    encoder_out = model.forward_encoder([inputs["src_tokens"], inputs["src_lengths"]])
    start = start_of(model, source)
    predicted = int(start.output_tokens.ne(PAD).sum()) - 2
    most = max(1, int(span * predicted))
    assert most < BEAM // 2
    found = []
    for length in range(max(min(predicted, 1), predicted - most), predicted + most + 1):
        tokens = torch.tensor([[BOS, *[model.unk] * length, EOS]])
        scores = torch.zeros(tokens.shape)
        record = start._replace(output_tokens=tokens, output_scores=scores)
        found.append(model.forward_decoder(record, encoder_out).output_tokens[0])
    return max(found, key=lambda tokens: teacher_score(teacher, source, tokens)).tolist()


def test_the_teacher_chooses_among_lengths_near_the_predicted() -> None:
    task = make_task()
    model, teacher = make_model(KINDS[0], task), make_teacher(task)
    model.decoder.forward_length_prediction = length_of_source  # a random head says hundreds
    options = Namespace(iter_decode_with_beam=BEAM, iter_decode_with_external_reranker=True)
    chosen = {}
    for span in (0.3, None):
        generator = ParallelGenerator(
            model.encoder.dictionary, [model, teacher], options, length_span=span
        )
        found = generator.generate([model, teacher], batch(SOURCES))
        chosen[span] = [hypotheses[0]["tokens"].tolist() for hypotheses in found]
    assert chosen[0.3] == [likeliest_by_teacher(model, teacher, source, 0.3) for source in SOURCES]
    assert chosen[0.3] != chosen[None]


@pytest.mark.parametrize(
    ("kind", "span", "beam", "message"),
    [
        ("fertility_nat", 0.3, 5, "NAT's or CMLM's candidates"),
        ("levenshtein_transformer", 0.3, 1, "NAT's or CMLM's candidates"),
        (KINDS[0], 0.3, 1, "--iter-decode-with-beam 2 or more"),
        (KINDS[0], 0.0, 5, "--length-span 0.0 is impossible"),
        (KINDS[1], 1.5, 5, "--length-span 1.5 is impossible"),
    ],
)
def test_what_has_no_such_candidates_is_refused(
    kind: str, span: float, beam: int, message: str
) -> None:
    model = make_model(kind)
    options = Namespace(iter_decode_with_beam=beam)
    with pytest.raises(UserError, match=message):
        ParallelGenerator(model.encoder.dictionary, [model], options, length_span=span)
