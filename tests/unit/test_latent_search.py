"""Latent search against exhaustive enumeration and teacher-forced scores; its limits."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from generation_helpers import forced, forced_score, generate, rows, search

from fairseq_vqem.generation.randomness import sample_by_inversion
from fairseq_vqem.generation.records import LatentSearchOptions
from fairseq_vqem.models import VQEMTransformer

# --- which codes ----------------------------------------------------------------------------------


def set_end_bias(model: VQEMTransformer, bias: float) -> None:
    """Raise the logit of the end by ``bias``: search has no biases, so by a feature that is 1."""
    predictor = model.latent_predictor
    weight = predictor.output_projection.weight.detach().clone()  # no longer the embeddings
    weight[:, 0] = 0.0
    weight[model.latent_dictionary.eos(), 0] = bias
    predictor.output_projection.weight = torch.nn.Parameter(weight)
    with torch.no_grad():
        predictor.layer_norm.weight[0], predictor.layer_norm.bias[0] = 0.0, 1.0


def test_greedy_is_the_best_symbol_at_each_step(tiny: Any) -> None:
    model, batch = tiny.model(seed=4), tiny.batch(tiny.pairs(6))
    set_end_bias(model, 1.5)
    result = search(model, batch)
    early = 0
    for i, (codes,) in enumerate(rows(result)):
        single = tiny.batch([tiny.pairs(6)[i]])
        limit = int(model.max_latents(single["net_input"]["src_lengths"], 2.0, 16))
        tokens, logs = forced(model, single, codes)
        for t, symbol in enumerate(tokens):
            allowed = logs[t].clone()
            if t == 0:
                allowed[model.latent_dictionary.eos()] = -math.inf
            if t < limit:
                assert int(allowed.argmax()) == symbol
        assert len(codes) <= limit
        early += len(codes) < limit
    assert early


def test_marginal_end_ends_where_the_end_is_likelier_than_all_codes(tiny: Any) -> None:
    model, pairs = tiny.model(), tiny.pairs(12)
    end = model.latent_dictionary.eos()
    set_end_bias(model, 3.0)  # a contender: often above each code, seldom above all of them
    result = search(model, tiny.batch(pairs), marginal_end=True)
    longer = early = 0
    for pair, (codes,), (short,) in zip(
        pairs, rows(result), rows(search(model, tiny.batch(pairs))), strict=True
    ):
        single = tiny.batch([pair])
        limit = int(model.max_latents(single["net_input"]["src_lengths"], 2.0, 16))
        tokens, logs = forced(model, single, codes)
        for t, symbol in enumerate(tokens[:limit]):
            assert (symbol == end) == (t > 0 and float(logs[t, end].exp()) > 0.5)
        assert len(codes) >= len(short)
        longer += len(codes) > len(short)
        early += len(codes) < limit
    assert longer and early


@pytest.mark.parametrize("reward", [0.0, 0.7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beam_search_equals_exhaustive_enumeration(tiny: Any, seed: int, reward: float) -> None:
    model = tiny.model(codebook_size=3, seed=seed)
    pairs = [([5, 6], [7]), ([9], [7])]
    batch = tiny.batch(pairs)
    # 2^n_c is 4: an offset of 11 positions is 3 latents
    everything = [list(c) for n in (1, 2, 3) for c in itertools.product(range(3), repeat=n)]
    limits = {"max_ratio": 0.0, "max_offset": 11, "length_reward": reward}
    result = search(model, batch, beam=len(everything), candidates=10, **limits)
    for i, pair in enumerate(pairs):
        single = tiny.batch([pair])
        scores = {tuple(c): forced_score(model, single, c, 3) for c in everything}
        lengths = {c: len(c) + 1 for c in scores}
        value = {c: s + reward * len(c) if reward else s / lengths[c] for c, s in scores.items()}
        best = sorted(scores, key=lambda c: -value[c])[:10]
        assert rows(result)[i] == [list(c) for c in best]
        assert result.scores[i].tolist() == pytest.approx([scores[c] for c in best], abs=1e-4)
        assert result.lengths[i].tolist() == [lengths[c] for c in best]


@pytest.mark.parametrize("codebooks", [1, 2])
def test_a_reward_for_length_makes_longer_hypotheses(tiny: Any, codebooks: int) -> None:
    stream = {"code_stream": "factorised"} if codebooks > 1 else {}
    model = tiny.model(codebook_size=16, num_codebooks=codebooks, seed=3, **stream)
    set_end_bias(model, 3.0)
    batch = tiny.batch(tiny.pairs(12))
    lengths = [
        sum(len(group[0]) for group in rows(search(model, batch, beam=4, length_reward=reward)))
        for reward in (0.1, 1.0, 2.0, 50.0)
    ]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
    limits = model.max_latents(batch["net_input"]["src_lengths"], 2.0, 16)
    assert lengths[-1] == int(limits.sum())


def test_exhaustive_enumeration_of_a_fixed_length(tiny: Any) -> None:
    model = tiny.model(codebook_size=3, latent_length="source")
    batch = tiny.batch([([5, 6, 7], [7])])  # 4 source tokens: 8 positions, 2 latents
    everything = [list(c) for c in itertools.product(range(3), repeat=2)]
    result = search(model, batch, beam=9, candidates=9)
    scores = {tuple(c): forced_score(model, batch, c, 2) for c in everything}
    assert rows(result)[0] == [list(c) for c in sorted(scores, key=lambda c: -scores[c])]
    assert result.scores[0].tolist() == pytest.approx(sorted(scores.values())[::-1], abs=1e-4)


def test_a_wider_beam_contains_real_candidates_only(tiny: Any) -> None:
    """More candidates than first codes: the surplus beams of the first step must give way."""
    model = tiny.model(codebook_size=3)
    result = search(model, tiny.batch([([5, 6], [7])]), beam=8, candidates=8)
    found = [tuple(c) for c in rows(result)[0]]
    assert len(set(found)) == 8 and result.scores.min() > -1e3


def test_candidates_are_distinct_sorted_and_counted(tiny: Any) -> None:
    model, batch = tiny.model(seed=6), tiny.batch(tiny.pairs(8))
    result = search(model, batch, beam=6, candidates=5)
    means = result.scores / result.lengths
    assert (means[:, :-1] >= means[:, 1:]).all()
    assert all(len({tuple(c) for c in group}) == 5 for group in rows(result))
    counted = [[len(c) + 1 for c in group] for group in rows(result)]
    assert result.lengths.tolist() == counted


def test_sampling_is_reproducible_and_follows_the_model(tiny: Any) -> None:
    model, batch = tiny.model(codebook_size=3), tiny.batch([([5, 6], [7])])
    first = search(model, batch, temperature=1.0, candidates=400)
    again = search(model, batch, temperature=1.0, candidates=400)
    assert torch.equal(first.codes, again.codes) and torch.equal(first.scores, again.scores)
    _, logs = forced(model, batch, [0])
    offset = model.latent_dictionary.offset
    wanted = logs[0, offset:].softmax(-1)  # the end is impossible at the first step
    drawn = torch.bincount(first.codes[0, :, 0], minlength=3) / 400
    spread = (wanted * (1 - wanted) / 400).sqrt()
    assert ((drawn - wanted).abs() < 5 * spread).all()
    limit = int(model.max_latents(batch["net_input"]["src_lengths"], 2.0, 16))
    for codes, score in zip(rows(first)[0][:20], first.scores[0].tolist(), strict=False):
        assert score == pytest.approx(forced_score(model, batch, codes, limit), abs=1e-3)
    cold = search(model, batch, temperature=1e-4, candidates=5)
    assert {tuple(c) for c in rows(cold)[0]} == {tuple(rows(search(model, batch))[0][0])}


def test_samples_belong_to_the_sentence(tiny: Any) -> None:
    """Neither the batch nor the number of candidates changes a sample."""
    model, pairs = tiny.model(), [([5] * n, [6]) for n in (1, 4, 9)]
    together = search(model, tiny.batch(pairs), temperature=1.0, candidates=3)
    for place, pair in enumerate(pairs):
        alone = search(model, tiny.batch([pair]), temperature=1.0, candidates=3)
        assert rows(alone)[0] == rows(together)[place]
        more = search(model, tiny.batch([pair]), temperature=1.0, candidates=8)
        assert all(codes in rows(more)[0] for codes in rows(alone)[0])
    assert len({tuple(codes) for codes in rows(together)[2]}) > 1


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_where_there_are_fewer_sequences_than_beams_some_are_repeated(
    tiny: Any, reward: float
) -> None:
    model, batch = tiny.model(codebook_size=3), tiny.batch([([5, 6], [7])])
    options = dict(max_ratio=0.0, max_offset=1, length_reward=reward)  # room for one code
    result = search(model, batch, beam=8, candidates=8, **options)
    found = rows(result)[0]
    assert sorted(found[:3]) == [[0], [1], [2]]
    assert all(codes in found[:3] for codes in found)
    assert (result.scores > -100).all()


def test_what_is_impossible_is_never_drawn() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    for number, wanted in ((0.0, 1), (0.499, 1), (0.5, 3), (1 - 2**-53, 3)):
        drawn = sample_by_inversion(probabilities, torch.tensor([number], dtype=torch.float64))
        assert drawn.tolist() == [wanted]


# --- how many -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["greedy", "beam", "sampling"])
def test_maximum_length_is_each_sentence_s_own(tiny: Any, mode: str) -> None:
    model = tiny.model()
    set_end_bias(model, -50.0)  # never ends by itself
    pairs = [([5] * n, [6]) for n in (0, 3, 11)]
    options = dict(greedy={}, beam=dict(beam=3), sampling=dict(temperature=1.0))[mode]
    result = search(model, tiny.batch(pairs), max_ratio=1.5, max_offset=2, **options)
    limits = [math.ceil((math.ceil(1.5 * (n + 1)) + 2) / 4) for n in (0, 3, 11)]
    assert [len(group[0]) for group in rows(result)] == limits
    source = tiny.model(latent_length="source")
    result = search(source, tiny.batch(pairs), **options)
    assert [len(group[0]) for group in rows(result)] == [
        math.ceil(2 * (n + 1) / 4) for n in (0, 3, 11)
    ]


def test_limit_respects_the_positions_of_the_model(tiny: Any) -> None:
    model = tiny.model(max_target_positions=8)
    assert model.max_latents(torch.tensor([1, 50]), 2.0, 0).tolist() == [1, 2]


@pytest.mark.parametrize("beam", [1, 4])
def test_stop_code(tiny: Any, beam: int) -> None:
    model, batch = tiny.model(latent_length="source", seed=2), tiny.batch(tiny.pairs(12))
    free = rows(search(model, batch, beam=1))
    stop = max(range(12), key=lambda code: sum(code in group[0] for group in free))
    result = search(model, batch, beam=beam, candidates=beam, stop_code=stop)
    assert any(stop in group[0] for group in free)
    assert not any(stop in codes for group in rows(result) for codes in group)
    if beam == 1:
        cut = [[c[: c.index(stop)] if stop in c else c for c in group] for group in free]
        assert rows(result) == cut
    options = LatentSearchOptions(beam=beam, candidates=beam, stop_code=stop)
    for group, found in zip(generate(tiny, model, batch, options), rows(result), strict=True):
        assert [h["codes"].tolist() for h in group] == found
        for h in group:  # nothing can be said without a latent
            if not len(h["codes"]):
                assert h["tokens"].tolist() == [2]
