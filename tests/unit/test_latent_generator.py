"""The generator: invariance to batching, words and scores, re-scoring, ensembles, errors."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from fairseq.dataclass.configs import GenerationConfig
from fairseq.models.nat import NATransformerModel
from generation_helpers import generate, words
from model_helpers import assert_user_error
from teacher_helpers import tiny_teacher

from fairseq_vqem.generation import parts
from fairseq_vqem.generation.latent_generator import LatentGenerator, word_lengths
from fairseq_vqem.generation.records import LatentSearchOptions

MODES = {
    "greedy": LatentSearchOptions(),
    "beam": LatentSearchOptions(beam=3),
    "candidates": LatentSearchOptions(beam=4, candidates=3),
    "samples": LatentSearchOptions(candidates=3, temperature=1.0),
}


# --- invariance -----------------------------------------------------------------------------------


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


def test_ensemble_averages_probabilities(tiny: Any) -> None:
    logits = [torch.randn(2, 3, 5), torch.randn(2, 3, 5)]
    mean = (logits[0].softmax(-1) + logits[1].softmax(-1)) / 2
    torch.testing.assert_close(parts.average_log_probabilities(logits).exp(), mean)
    batch = tiny.batch(tiny.pairs(20))
    model, other = tiny.model(), tiny.model(seed=1)
    other.bottleneck.load_state_dict(model.bottleneck.state_dict())  # an ensemble shares its codes
    for mode in MODES.values():
        alone, partner = (words(generate(tiny, each, batch, mode)) for each in (model, other))
        both = words(generate(tiny, [model, other], batch, mode))
        assert words(generate(tiny, [model, model], batch, mode)) == alone
        assert words(generate(tiny, [other, model], batch, mode)) == both
        assert both not in (alone, partner)


# --- re-scoring -----------------------------------------------------------------------------------


def test_latent_rescoring_prefers_the_joint_score(tiny: Any) -> None:
    model, batch = tiny.model(seed=8), tiny.batch(tiny.pairs(10))
    options = LatentSearchOptions(beam=6, candidates=6)
    plain = generate(tiny, model, batch, options)
    ranked = generate(tiny, model, batch, options, "latent")
    moved = ended = 0
    for row, (before, after) in enumerate(zip(plain, ranked, strict=True)):
        scores = [float(h["score"]) for h in after]
        assert scores == sorted(scores, reverse=True)
        for h in after:
            end = score_of_the_end(model, batch, row, h)
            ended += end < 0
            joint = float(h["positional_scores"].sum()) + end + h["latent_score"]
            assert float(h["score"]) == pytest.approx(joint / len(h["tokens"]), abs=1e-4)
        key = [h["codes"].tolist() for h in before]
        assert sorted(key) == sorted(h["codes"].tolist() for h in after)
        moved += key != [h["codes"].tolist() for h in after]
    assert moved and ended


def score_of_the_end(model: Any, batch: Any, row: int, hypothesis: Any) -> float:
    """Log-probability of the end that was read, 0 where the words fill all positions."""
    source = batch["net_input"]["src_tokens"][row : row + 1]
    source = source[:, source[0].ne(model.pad)]
    encoder_out = model.encoder(source, src_lengths=torch.tensor([source.size(1)]))
    logits = model.decode_codes(hypothesis["codes"].unsqueeze(0), encoder_out)[0]
    words = len(hypothesis["tokens"]) - 1
    if words == len(logits):
        return 0.0
    return float(torch.log_softmax(logits, -1)[words, model.eos])


def test_latent_rescoring_counts_the_repeats_that_it_removes(tiny: Any) -> None:
    model, batch = tiny.model(seed=3), tiny.batch(tiny.pairs(20, seed=2))
    options, dictionary = LatentSearchOptions(beam=4, candidates=4), tiny.dictionary()
    plain, clean = (
        LatentGenerator(dictionary, [model], options, "latent", remove_repeats=remove).generate(
            [model], batch
        )
        for remove in (False, True)
    )
    assert words(plain) != words(clean)
    for before, after in zip(plain, clean, strict=True):
        assert [float(h["score"]) for h in before] == [float(h["score"]) for h in after]
        assert [h["codes"].tolist() for h in before] == [h["codes"].tolist() for h in after]


def test_teacher_rescoring(tiny: Any) -> None:
    model, teacher = tiny.model(seed=8), tiny_teacher(tiny.task())
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
    generator = task.build_generator([model, tiny_teacher(tiny.task())], args)
    assert (generator.search.candidates, generator.rescore) == (5, "teacher")
    hypotheses = task.inference_step(
        generator, [model, tiny_teacher(tiny.task())], tiny.batch(tiny.pairs(3))
    )
    assert [len(group) for group in hypotheses] == [5, 5, 5]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("score_reference", True), ("sampling", True), ("lenpen", 2.0), ("max_len_b", 50)),
        *(("print_alignment", "hard"), ("unnormalized", True), ("replace_unk", "")),
    ],
)
def test_options_of_left_to_right_search_are_refused(tiny: Any, option: str, value: Any) -> None:
    args = GenerationConfig(beam=1, nbest=2)
    tiny.task().build_generator([tiny.model()], args)
    setattr(args, option, value)
    flag = "--" + option.replace("_", "-")
    message = f"parallel decoding does not read {flag}: leave it out"
    assert_user_error(message, lambda: tiny.task().build_generator([tiny.model()], args))


def test_dropout_in_decoding_is_refused(tiny: Any) -> None:
    args = GenerationConfig(retain_dropout=True)
    assert_user_error(
        "leave out --retain-dropout", lambda: tiny.task().build_generator([tiny.model()], args)
    )


def test_a_parallel_model_is_no_teacher(tiny: Any) -> None:
    """Its decoder reads nothing of the candidate's beginning."""
    model, parallel = tiny.model(), Mock(spec=NATransformerModel)
    many = LatentSearchOptions(candidates=2)
    batch = tiny.batch(tiny.pairs(2))
    assert_user_error(
        "an autoregressive one",
        lambda: generate(tiny, [model, parallel], batch, many, "teacher"),
    )


