"""Losses and lengths of `ctc_nat` and `fertility_nat`, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peer_helpers import BOS, EOS, SOURCES, TARGETS, batch, decode, make_model, make_task, sentences
from torch import Tensor

from fairseq_vqem.modules.ctc import frames_needed, frames_to_show, upsample
from fairseq_vqem.peers.losses import CTCNATLoss, FertilityNATLoss

# ---------------------------------------------------------------------- ctc_nat


def test_each_source_token_gives_as_many_frames_as_asked() -> None:
    model = make_model("ctc_nat", upsample_scale=3)
    sample = batch([[4, 5], [6]], padding=2)
    encoder_out = model.encoder(sample["net_input"]["src_tokens"])
    inputs, frames = upsample(encoder_out, 3)
    assert frames.sum(1).tolist() == [12, 9]
    embed = model.encoder.embed_scale * model.encoder.embed_tokens.weight
    for row, source in enumerate([[BOS, 4, 5, EOS], [BOS, 6, EOS]]):
        for frame in range(3 * len(source)):
            assert frames[row, frame]
            assert torch.allclose(inputs[row, frame], embed[source[frame // 3]])


@pytest.mark.parametrize("ratio", [0.3, 1.0])
def test_glancing_reveals_a_share_of_the_wrong_frames(ratio: float) -> None:
    model = make_model("ctc_nat", glat_schedule=f"{ratio}:0@10").train()
    sources = SOURCES[:8]
    targets = [*sentences(7, seed=2, longest=6), [5] * 30]  # the last does not fit
    sample = batch(sources, targets)
    seen: list[tuple[Tensor, Tensor]] = []
    forward = model.decoder.forward
    model.decoder.forward = lambda x, mask, out: (
        seen.append((x, forward(x, mask, out))) or seen[-1][1]
    )
    output = model(**sample["net_input"], target=sample["target"])
    (plain, first), (shown, _) = seen
    changed = (plain != shown).any(-1)
    assert not (changed & ~output.glanced).any()
    torch.manual_seed(0)
    aligned, _ = frames_to_show(
        first, output.frames, output.words, output.counts, model.blank, ratio
    )
    embed = model.decoder.embed_scale * model.decoder.embed_tokens.weight
    assert torch.allclose(shown[output.glanced], embed[aligned[output.glanced]])
    for row in range(len(sources)):
        real = output.frames[row]
        wrong = int((first[row].argmax(-1) != aligned[row])[real].sum())
        expected = int(ratio * wrong) if row < 7 else 0
        assert int(output.glanced[row].sum()) == expected
    assert output.glanced.any()
    model.set_num_updates(10)
    assert not model(**sample["net_input"], target=sample["target"]).glanced.any()
    model.set_num_updates(0)
    assert not model.eval()(**sample["net_input"], target=sample["target"]).glanced.any()


def test_ctc_loss_counts_what_does_not_fit() -> None:
    task = make_task()
    model = make_model("ctc_nat", task)
    targets = [[5, 6], [7] * 4, [8], []]  # 4 frames of an empty source hold 2 equal words, not 4
    sample = batch([[4], [], [4, 5], [6]], targets)
    loss, size, log = CTCNATLoss(task, label_smoothing=0.0)(model, sample)
    kept = [0, 2, 3]
    rest = batch([[[4], [], [4, 5], [6]][i] for i in kept], [targets[i] for i in kept])
    alone, alone_size, alone_log = CTCNATLoss(task, label_smoothing=0.0)(model, rest)
    assert (size, alone_size) == (4, 4)  # the empty target has a likelihood too, and counts as one
    assert int(log["unfit"]) == 1 and int(alone_log["unfit"]) == 0
    assert float(loss) == pytest.approx(float(alone), rel=1e-5)
    assert float(loss) > 0
    words, counts = torch.tensor([[7] * 4]), torch.tensor([4])
    assert frames_needed(words, counts).item() == 7


def test_ctc_end_penalty_is_taken_from_the_blank() -> None:
    model = make_model("ctc_nat")
    wanted = decode([model], batch(SOURCES))
    forward, favour = model.decoder.forward, torch.zeros(24)
    favour[model.blank] = 3.0
    model.decoder.forward = lambda *args: forward(*args) + favour
    favoured = decode([model], batch(SOURCES))
    assert sum(map(len, favoured)) < 0.7 * sum(map(len, wanted))
    assert decode([model], batch(SOURCES), iter_decode_eos_penalty=3.0) == wanted


def test_ctc_label_smoothing_adds_the_mean_uniform_cross_entropy() -> None:
    """For each word, of its sentence: so that a batch is the sum of its sentences."""
    task = make_task()
    model = make_model("ctc_nat", task)
    sample = batch(SOURCES[:3], TARGETS)
    nll, *_ = CTCNATLoss(task, label_smoothing=0.0)(model, sample)
    smoothed, _, log = CTCNATLoss(task, label_smoothing=0.2)(model, sample)
    output = model(**sample["net_input"], target=sample["target"])
    uniform = 0.0
    for row, mask, count in zip(output.logits, output.frames, output.counts, strict=True):
        uniform -= float(count * torch.log_softmax(row[mask], -1).mean())
    assert float(smoothed) == pytest.approx(0.8 * float(nll) + 0.2 * uniform, rel=1e-5)
    parts = [batch([source], [words]) for source, words in zip(SOURCES[:3], TARGETS, strict=True)]
    losses = [float(CTCNATLoss(task, label_smoothing=0.2)(model, part)[0]) for part in parts]
    assert sum(losses) == pytest.approx(float(smoothed), rel=1e-5)
    assert float(log["nll"]) == pytest.approx(float(nll))


# ---------------------------------------------------------------------- fertility_nat


def with_links(sample: dict[str, Any], links: list[list[int]]) -> dict[str, Any]:
    """Links as fairseq collates them, from the source place of each target word."""
    source, width = sample["net_input"]["src_tokens"], sample["target"].size(1)
    lengths = sample["net_input"]["src_lengths"]
    found = [
        [source.size(1) - int(lengths[row]) + place, row * width + target]
        for row, places in enumerate(links)
        for target, place in enumerate(places)
    ]
    return {**sample, "alignments": torch.tensor(found)}


def test_fertility_loss_by_hand() -> None:
    task = make_task()
    model = make_model("fertility_nat", task)
    sources, targets = [[4, 5, 6], [7], []], [[8, 9], [10, 11, 12, 13, 14], [15]]
    sample = with_links(batch(sources, targets, padding=1), [[2, 0], [0] * 5, []])
    criterion = FertilityNATLoss(task, label_smoothing=0.0, fertility_weight=0.5)
    loss, size, _ = criterion(model, sample)
    copies, gold = [[4, 6, EOS], [7] * 5 + [EOS]], [[1, 0, 1], [3]]  # 5 counts as the most, 3
    words, fertility = 0.0, 0.0
    for source, target, copied, counts in zip(sources, targets, copies, gold, strict=False):
        out = model.encoder(torch.tensor([[BOS, *source, EOS]]))
        head = torch.log_softmax(model.fertility_head(out["encoder_out"][0][1:-1, 0]), -1)
        fertility -= sum(float(head[i, count]) for i, count in enumerate(counts))
        inputs = model.encoder.embed_scale * model.encoder.embed_tokens(torch.tensor([copied]))
        logits = model.decoder(inputs, torch.ones(1, len(copied)).bool(), out)
        log_probabilities = torch.log_softmax(logits[0], -1)
        words -= sum(float(log_probabilities[i, t]) for i, t in enumerate([*target, EOS]))
    assert size == 3 + 6
    assert float(loss) == pytest.approx(words + 0.5 * fertility, rel=1e-5)


def test_what_the_teacher_could_not_align_is_left_out() -> None:
    task = make_task()
    model = make_model("fertility_nat", task)
    criterion = FertilityNATLoss(task, label_smoothing=0.1, fertility_weight=0.5)
    sources, targets, links = [[4, 5, 6], [7, 8], [9]], [[8, 9], [10], [11]], [[2, 0], [], [0]]
    loss, size, _ = criterion(model, with_links(batch(sources, targets), links))
    kept = [[each[0], each[2]] for each in (sources, targets, links)]
    alone, alone_size, _ = criterion(model, with_links(batch(*kept[:2]), kept[2]))
    assert size == alone_size == 3 + 2
    assert float(loss) == pytest.approx(float(alone), rel=1e-5)


def test_output_is_as_long_as_the_fertilities_say() -> None:
    model = make_model("fertility_nat")
    hypotheses = decode([model], batch(SOURCES))
    for source, tokens in zip(SOURCES, hypotheses, strict=True):
        out = model.encoder(torch.tensor([[BOS, *source, EOS]]))
        fertilities = model.fertility_logits(out)[0, 1:-1].argmax(-1)
        assert len(tokens) == 1 + int(fertilities.sum()) + 1  # BOS, words, EOS
    assert hypotheses[-1] == [BOS, EOS]
