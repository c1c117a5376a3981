"""Work-arounds for generation: the defect without them, and its absence with them."""

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import sacrebleu
import torch
from fairseq import iterative_refinement_generator, scoring
from fairseq.criterions import FairseqCriterion
from fairseq.data import Dictionary
from fairseq.logging import meters, metrics
from fairseq.models.transformer import TransformerModelBase
from fairseq.tasks.translation import TranslationTask
from fairseq_cli import generate as generate_cli
from omegaconf import OmegaConf
from teacher_helpers import tiny_teacher
from torch import Tensor

from fairseq_vqem import compat
from fairseq_vqem.errors import UserError


def rerank_problem() -> tuple[Any, TransformerModelBase, Any, list[Tensor], list[Tensor]]:
    dictionary = Dictionary()
    for symbol in "abcdef":
        dictionary.add_symbol(symbol)
    generator = iterative_refinement_generator.IterativeRefinementGenerator(dictionary)
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    teacher = tiny_teacher(task)
    pad = dictionary.pad()
    source = torch.tensor([[pad, 4, 5, 2], [6, 7, 8, 2]])
    bodies = [[4], [5, 6, 7], [8, 9], [4, 4, 4, 4]]
    hypotheses = [torch.tensor([0, *body, 2]) for body in bodies]
    return generator, teacher, [source, torch.tensor([3, 4])], hypotheses, list(source)


