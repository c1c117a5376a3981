"""``--output ctc``: words read off frames of the source that see the codes as a plan."""

from __future__ import annotations

import itertools
from argparse import Namespace
from typing import Any

import pytest
import torch
from generation_helpers import generate, words
from model_helpers import assert_user_error, codes, forward, loss_function
from torch import Tensor

from fairseq_vqem.criterions.ctc import ctc_reconstruction
from fairseq_vqem.generation.latent_generator import LatentGenerator, read_score, read_words
from fairseq_vqem.generation.records import LatentSearchOptions
from fairseq_vqem.modules.frames import plan_places


def ctc_model(tiny: Any, **options: Any) -> Any:
    return tiny.model(output="ctc", **options)


def longer_sources(tiny: Any, count: int, seed: int = 0) -> Any:
    """Pairs whose sources give frames enough for their targets."""
    return [(source + [9] * len(target), target) for source, target in tiny.pairs(count, seed)]


def reconstruction(model: Any, batch: Any) -> Tensor:
    return ctc_reconstruction(forward(model, batch).ctc, model.blank, 0.0)[0]


def test_places_of_the_plan() -> None:
    frames = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).bool()
    places = plan_places(frames, torch.tensor([3, 6, 1]))
    assert places[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert places[1, :4].tolist() == [0, 1, 3, 4]
    assert places[2, :2].tolist() == [0, 0]
    for count, length in itertools.product((1, 2, 5, 9), (1, 2, 7)):
        each = plan_places(torch.ones(1, count, dtype=torch.bool), torch.tensor([length]))[0]
        assert each.tolist() == [frame * length // count for frame in range(count)]
    outside = plan_places(torch.tensor([[1, 0, 0, 0]]).bool(), torch.tensor([2]))
    assert int(outside.max()) < 2  # padding reads something that is there


def test_loss_is_that_of_all_paths(tiny: Any) -> None:
    """Against an enumeration of the paths of one short sentence."""
    model = ctc_model(tiny)
    batch = tiny.batch([([5], [7, 8])])  # two source tokens, four frames
    output = forward(model, batch)
    logs = output.ctc.logits[0].log_softmax(-1)
    assert logs.size(0) == 4 and output.ctc.words.tolist() == [[7, 8]]
    total = torch.tensor(float("-inf"))
    for path in itertools.product((model.blank, 7, 8), repeat=4):
        merged = [symbol for symbol, _ in itertools.groupby(path) if symbol != model.blank]
        if merged == [7, 8]:
            total = torch.logaddexp(total, sum(logs[t, symbol] for t, symbol in enumerate(path)))
    criterion = loss_function(tiny, label_smoothing=0.0)
    loss, nll, tokens, unfit = criterion.reconstruction_loss(model, output)
    assert (tokens, unfit) == (2, 0) and float(nll) == pytest.approx(-float(total), rel=1e-4)
    assert float(loss) == float(nll)


@pytest.mark.parametrize("search", [{}, dict(beam=3), dict(beam=2, candidates=3)])
def test_batching_padding_and_order_change_nothing(tiny: Any, search: dict[str, Any]) -> None:
    model = ctc_model(tiny, upsample_scale=3)
    pairs = longer_sources(tiny, 8, seed=5)
    pairs[4] = (pairs[4][0], [])  # an empty target
    alone = [tiny.batch([pair]) for pair in pairs]
    options = LatentSearchOptions(**search)
    with torch.no_grad():
        wanted_loss = sum(float(reconstruction(model, batch)) for batch in alone)
    wanted = [words(generate(tiny, model, batch, options))[0] for batch in alone]
    assert len({str(row) for row in wanted}) > 5
    order = [3, 0, 7, 1, 2, 6, 5, 4]
    for padding in ((0, 0), (3, 0), (2, 9)):
        batch = tiny.batch([pairs[i] for i in order], *padding)
        with torch.no_grad():
            assert float(reconstruction(model, batch)) == pytest.approx(wanted_loss, rel=1e-4)
        assert words(generate(tiny, model, batch, options)) == [wanted[i] for i in order]


def test_frames_read_the_codes(tiny: Any) -> None:
    """Another code changes the logits; a hidden one does not."""
    model = ctc_model(tiny, hidden_codes=1.0)
    batch = tiny.batch(longer_sources(tiny, 3))
    net = batch["net_input"]
    encoder_out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
    some = torch.tensor([[1, 2, 3]] * 3)
    others = torch.tensor([[1, 2, 4]] * 3)
    first, second = (model.decode_codes(each, encoder_out) for each in (some, others))
    assert (first - second).abs().max() > 1e-3
    latents = torch.randn(2, 3, 3, 16)
    mask = torch.ones(3, 3, dtype=torch.bool)
    shown = [model.reconstruct_frames(x, mask, encoder_out, batch["target"]) for x in latents]
    assert (shown[0].logits - shown[1].logits).abs().max() > 1e-3  # evaluation shows all
    model.train()
    shown = [model.reconstruct_frames(x, mask, encoder_out, batch["target"]) for x in latents]
    assert torch.equal(shown[0].logits, shown[1].logits)


def test_share_of_hidden_sentences(tiny: Any) -> None:
    torch.manual_seed(0)
    model = ctc_model(tiny, hidden_codes=0.3).train()
    hidden: list[Tensor] = []
    model.planned_frames.register_forward_pre_hook(lambda _, args: hidden.append(args[3]))
    forward(model, tiny.batch(tiny.pairs(400)))
    assert abs(float(hidden[0].float().mean()) - 0.3) < 0.06


def test_glancing_is_for_training(tiny: Any) -> None:
    model = ctc_model(tiny, gold_schedule="0.5").train()
    batch = tiny.batch(longer_sources(tiny, 20))
    shown = forward(model, batch).ctc
    assert 0 < int(shown.glanced.sum()) < int(shown.frames.sum())
    assert not forward(model.eval(), batch).ctc.glanced.any()


def test_what_does_not_fit_is_left_out(tiny: Any) -> None:
    """Five words need five frames; the sources give four and sixteen."""
    model, criterion = ctc_model(tiny), loss_function(tiny)
    fitting = tiny.batch([([5] * 7, [7, 8, 9, 10, 11])])
    both = tiny.batch([([5] * 7, [7, 8, 9, 10, 11]), ([5], [7, 8, 9, 10, 11])])
    wanted = criterion.reconstruction_loss(model, forward(model, fitting))
    found = criterion.reconstruction_loss(model, forward(model, both))
    assert found[2] == wanted[2] == 5 and (wanted[3], found[3]) == (0, 1)
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-4)
    neither = tiny.batch([([5], [7, 8, 9, 10, 11])])
    loss, size, log = criterion(model, neither)
    assert loss.isfinite() and size == 6 and log["labels"] == 0 and log["unfit"] == 1


def test_a_penalty_on_the_blank_makes_output_longer(tiny: Any) -> None:
    model = ctc_model(tiny)
    batch = tiny.batch(tiny.pairs(30))
    lengths = []
    for penalty in (-20.0, -3.0, 20.0):
        generator = LatentGenerator(
            tiny.dictionary(), [model], LatentSearchOptions(), eos_penalty=penalty
        )
        lengths.append(sum(len(h[0]["tokens"]) for h in generator.generate([model], batch)))
    assert lengths[0] < lengths[1] < lengths[2]


def test_without_frames_there_is_no_blank(tiny: Any) -> None:
    options = LatentSearchOptions()
    assert_user_error(
        "--iter-decode-eos-penalty 2.5",
        lambda: LatentGenerator(tiny.dictionary(), [tiny.model()], options, eos_penalty=2.5),
    )


def test_fairseqs_flag_is_the_penalty(tiny: Any) -> None:
    model, task = ctc_model(tiny), tiny.task()
    generator = task.build_generator([model], Namespace(iter_decode_eos_penalty=1.5))
    assert generator.eos_penalty == 1.5


def test_words_are_the_path_collapsed(tiny: Any) -> None:
    model = ctc_model(tiny)
    batch = tiny.batch([([5, 6, 7], [])])
    net = batch["net_input"]
    encoder_out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
    path = [7, 7, 0, 7, 8, 0, 0, 9]
    logs = torch.full((1, 8, 24), -9.0)
    logs[0, torch.arange(8), torch.tensor(path)] = -0.5
    logs[0, 5, [model.pad, model.eos]] = 0.0  # are never written
    tokens, scores, counts = read_words(model, logs, torch.tensor([[1, 2]]), encoder_out)
    assert tokens[0, : int(counts)].tolist() == [7, 7, 8, 9]
    assert scores[0, : int(counts)].tolist() == [-0.5] * 4
    # blanks and repeats were decided as well
    assert float(read_score(model, logs, torch.tensor([[1, 2]]), encoder_out, counts)) == -4.0


def test_posterior_is_read_off_frames(tiny: Any) -> None:
    model, task = ctc_model(tiny), tiny.task()
    batch = tiny.batch(longer_sources(tiny, 6))
    net = batch["net_input"]
    found = task.posterior(batch, model)
    for row, each in zip(found, codes(model, batch), strict=True):
        assert not set(row.tolist()) & {model.blank, model.pad, model.eos} and each
    encoder_out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
    wanted = model.decode_codes(
        model.posterior_codes(batch["target"], net["src_lengths"], encoder_out), encoder_out
    )
    wanted[..., [model.pad, model.eos]] = float("-inf")
    for row, path, source in zip(found, wanted.argmax(-1), net["src_lengths"], strict=True):
        runs = [symbol for symbol, _ in itertools.groupby(path[: 2 * int(source)].tolist())]
        assert row.tolist() == [symbol for symbol in runs if symbol != model.blank]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(output="ctc", causal_decoder=True), "--causal-decoder"),
        (dict(output="ctc", upsample_scale=0), "--upsample-scale is 0"),
        (dict(output="ctc", hidden_codes=1.5), "--hidden-codes is 1.5"),
        (dict(hidden_codes=0.5), "--output ctc"),
    ],
)
def test_bad_options(tiny: Any, options: dict[str, Any], match: str) -> None:
    assert_user_error(match, lambda: tiny.model(**options))