def test_errors(tiny: Any) -> None:
    model, teacher, batch = tiny.model(), tiny_teacher(tiny.task()), tiny.batch(tiny.pairs(2))
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
            "--latent-length-reward chooses",
            lambda: tiny.task(latent_length_reward=1.0).build_generator([model], None),
        ),
        (
            "--latent-length source",
            lambda: tiny.task(stop_at_pad_latent=True).build_generator([model], None),
        ),
    ]
    generator = LatentGenerator(tiny.dictionary(), [model], many)
    prefix = batch["target"][:, :1]
    cases.append(("--prefix-size", lambda: generator.generate([model], batch, prefix)))
    for match, action in cases:
        assert_user_error(match, action)


# --- no work for nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_decoder_gets_no_more_codes_than_the_longest_output_has(
    tiny: Any, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny.model(seed=3), []
    decode = model.decode_codes
    monkeypatch.setattr(model, "decode_codes", lambda c, out: seen.append(c) or decode(c, out))
    found = generate(tiny, model, tiny.batch(tiny.pairs(6)), MODES[mode])
    longest = max(len(each["codes"]) for group in found for each in group)
    assert seen[0].size(1) == longest


def test_large_batches_of_candidates_are_decoded_in_parts(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch, rows = tiny.model(seed=3), tiny.batch(tiny.pairs(7)), []
    whole = generate(tiny, model, batch, MODES["candidates"])
    decode = model.decode_codes
    monkeypatch.setattr(parts, "MOST_TOKENS", 6 * batch["net_input"]["src_tokens"].size(1))
    monkeypatch.setattr(
        model, "decode_codes", lambda c, out: rows.append(c.size(0)) or decode(c, out)
    )
    assert words(generate(tiny, model, batch, MODES["candidates"])) == words(whole)
    assert rows == [6, 6, 6, 3]