def expected_score(teacher: TransformerModelBase, source: Tensor, hypothesis: Tensor) -> float:
    """The teacher's mean log-probability, one sentence and one token at a time."""
    source = source[source != 1].unsqueeze(0)
    encoded = teacher.encoder(source, torch.tensor([source.size(1)]))
    prefix, total = [2], 0.0
    for token in hypothesis[1:].tolist():
        logits = teacher.decoder(torch.tensor([prefix]), encoder_out=encoded)[0][0, -1]
        total += float(torch.log_softmax(logits.double(), 0)[token])
        prefix.append(token)
    return total / (len(prefix) - 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float", 1e-5), ("half", 5e-3)])
def test_rerank_equals_an_independent_computation(dtype: str, tolerance: float) -> None:
    generator, teacher, inputs, hypotheses, sources = rerank_problem()
    with torch.no_grad():
        expected = [
            expected_score(teacher, sources[i // 2], hypothesis)
            for i, hypothesis in enumerate(hypotheses)
        ]
    getattr(teacher, dtype)()
    finalized = [[{"tokens": tokens.clone(), "score": None}] for tokens in hypotheses]
    scores = [c[0]["score"] for c in generator.rerank(teacher, finalized, inputs, 2)]
    assert [float(score) for score in scores] == pytest.approx(expected, abs=tolerance)
    assert all(score.dtype == torch.float32 for score in scores)
    kept = zip(finalized, hypotheses, strict=True)
    assert all(torch.equal(c[0]["tokens"], tokens) for c, tokens in kept)


def test_fairseq_rerank_fails() -> None:
    generator, teacher, inputs, hypotheses, _ = rerank_problem()
    finalized = [[{"tokens": tokens}] for tokens in hypotheses]
    raw = compat.original(type(generator).rerank)
    with pytest.raises(AttributeError, match="'dict' object has no attribute 'encoder_out'"):
        raw(generator, teacher, finalized, inputs, 2)


def test_the_generation_timer_waits_for_the_gpu() -> None:
    assert generate_cli.StopwatchMeter is compat.SynchronisedStopwatch
    ours, theirs = compat.SynchronisedStopwatch, meters.StopwatchMeter
    for initialised, meter, expected in ((True, ours, 2), (False, ours, 0), (True, theirs, 0)):
        timer = meter()
        with mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            is_initialized=mock.Mock(return_value=initialised),
            synchronize=mock.DEFAULT,
        ) as mocked:
            timer.start()
            timer.stop(5)
        assert mocked["synchronize"].call_count == expected
        assert timer.n == 5
        assert timer.sum > 0


def scoring_config(name: str) -> Any:
    return OmegaConf.create({"generation": {"sacrebleu": True}, "scoring": {"_name": name}})


def test_the_sacrebleu_flag_and_other_scorers() -> None:
    dictionary = Dictionary()
    assert not hasattr(scoring.build_scorer("bleu", dictionary), "add_string")
    for name in ("bleu", "sacrebleu"):
        cfg = scoring_config(name)
        compat.generation._score_with_sacrebleu(cfg)
        assert cfg.scoring._name == "sacrebleu"
    cfg = scoring_config("bleu")
    compat.generation._score_with_sacrebleu(cfg)
    scorer = scoring.build_scorer(cfg.scoring, dictionary)
    scorer.add_string("a b c d e", "a b c d e")
    assert "BLEU = 100.00" in scorer.result_string()
    with pytest.raises(UserError, match="--sacrebleu contradicts --scoring chrf"):
        compat.generation._score_with_sacrebleu(scoring_config("chrf"))


def validation_bleu(reduce: Any, *batches: tuple[int, int, int]) -> float | None:
    """BLEU of batches of (matching unigrams, unigrams, reference words) in a validation."""
    task = TranslationTask.__new__(TranslationTask)
    task.cfg = SimpleNamespace(eval_bleu=True)
    criterion = mock.Mock(spec=FairseqCriterion)
    with metrics.aggregate(new_root=True) as aggregate:
        for matches, words, reference_words in batches:
            log = {"_bleu_sys_len": words, "_bleu_ref_len": reference_words}
            for order in range(4):
                log[f"_bleu_counts_{order}"] = max(0, matches - order)
                log[f"_bleu_totals_{order}"] = max(0, words - order)
            with mock.patch.object(FairseqCriterion, "reduce_metrics"):
                reduce(task, [log | {"ntokens": 1, "nsentences": 1}], criterion)
    return aggregate.get_smoothed_values().get("bleu")


def test_a_validation_of_empty_translations_has_bleu_0() -> None:
    fairseqs, ours = compat.original(TranslationTask.reduce_metrics), TranslationTask.reduce_metrics
    assert validation_bleu(fairseqs, (0, 0, 9), (0, 0, 5)) is None
    assert validation_bleu(ours, (0, 0, 9), (0, 0, 5)) == 0.0


def test_a_batch_of_empty_translations_counts_in_the_brevity_penalty() -> None:
    fairseqs, ours = compat.original(TranslationTask.reduce_metrics), TranslationTask.reduce_metrics
    assert validation_bleu(fairseqs, (10, 10, 10), (0, 0, 10)) == 100.0
    assert validation_bleu(ours, (10, 10, 10), (0, 0, 10)) == pytest.approx(100 / math.e, abs=0.01)
    assert validation_bleu(ours, (10, 10, 10)) == 100.0


@pytest.mark.parametrize("mended", [False, True])
@pytest.mark.parametrize("language", ["zh", "de"])
def test_validation_counts_the_words_of_the_target_language(mended: bool, language: str) -> None:
    dictionary = Dictionary()
    row = torch.tensor([dictionary.add_symbol(piece) for piece in ("▁打印", "文档", "▁A4")])
    cfg = SimpleNamespace(
        target_lang=language,
        eval_bleu_remove_bpe="sentencepiece",
        eval_bleu_print_samples=False,
        eval_tokenized_bleu=False,
    )
    task = SimpleNamespace(
        cfg=cfg,
        tgt_dict=dictionary,
        tokenizer=None,
        inference_step=lambda *_, **__: [[{"tokens": row}]],
    )
    inference = TranslationTask._inference_with_bleu
    validate = inference if mended else compat.original(inference)
    own = sacrebleu.corpus_bleu
    words = 5 if mended and language == "zh" else 2
    assert validate(task, None, {"target": row[None]}, None).sys_len == words
    assert sacrebleu.corpus_bleu is own
    cfg.eval_tokenized_bleu = True
    assert validate(task, None, {"target": row[None]}, None).sys_len == 2


def test_tokenised_validation_needs_no_package_of_the_language() -> None:
    cfg = SimpleNamespace(
        target_lang="ja",
        eval_bleu_remove_bpe=None,
        eval_bleu_print_samples=False,
        eval_tokenized_bleu=True,
    )
    dictionary = Dictionary()
    row = torch.tensor([dictionary.add_symbol(word) for word in "ab"])
    task = SimpleNamespace(
        cfg=cfg,
        tgt_dict=dictionary,
        tokenizer=None,
        inference_step=lambda *_, **__: [[{"tokens": row}]],
    )
    with mock.patch("fairseq_vqem.benchmark.scoring.BLEU", side_effect=RuntimeError("no MeCab")):
        log = TranslationTask._inference_with_bleu(task, None, {"target": row[None]}, None)
        assert log.sys_len == 2
        cfg.eval_tokenized_bleu = False
        with pytest.raises(UserError, match=r"sacrebleu\[ja\]"):
            TranslationTask._inference_with_bleu(task, None, {"target": row[None]}, None)
