"""Task ``translation_nat``: what it refuses, and the BLEU of its validation."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import metrics
from fairseq.criterions.nat_loss import LabelSmoothedDualImitationCriterion
from peer_helpers import SOURCES, batch, decode, make_model, make_task, make_teacher, sentences
from sacrebleu.metrics import BLEU

from fairseq_vqem.errors import UserError
from fairseq_vqem.peers.config import CTCNATConfig
from fairseq_vqem.peers.ctc_nat import CTCNAT
from fairseq_vqem.peers.losses import CTCNATLoss, DAGNATLoss, FertilityNATLoss
from fairseq_vqem.peers.rules import check_criterion, check_generation, check_training

UNKNOWN = 3
NOISES = ("random_delete", "random_mask", "no_noise", "full_mask")
RIGHT_NOISE = {
    "nonautoregressive_transformer": "full_mask",
    "cmlm_transformer": "random_mask",
    "levenshtein_transformer": "random_delete",
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", RIGHT_NOISE)
def test_only_one_noise_trains_each_of_fairseqs_models(kind: str, noise: str) -> None:
    task = make_task(noise=noise)
    model = make_model(kind, task)
    if noise == RIGHT_NOISE[kind]:
        check_training(model, task.cfg)
        return
    with pytest.raises(UserError, match=f"--noise {RIGHT_NOISE[kind]}"):
        check_training(model, task.cfg)


def test_peers_take_any_noise_since_they_see_none() -> None:
    task = make_task(noise="full_mask")
    task.trained = make_model("ctc_nat", task)
    check_training(task.trained, task.cfg)
    target = torch.tensor([[0, 5, 6, 2]])
    assert torch.equal(task.inject_noise(target), target)
    task.trained = make_model("nonautoregressive_transformer", task)
    assert not torch.equal(task.inject_noise(target), target)


def test_fertility_nat_needs_alignments() -> None:
    task = make_task()
    model = make_model("fertility_nat", task)
    with pytest.raises(UserError, match="fairseq-vqem align"):
        check_training(model, task.cfg)
    check_training(model, make_task(load_alignments=True).cfg)


def test_missing_alignments_are_named(tmp_path: Path) -> None:
    task = make_task(load_alignments=True, data=str(tmp_path), dataset_impl=None)
    with pytest.raises(UserError, match="fairseq-vqem align"):
        task.load_dataset("train")


def test_alignments_are_of_whole_sources(tmp_path: Path) -> None:
    task = make_task(load_alignments=True, truncate_source=True, data=str(tmp_path))
    with pytest.raises(UserError, match="leave out --truncate-source"):
        task.load_dataset("train")


def test_source_copy_needs_right_padding() -> None:
    task = make_task(noise="full_mask")
    model = make_model("nonautoregressive_transformer", task, src_embedding_copy=True)
    with pytest.raises(UserError, match="--left-pad-source"):
        check_training(model, task.cfg)
    with pytest.raises(UserError, match="--left-pad-source"):
        task.build_generator([model], Namespace())
    task = make_task(noise="full_mask", left_pad_source=False)
    task.build_generator([model], Namespace(lenpen=1.0, beam=1))
    with pytest.raises(UserError, match="does not read --lenpen"):
        task.build_generator([model], Namespace(lenpen=0.5))


@pytest.mark.parametrize("left", [True, False])
def test_inference_pads_as_training_does(left: bool) -> None:
    task = make_task(left_pad_source=left)
    dataset = task.build_dataset_for_inference(
        [torch.tensor([5, 6, 7, 2]), torch.tensor([8, 2])], [4, 2]
    )
    short = dataset.collater([dataset[0], dataset[1]])["net_input"]["src_tokens"][1].tolist()
    assert short == ([1, 1, 0, 8, 2] if left else [0, 8, 2, 1, 1])


@pytest.mark.parametrize("kind", [*RIGHT_NOISE, "ctc_nat", "dag_nat", "fertility_nat"])
def test_each_model_has_one_loss(kind: str) -> None:
    task = make_task()
    model = make_model(kind, task)
    losses = {
        "ctc_nat": CTCNATLoss(task, 0.0),
        "dag_nat": DAGNATLoss(task),
        "fertility_nat": FertilityNATLoss(task, 0.0, 1.0),
    }
    right = losses.get(kind, LabelSmoothedDualImitationCriterion(task, 0.0))
    check_criterion(model, right)
    for wrong in {*losses.values(), LabelSmoothedDualImitationCriterion(task, 0.0)}:
        if type(wrong) is not type(right):
            with pytest.raises(UserError, match="--criterion"):
                check_criterion(model, wrong)


def test_wrong_task_is_named() -> None:
    with pytest.raises(UserError, match="--task translation_nat"):
        CTCNAT.build_model(CTCNATConfig(), Namespace())


@pytest.mark.parametrize(
    ("kinds", "options", "message"),
    [
        (["teacher"], {}, "--task translation "),
        (["ctc_nat"], {"iter_decode_with_beam": 0}, "0 is impossible"),
        (["levenshtein_transformer"], {"iter_decode_with_beam": 4}, "drop --iter-decode-with-beam"),
        (["fertility_nat"], {"iter_decode_with_beam": 0}, "0 is impossible"),
        (["fertility_nat"], {"iter_decode_max_iter": 4}, "one pass"),
        (["nonautoregressive_transformer"], {"iter_decode_max_iter": 4}, "one pass"),
        (["fertility_nat", "teacher"], {}, "mixes kinds"),
        (["fertility_nat", "fertility_nat"], {}, "ensemble"),
        (["levenshtein_transformer"] * 2, {}, "ensemble"),
        (["fertility_nat"], {"iter_decode_with_external_reranker": True}, "last in --path"),
        (
            ["fertility_nat", "fertility_nat"],
            {"iter_decode_with_external_reranker": True, "iter_decode_with_beam": 4},
            "last in --path",
        ),
        (
            ["fertility_nat", "cmlm_transformer"],
            {"iter_decode_with_external_reranker": True, "iter_decode_with_beam": 4},
            "last in --path",
        ),
        (
            ["fertility_nat", "teacher"],
            {"iter_decode_with_external_reranker": True},
            "--iter-decode-with-beam 2",
        ),
        (["cmlm_transformer"], {"iter_decode_eos_penalty": 1.0}, "cmlm_transformer has neither"),
        (["fertility_nat"], {"iter_decode_eos_penalty": 1.0}, "fertility_nat has neither"),
        (["cmlm_transformer"], {"iter_decode_max_iter": -1}, "at least 0"),
        (["dag_nat"], {"iter_decode_eos_penalty": 1.0}, "dag_nat has neither"),
        (["dag_nat", "dag_nat"], {}, "ensemble"),
        (["ctc_nat"], {"retain_dropout": True}, "drop --retain-dropout"),
    ],
)
def test_generation_refuses(kinds: list[str], options: dict[str, Any], message: str) -> None:
    task = make_task()
    models = [make_teacher(task) if kind == "teacher" else make_model(kind) for kind in kinds]
    with pytest.raises(UserError, match=message):
        check_generation(models, Namespace(**options))


def test_ensembles_copy_no_sources() -> None:
    model = make_model("nonautoregressive_transformer", src_embedding_copy=True)
    check_generation([model], Namespace())
    with pytest.raises(UserError, match="give one checkpoint"):
        check_generation([model, model], Namespace())


def test_fairseqs_default_number_of_passes_is_no_error() -> None:
    check_generation([make_model("ctc_nat")], Namespace(iter_decode_max_iter=10))
    check_generation([make_model("levenshtein_transformer")], Namespace(iter_decode_max_iter=4))
    for kind in ("ctc_nat", "levenshtein_transformer"):
        check_generation([make_model(kind)], Namespace(iter_decode_eos_penalty=1.0))


def test_prefix_is_refused() -> None:
    task = make_task()
    model = make_model("ctc_nat", task)
    generator = task.build_generator([model], Namespace())
    with pytest.raises(UserError, match="--prefix-size"):
        generator.generate([model], batch(SOURCES), prefix_tokens=torch.tensor([[4]]))


def test_masked_model_never_leaves_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes may mask the same places, which fairseq takes for the end of the search."""
    model = make_model("cmlm_transformer")
    fixed = torch.randn(1, 20, len(model.decoder.dictionary))
    fixed[..., UNKNOWN] = -9.0
    lengths = torch.tensor([3, 4, 5, 6, 9, 12])
    monkeypatch.setattr(model.decoder, "forward_length_prediction", lambda *_, **__: lengths)
    monkeypatch.setattr(
        model.decoder, "output_layer", lambda x: fixed[:, : x.size(1)].expand(x.size(0), -1, -1)
    )
    for length, tokens in zip(lengths, decode([model], batch(SOURCES[:6])), strict=True):
        assert len(tokens) == length
        assert UNKNOWN not in tokens


