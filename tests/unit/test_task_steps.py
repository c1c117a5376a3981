"""The task's training and validation steps: dummy batches, noise, BLEU."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.data import encoders
from model_helpers import assert_user_error
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_vqem.criterions.vqem_loss import VQEMLoss
from fairseq_vqem.errors import UserError
from fairseq_vqem.models import VQEMTransformer
from fairseq_vqem.tasks.data_folders import check_data_folders


class Optimiser:
    """As much of fairseq's optimiser as a task's training step uses."""

    def __init__(self, model: VQEMTransformer) -> None:
        self.inner = torch.optim.SGD(model.parameters(), lr=0.1)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.inner.step()


def train(model: VQEMTransformer, task: Any, batches: list[tuple[dict[str, Any], bool]]) -> None:
    optimiser, criterion = Optimiser(model), VQEMLoss(task, 0.0, "0.25", "1")
    for batch, dummy in batches:
        task.train_step(batch, model, criterion, optimiser, 0, ignore_grad=dummy)
    task.optimizer_step(optimiser, model, 0)


@pytest.mark.parametrize("kind", ["soft-em", "gradient-vq"])
def test_a_second_warm_up_does_not_overwrite_a_codebook(tiny: Any, kind: str) -> None:
    """Of a model that goes on from a trained one, whose updates fairseq counts anew."""
    task, batch = tiny.task(), tiny.batch(tiny.pairs(4))
    model = tiny.model(task, bottleneck=kind, quantise_schedule="0:1@2-4")
    for parameter in model.bottleneck.parameters():  # as they begin
        parameter.data.zero_()
    train(model, task, [(batch, False)])
    train(model, task, [(batch, False)])  # as --amp begins update 0 again
    with pytest.raises(UserError, match="give it --quantise-schedule 1"):
        train(model, tiny.task(), [(batch, False)])
    further = tiny.model(task, bottleneck=kind, quantise_schedule="1")
    further.load_state_dict(model.state_dict())
    train(further, task, [(batch, False)])


@pytest.mark.parametrize("schedule", ["1", "0"])
def test_a_dummy_batch_leaves_no_trace(tiny: Any, schedule: str) -> None:
    """Not even if it is accumulated after a real one, as at the end of an epoch."""
    task = tiny.task()
    real, dummy = tiny.batch(tiny.pairs(4)), tiny.batch(tiny.pairs(2, seed=9))
    results = []
    for batches in (
        [(real, False)],
        [(real, False), (dummy, True)],
        [(dummy, True), (real, False)],
    ):
        model = tiny.model(task, bottleneck="hard-em", quantise_schedule=schedule)
        train(model, task, batches)
        results.append(model.state_dict())
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


def test_noise_reaches_only_the_target_encoder(tiny: Any) -> None:
    task = tiny.task(word_dropout=1.0, word_shuffle=1.0)
    model, batch = tiny.model(task), tiny.batch(tiny.pairs(3))
    seen: list[Tensor] = []
    model.target_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    target = batch["target"].clone()
    train(model, task, [(batch, False)])
    words = target.ne(1) & target.ne(2)
    assert seen[0][:, : target.size(1)][words].eq(3).all()
    assert torch.equal(batch["target"], target)
    for name in ("word_dropout", "word_shuffle"):
        option = name.replace("_", "-")
        assert_user_error(f"--{option} is 1.5", lambda name=name: tiny.task(**{name: 1.5}))


class Wrapper(torch.nn.Module):
    """As fairseq's wrapper for several workers, which passes attributes on."""

    def __init__(self, model: VQEMTransformer) -> None:
        super().__init__()
        self.module = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_validation_bleu_with_one_and_several_workers(tiny: Any) -> None:
    task = tiny.task(eval_latent_bleu=True, eval_bleu_args="{}")
    model, batch = tiny.model(task), tiny.batch(tiny.pairs(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logs = []
    for each in (model, Wrapper(model)):
        loss, _, log = task.valid_step(batch, each, VQEMLoss(task, 0.0, "0.25", "1"))
        assert loss.isfinite()
        logs.append({key: value for key, value in log.items() if key.startswith("_")})
    assert logs[0] == logs[1]
    references = batch["ntokens"] - 3  # without ends; a word is a token here
    assert logs[0]["_bleu_ref_len"] == logs[0]["_posterior_bleu_ref_len"] == references
    assert logs[0]["_posterior_bleu_totals_0"] == logs[0]["_posterior_bleu_sys_len"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_repeats_are_removed_from_reconstructions_too(tiny: Any) -> None:
    batch = tiny.batch(tiny.pairs(20))
    plain, removing = (tiny.task(remove_repeats=each) for each in (False, True))
    model = tiny.model(plain)
    found = [
        [words.tolist() for words in task.posterior(batch, model)] for task in (plain, removing)
    ]
    collapsed = [[word for word, _ in groupby(words)] for words in found[0]]
    assert found[1] == collapsed != found[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(latent_length_reward=1.0), "--latent-length-reward chooses"),
        (dict(stop_at_pad_latent=True), "--stop-at-pad-latent needs"),
        (dict(latent_temperature=-1.0), "--latent-temperature is -1.0"),
        (dict(rescore="teacher", latent_candidates=4), "needs the teacher's checkpoint"),
    ],
)
def test_unfit_decoding_is_refused_before_training(
    tiny: Any, options: dict[str, Any], message: str
) -> None:
    config = OmegaConf.structured(tiny.model().cfg)
    config._name = "vqem_transformer"
    task = tiny.task(eval_latent_bleu=True, eval_bleu_args="{}")
    assert task.build_model(config).training
    task = tiny.task(eval_latent_bleu=True, eval_bleu_args="{}", **options)
    assert_user_error(message, lambda: task.build_model(config))


def test_bleu_of_validation_honours_fairseq_s_options(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tiny.dictionary(0)
    words.add_symbol("one,two")
    row = torch.tensor([4, 4, 2])
    sample = {"target": row[None]}
    for tokenised, length in ((False, 6), (True, 2)):
        log = tiny.task(words, eval_tokenized_bleu=tokenised).bleu_statistics("b", [row], sample)
        assert log["_b_sys_len"] == log["_b_ref_len"] == length
    asked: list[Any] = []

    def build(options: Any) -> Any:
        asked.append(options)
        return SimpleNamespace(decode=str.upper)

    monkeypatch.setattr(encoders, "build_tokenizer", build)
    task = tiny.task(words, eval_bleu_detok="moses", eval_bleu_detok_args='{"target_lang": "de"}')
    assert task.detokenise(row) == "ONE,TWO ONE,TWO"
    assert (asked[0].tokenizer, asked[0].target_lang, len(asked)) == ("moses", "de", 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_bleu_detok_args": "{target_lang: de}"}, "--eval-bleu-detok-args .* is no JSON"),
        ({"eval_bleu_detok": "absent"}, "--eval-bleu-detok absent needs a package: no absent"),
        ({"eval_bleu_detok": "13a"}, "no --eval-bleu-detok 13a: choose space or moses"),
        ({"eval_bleu_detok_args": "[1]"}, r"--eval-bleu-detok-args \[1\] has no names"),
    ],
)
def test_a_detokeniser_that_is_not_there_is_refused_before_training(
    tiny: Any, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(options: Any) -> None:
        if options.tokenizer == "absent":
            raise ImportError("no absent")
        raise KeyError(options.tokenizer)  # as fairseq does for a name that it does not know

    monkeypatch.setattr(encoders, "build_tokenizer", build)
    config = OmegaConf.structured(tiny.model().cfg)
    config._name = "vqem_transformer"
    task = tiny.task(eval_latent_bleu=True, eval_bleu_args="{}", **options)
    with pytest.raises(UserError, match=message):
        task.build_model(config)


def test_subwords_are_joined_for_bleu(tiny: Any) -> None:
    plain = tiny.task()
    assert plain.detokenise(torch.tensor([5, 6, 2])) == "w1 w2"
    pieces = tiny.dictionary(0)
    for symbol in ("\u2581ge", "hen", "\u2581wir"):
        pieces.add_symbol(symbol)
    assert tiny.task(pieces).detokenise(torch.tensor([4, 5, 6, 2])) == "gehen wir"
    halves = tiny.dictionary(0)
    for symbol in ("ge@@", "hen", "wir"):
        halves.add_symbol(symbol)
    task = tiny.task(halves, eval_bleu_remove_bpe="@@ ")
    assert task.detokenise(torch.tensor([4, 5, 6, 2])) == "gehen wir"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{latent_beam: 5}", "is no JSON of options"),
        ("[1]", "names 1, which is no option"),
        ("3", "is no JSON of options"),
        ('{"latent_beam": 5}', "names latent_beam, which is no option of fairseq's generation"),
    ],
)
def test_options_of_validation_that_nobody_reads_are_refused(
    tiny: Any, given: str, message: str
) -> None:
    task = tiny.task(eval_latent_bleu=True, eval_bleu_args=given)
    with pytest.raises(UserError, match=re.escape(message)):
        task.validation_arguments()


@pytest.mark.parametrize("data", [None, "", "nowhere", "{here}:", "{here}:nowhere"])
def test_missing_data_folders_are_named(tmp_path: Path, data: str | None) -> None:
    """An empty name would be the working directory."""
    check_data_folders(f"{tmp_path}:{tmp_path}")
    with pytest.raises(UserError, match=r"the data folder .*does not exist"):
        check_data_folders(data and data.format(here=tmp_path))
