"""Latent search and the generator: invariance, exhaustive enumeration, limits, re-scoring."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from torch import Tensor

from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.latent_generator import (
    LatentGenerator,
    average_log_probabilities,
    word_lengths,
)
from fairseq_vqem.generation.latent_search import search_latents
from fairseq_vqem.generation.records import LatentHypothesis, LatentSearchOptions
from fairseq_vqem.models import VQEMTransformer

Hypotheses = list[list[dict[str, Any]]]
MODES = {
    "greedy": LatentSearchOptions(),
    "beam": LatentSearchOptions(beam=3),
    "candidates": LatentSearchOptions(beam=4, candidates=3),
}


def generate(
    tiny: Any,
    models: VQEMTransformer | list[Any],
    batch: dict[str, Any],
    search: LatentSearchOptions,
    rescore: str = "none",
) -> Hypotheses:
    models = models if isinstance(models, list) else [models]
    return LatentGenerator(tiny.dictionary(), models, search, rescore).generate(models, batch)


def search(
    models: VQEMTransformer | list[VQEMTransformer], batch: dict[str, Any], **options: Any
) -> LatentHypothesis:
    models = models if isinstance(models, list) else [models]
    net = batch["net_input"]
    with torch.no_grad():
        outs = [m.encoder(net["src_tokens"], src_lengths=net["src_lengths"]) for m in models]
        return search_latents(models, outs, net["src_lengths"], LatentSearchOptions(**options))


def words(hypotheses: Hypotheses) -> list[list[list[int]]]:
    return [[h["tokens"].tolist() for h in group] for group in hypotheses]


def rows(result: LatentHypothesis) -> list[list[list[int]]]:
    return [[[c for c in row if c >= 0] for row in group] for group in result.codes.tolist()]


# --- invariance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_length", ["end", "source"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rescore", ["none", "latent"])
def test_batch_of_one_equals_batch_of_many(
    tiny: Any, latent_length: str, mode: str, rescore: str
) -> None:
    model = tiny.model(latent_length=latent_length, seed=3)
    pairs = tiny.pairs(32, seed=2)
    pairs[5] = ([], [])  # the empty line
    together = generate(tiny, model, tiny.batch(pairs, source_padding=3), MODES[mode], rescore)
    alone = [generate(tiny, model, tiny.batch([p]), MODES[mode], rescore)[0] for p in pairs]
    assert len(together) == 32 and words(together) == words(alone)
    assert len({tuple(group[0]["tokens"].tolist()) for group in alone}) > 5
    for group, single in zip(together, alone, strict=True):
        for h, s in zip(group, single, strict=True):
            assert h["codes"].tolist() == s["codes"].tolist()
            assert float(h["score"]) == pytest.approx(float(s["score"]), abs=1e-4)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = generate(tiny, model, tiny.batch([pairs[i] for i in order]), MODES[mode], rescore)
    assert words(shuffled) == [words(alone)[i] for i in order]


@pytest.mark.parametrize("mode", MODES)
def test_no_target_is_needed(tiny: Any, mode: str) -> None:
    model, batch = tiny.model(), tiny.batch(tiny.pairs(6))
    wanted = words(generate(tiny, model, batch, MODES[mode]))
    batch["target"] = None
    assert words(generate(tiny, model, batch, MODES[mode])) == wanted


def test_generation_changes_nothing(tiny: Any) -> None:
    model, batch = tiny.model(dropout=0.5).train(), tiny.batch(tiny.pairs(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = words(generate(tiny, model, batch, MODES["beam"]))
    assert words(generate(tiny, model, batch, MODES["beam"])) == first
    assert model.bottleneck.codebook.pending_counts.eq(0).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- search -------------------------------------------------------------------------------------


def test_greedy_is_the_best_symbol_at_each_step(tiny: Any) -> None:
    model, batch = tiny.model(seed=4), tiny.batch(tiny.pairs(6))
    result = search(model, batch)
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


def test_marginal_end_ends_where_the_end_is_likelier_than_all_codes(tiny: Any) -> None:
    model, pairs = tiny.model(seed=4), tiny.pairs(12)
    end = model.latent_dictionary.eos()
    with torch.no_grad():  # make the end a contender: above each code, below all of them
        model.latent_predictor.output_projection.weight[end] += 0.05
    result = search(model, tiny.batch(pairs), marginal_end=True)
    longer = 0
    for pair, (codes,), (short,) in zip(
        pairs, rows(result), rows(search(model, tiny.batch(pairs))), strict=True
    ):
        single = tiny.batch([pair])
        limit = int(model.max_latents(single["net_input"]["src_lengths"], 2.0, 16))
        tokens, logs = forced(model, single, codes)
        for t, symbol in enumerate(tokens[:limit]):
            assert (symbol == end) == (t > 0 and float(logs[t, end].exp()) > 0.5)
        longer += len(codes) > len(short)
        assert len(codes) >= len(short)
    assert longer or rows(result) == rows(search(model, tiny.batch(pairs)))


def test_remove_repeats_collapses_runs(tiny: Any) -> None:
    model, batch = tiny.model(seed=3), tiny.batch(tiny.pairs(20, seed=2))
    options = LatentSearchOptions()
    dictionary = tiny.dictionary()
    plain = LatentGenerator(dictionary, [model], options).generate([model], batch)
    clean = LatentGenerator(dictionary, [model], options, remove_repeats=True)
    collapsed = clean.generate([model], batch)
    wanted = [[[t for t, _ in itertools.groupby(h)] for h in group] for group in words(plain)]
    assert words(collapsed) == wanted and words(collapsed) != words(plain)
    for group in collapsed:
        assert all(len(h["tokens"]) == len(h["positional_scores"]) for h in group)


def forced(
    model: VQEMTransformer, batch: dict[str, Any], codes: list[int]
) -> tuple[list[int], Tensor]:
    """Symbols of ``codes`` with the end, and teacher-forced log-probabilities ``[L+1, K+4]``."""
    net, d = batch["net_input"], model.latent_dictionary
    tokens = d.tokens(torch.tensor([codes]))
    tokens = torch.cat([tokens, torch.tensor([[d.eos()]])], 1)
    with torch.no_grad():
        out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
        logs = model.predict_latents(tokens, out)[0].log_softmax(-1)
    return tokens[0].tolist(), logs


def forced_score(
    model: VQEMTransformer, batch: dict[str, Any], codes: list[int], limit: int
) -> float:
    """log p(codes, end | x); the end after ``limit`` codes is certain."""
    tokens, logs = forced(model, batch, codes)
    count = len(tokens)
    if len(codes) == limit or model.cfg.latent_length == "source":
        count -= 1
    return float(sum(logs[t, tokens[t]] for t in range(count)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beam_search_equals_exhaustive_enumeration(tiny: Any, seed: int) -> None:
    model = tiny.model(codebook_size=3, seed=seed)
    pairs = [([5, 6], [7]), ([9], [7])]
    batch = tiny.batch(pairs)
    # 2^n_c is 4: an offset of 11 positions is 3 latents
    everything = [list(c) for n in (1, 2, 3) for c in itertools.product(range(3), repeat=n)]
    result = search(model, batch, beam=len(everything), candidates=10, max_ratio=0.0, max_offset=11)
    for i, pair in enumerate(pairs):
        single = tiny.batch([pair])
        scores = {tuple(c): forced_score(model, single, c, 3) for c in everything}
        lengths = {c: len(c) + 1 for c in scores}
        best = sorted(scores, key=lambda c: -scores[c] / lengths[c])[:10]
        assert rows(result)[i] == [list(c) for c in best]
        assert result.scores[i].tolist() == pytest.approx([scores[c] for c in best], abs=1e-4)
        assert result.lengths[i].tolist() == [lengths[c] for c in best]


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


def test_beam_one_is_greedy_and_candidates_are_sorted(tiny: Any) -> None:
    model, batch = tiny.model(seed=6), tiny.batch(tiny.pairs(8))
    greedy, narrow = search(model, batch), search(model, batch, beam=1, candidates=1)
    assert torch.equal(greedy.codes, narrow.codes)
    result = search(model, batch, beam=6, candidates=5)
    means = result.scores / result.lengths
    assert (means[:, :-1] >= means[:, 1:]).all()
    assert all(len({tuple(c) for c in group}) == 5 for group in rows(result))
    counted = [[len(c) + 1 for c in group] for group in rows(result)]
    assert result.lengths.tolist() == counted


@pytest.mark.parametrize("mode", ["greedy", "beam", "sampling"])
def test_maximum_length_is_each_sentence_s_own(tiny: Any, mode: str) -> None:
    model = tiny.model()
    embeddings = model.latent_predictor.embed_tokens.weight
    end = model.latent_dictionary.eos()
    model.latent_predictor.output_projection = torch.nn.Linear(16, len(embeddings))
    with torch.no_grad():
        model.latent_predictor.output_projection.bias[end] = -50.0  # never ends by itself
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


def test_sampling_is_reproducible_and_follows_the_model(tiny: Any) -> None:
    model, batch = tiny.model(codebook_size=3), tiny.batch([([5, 6], [7])])
    torch.manual_seed(0)
    first = search(model, batch, temperature=1.0, candidates=400)
    torch.manual_seed(0)
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


# --- words and scores -----------------------------------------------------------------------------


def test_tokens_and_scores_come_from_one_parallel_pass(tiny: Any) -> None:
    model, batch = tiny.model(seed=1), tiny.batch(tiny.pairs(5))
    net = batch["net_input"]
    for i, (h,) in enumerate(generate(tiny, model, batch, MODES["greedy"])):
        source = net["src_tokens"][i : i + 1]
        out = model.encoder(source, src_lengths=net["src_lengths"][i : i + 1])
        with torch.no_grad():
            logs = model.decode_codes(h["codes"].unsqueeze(0), out)[0].log_softmax(-1)
        logs[:, [0, 1]] = -math.inf
        best = logs.argmax(-1).tolist()
        expected = best[: best.index(2)] if 2 in best else best
        assert h["tokens"].tolist() == [*expected, 2]
        scores = [float(logs[t, w]) for t, w in enumerate(expected)]
        assert h["positional_scores"].tolist() == pytest.approx([*scores, 0.0], abs=1e-4)


def test_word_lengths() -> None:
    tokens = torch.tensor([[5, 2, 2, 6], [5, 6, 7, 8], [2, 5, 5, 5], [5, 6, 7, 2]])
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    assert word_lengths(tokens, real, 2).tolist() == [1, 4, 0, 2]


def test_ensemble_averages_probabilities(tiny: Any) -> None:
    logits = [torch.randn(2, 3, 5), torch.randn(2, 3, 5)]
    mean = (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2
    torch.testing.assert_close(average_log_probabilities(logits).exp(), mean)
    model, batch = tiny.model(), tiny.batch(tiny.pairs(4))
    for mode in MODES.values():
        single, twice = (
            generate(tiny, model, batch, mode),
            generate(tiny, [model, model], batch, mode),
        )
        assert words(single) == words(twice)


def test_latent_rescoring_prefers_the_joint_score(tiny: Any) -> None:
    model, batch = tiny.model(seed=8), tiny.batch(tiny.pairs(10))
    options = LatentSearchOptions(beam=6, candidates=6)
    plain = generate(tiny, model, batch, options)
    ranked = generate(tiny, model, batch, options, "latent")
    moved = 0
    for before, after in zip(plain, ranked, strict=True):
        scores = [float(h["score"]) for h in after]
        assert scores == sorted(scores, reverse=True)
        for h in after:
            joint = float(h["positional_scores"].sum()) + h["latent_score"]
            assert float(h["score"]) == pytest.approx(joint / len(h["tokens"]), abs=1e-5)
        key = [h["codes"].tolist() for h in before]
        assert sorted(key) == sorted(h["codes"].tolist() for h in after)
        moved += key != [h["codes"].tolist() for h in after]
    assert moved


def make_teacher(tiny: Any) -> TransformerModelBase:
    config = TransformerConfig()
    for part in (config.encoder, config.decoder):
        part.embed_dim, part.ffn_embed_dim, part.attention_heads, part.layers = 16, 32, 2, 1
    config.decoder.output_dim = config.decoder.input_dim = 16
    config.share_all_embeddings = True
    config.max_source_positions = config.max_target_positions = 128
    torch.manual_seed(3)
    teacher: TransformerModelBase = TransformerModelBase.build_model(config, tiny.task())
    return teacher.eval()


def test_teacher_rescoring(tiny: Any) -> None:
    model, teacher = tiny.model(seed=8), make_teacher(tiny)
    batch = tiny.batch(tiny.pairs(6))
    net = batch["net_input"]
    options = LatentSearchOptions(beam=4, candidates=4)
    for i, group in enumerate(generate(tiny, [model, teacher], batch, options, "teacher")):
        scores = [float(h["score"]) for h in group]
        assert scores == sorted(scores, reverse=True) and len(group) == 4
        for h in group:
            target = h["tokens"]
            previous = torch.cat([torch.tensor([2]), target[:-1]]).unsqueeze(0)
            source, length = net["src_tokens"][i : i + 1], net["src_lengths"][i : i + 1]
            with torch.no_grad():
                logits, _ = teacher(source, length, previous)
            logs = logits[0].log_softmax(-1).gather(1, target.unsqueeze(1))
            assert float(h["score"]) == pytest.approx(float(logs.mean()), abs=1e-4)


# --- building and errors --------------------------------------------------------------------------


def test_the_task_builds_the_generator(tiny: Any) -> None:
    task = tiny.task(latent_beam=3, latent_candidates=2, latent_max_ratio=1.5, latent_max_offset=4)
    model = tiny.model(task)
    generator = task.build_generator([model], SimpleNamespace())
    wanted = LatentSearchOptions(
        beam=3, candidates=2, max_ratio=1.5, max_offset=4, marginal_end=True
    )
    assert generator.search == wanted and generator.rescore == "none"
    args = SimpleNamespace(iter_decode_with_beam=5, iter_decode_with_external_reranker=True)
    generator = task.build_generator([model, make_teacher(tiny)], args)
    assert (generator.search.candidates, generator.rescore) == (5, "teacher")
    hypotheses = task.inference_step(
        generator, [model, make_teacher(tiny)], tiny.batch(tiny.pairs(3))
    )
    assert [len(group) for group in hypotheses] == [5, 5, 5]


def test_errors(tiny: Any) -> None:
    model, teacher, batch = tiny.model(), make_teacher(tiny), tiny.batch(tiny.pairs(2))
    many = LatentSearchOptions(candidates=2)
    cases: list[tuple[str, Any]] = [
        ("teacher's checkpoint last", lambda: generate(tiny, model, batch, many, "teacher")),
        (
            "teacher's checkpoint last",
            lambda: generate(tiny, [teacher, model], batch, many, "teacher"),
        ),
        (
            "at least --latent-candidates 2",
            lambda: generate(tiny, [model, teacher], batch, MODES["greedy"], "teacher"),
        ),
        (
            "decodes vqem_transformer checkpoints",
            lambda: generate(tiny, [model, teacher], batch, MODES["greedy"]),
        ),
        (
            "different codebooks",
            lambda: generate(tiny, [model, tiny.model(codebook_size=13)], batch, many),
        ),
        ("different codebooks", lambda: generate(tiny, [model, tiny.model(seed=1)], batch, many)),
        ("at least 1", lambda: tiny.task(latent_beam=0).build_generator([model], None)),
        (
            "--latent-length source",
            lambda: tiny.task(stop_at_pad_latent=True).build_generator([model], None),
        ),
    ]
    generator = LatentGenerator(tiny.dictionary(), [model], many)
    prefix = batch["target"][:, :1]
    cases.append(("--prefix-size", lambda: generator.generate([model], batch, prefix)))
    for match, action in cases:
        with pytest.raises(UserError, match=match) as error:
            action()
        assert "\n" not in str(error.value)