# ---------------------------------------------------------------------- validation


def bleu_of(task: Any, model: Any, samples: list[dict[str, Any]]) -> float:
    """The corpus BLEU that fairseq logs after ``samples``."""
    task.sequence_generator = task.build_generator([model], Namespace())
    task.tokenizer = None
    criterion = CTCNATLoss(task, 0.0)
    with metrics.aggregate() as logged:
        for sample in samples:
            _, _, log = task.valid_step(sample, model, criterion)
            task.reduce_metrics([log], criterion)
    return float(logged.get_smoothed_values()["bleu"])


def validation_task() -> Any:
    task = make_task(eval_bleu=True)
    task.trained = make_model("ctc_nat", task)
    return task


def test_validation_bleu_is_that_of_the_whole_corpus() -> None:
    task = validation_task()
    model = task.trained
    hypotheses = decode([model], batch(SOURCES))
    draw = sentences(len(SOURCES), seed=6)
    targets = [
        [token for token in hypothesis[1:-2] if token != UNKNOWN] + other[:2]
        for hypothesis, other in zip(hypotheses, draw, strict=True)
    ]
    parts = [slice(0, 5), slice(5, 12)]
    found = bleu_of(task, model, [batch(SOURCES[part], targets[part]) for part in parts])
    texts = [
        [task.target_dictionary.string(torch.tensor(each), unk_string="UNK") for each in side]
        for side in (hypotheses, targets)
    ]
    assert found == pytest.approx(BLEU().corpus_score(texts[0], [texts[1]]).score, abs=0.006)
    assert 5 < found < 95


def test_validation_bleu_of_empty_hypotheses_is_zero() -> None:
    """CTC begins with blanks only: fairseq then logs no BLEU and dies choosing the checkpoint."""
    task = validation_task()
    model = task.trained
    model.decoder.embed_tokens.weight.data[0] *= 100
    features = model.decoder.embed_tokens.weight.data[0]
    model.decoder.layer_norm.bias.data = features
    assert all(tokens == [0, 2] for tokens in decode([model], batch(SOURCES)))
    assert bleu_of(task, model, [batch(SOURCES, sentences(len(SOURCES), seed=6))]) == 0.0
