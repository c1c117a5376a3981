"""The whole model on batches: nothing depends on padding, order or neighbours; latent positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import LENGTHS, codes, forward, loss_function

CLOSE = dict(rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("latent_length", LENGTHS)
@pytest.mark.parametrize("kind", ["soft-em", "hard-em"])
def test_batching_padding_and_order_change_nothing(
    tiny: Any, kind: str, latent_length: str
) -> None:
    model = tiny.model(
        bottleneck=kind, latent_length=latent_length, target_encoder_attend_source=True
    )
    criterion = loss_function(tiny)
    pairs = tiny.pairs(9, seed=5)
    pairs[4] = (pairs[4][0], [])  # an empty target
    alone = [tiny.batch([pair]) for pair in pairs]
    wanted_codes = [codes(model, batch)[0] for batch in alone]
    assert len({tuple(row) for row in wanted_codes}) > 3
    with torch.no_grad():
        wanted_loss = sum(float(criterion(model, batch)[0]) for batch in alone)
        wanted = [forward(model, batch) for batch in alone]
    order = [3, 8, 0, 7, 1, 2, 6, 5, 4]
    for padding in ((0, 0), (3, 0), (0, 5), (2, 9)):
        batch = tiny.batch([pairs[i] for i in order], *padding)
        assert codes(model, batch) == [wanted_codes[i] for i in order]
        with torch.no_grad():
            assert float(criterion(model, batch)[0]) == pytest.approx(wanted_loss, rel=1e-4)
            out = forward(model, batch)
        for row, i in enumerate(order):
            real = wanted[i].labels[0].ne(model.pad).nonzero().flatten()
            torch.testing.assert_close(out.logits[row, real], wanted[i].logits[0, real], **CLOSE)
            count = len(wanted_codes[i])
            torch.testing.assert_close(
                out.latent_logits[row, :count], wanted[i].latent_logits[0, :count], **CLOSE
            )


@pytest.mark.parametrize("latent_length", LENGTHS)
def test_number_of_latents(tiny: Any, latent_length: str) -> None:
    model = tiny.model(latent_length=latent_length)
    pairs = [([5] * n, [6] * k) for n in (1, 4, 9) for k in (0, 3, 4, 11)]
    for (source, target), row in zip(pairs, codes(model, tiny.batch(pairs)), strict=True):
        positions = len(target) + 1
        if latent_length == "source":
            positions = max(positions, 2 * (len(source) + 1))
        assert len(row) == -(-positions // model.multiple)


@pytest.mark.parametrize("latent_length", LENGTHS)
def test_padding_never_touches_the_statistics(tiny: Any, latent_length: str) -> None:
    """Exactly the real latents are counted, and more padding gathers the same sums."""
    pairs = tiny.pairs(6, seed=1)
    gathered = []
    for padding in ((0, 0), (4, 8)):
        model = tiny.model(bottleneck="hard-em", latent_length=latent_length).train()
        output = forward(model, tiny.batch(pairs, *padding))
        book = model.bottleneck.codebook
        assert book.pending_counts.sum() == sum(map(len, codes(model.eval(), tiny.batch(pairs))))
        assert output.bottleneck.codes.numel() == int(output.latent_mask.sum())
        gathered.append((book.pending_counts.clone(), book.pending_sums.clone()))
    assert torch.equal(gathered[0][0], gathered[1][0])
    torch.testing.assert_close(gathered[0][1], gathered[1][1], **CLOSE)


def test_latent_tokens_end_where_the_sentence_ends(tiny: Any) -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    numbers = torch.tensor([4, 5, 6, 7, 8])
    for latent_length in LENGTHS:
        model = tiny.model(latent_length=latent_length)
        d = model.latent_dictionary
        end = d.eos() if latent_length == "end" else d.pad()
        o, pad = d.offset, d.pad()
        assert model.latent_tokens(numbers, mask).tolist() == [
            [4 + o, 5 + o, end, pad],
            [6 + o, 7 + o, 8 + o, end],
        ]


def test_the_predictor_sees_only_earlier_codes(tiny: Any) -> None:
    model = tiny.model()
    net = tiny.batch(tiny.pairs(1))["net_input"]
    out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
    d = model.latent_dictionary
    tokens = torch.tensor([[0, 1, 2, 3]]) + d.offset
    tokens = torch.cat([tokens, torch.tensor([[d.eos()]])], 1)
    changed = tokens.clone()
    changed[0, 2] = 9 + d.offset
    moved = model.predict_latents(tokens, out) - model.predict_latents(changed, out)
    reached = moved.abs().amax(-1)[0] > 1e-5
    assert reached.tolist() == [False, False, False, True, True]


def test_decoding_the_posterior_codes_is_the_evaluation_forward(tiny: Any) -> None:
    model = tiny.model(target_encoder_attend_source=True)
    batch = tiny.batch(tiny.pairs(5))
    net = batch["net_input"]
    out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
    found = model.posterior_codes(batch["target"], net["src_lengths"], out)
    expected = forward(model, batch)
    real = expected.labels.ne(model.pad)
    logits = model.decode_codes(found, out)
    torch.testing.assert_close(logits[real], expected.logits[real], **CLOSE)
