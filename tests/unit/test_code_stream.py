"""Codes of several codebooks, written digit by digit: dictionary, loss, search, decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fairseq_vqem.bottlenecks import HardEM
from fairseq_vqem.criterions.bottleneck_loss import code_histogram
from fairseq_vqem.criterions.vqem_loss import latent_loss
from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.latent_generator import LatentGenerator
from fairseq_vqem.generation.latent_search import search_latents
from fairseq_vqem.generation.records import LatentSearchOptions
from fairseq_vqem.models.vqem_transformer import VQEMTransformer
from fairseq_vqem.modules.decoders import LatentDictionary

K, DIGITS, BASE = 9, 2, 3


class TwoDigits(HardEM):
    """Somebody else's bottleneck, whose ids have two digits."""

    digits = DIGITS


def make(tiny: Any, **options: Any) -> VQEMTransformer:
    options = {"code_stream": "factorised", **options}
    kind = f"{TwoDigits.__module__}:{TwoDigits.__name__}"
    return tiny.model(bottleneck=kind, codebook_size=K, **options)


@given(base=st.integers(2, 7), digits=st.integers(1, 4), data=st.data())
def test_codes_survive_the_dictionary(base: int, digits: int, data: Any) -> None:
    dictionary = LatentDictionary(base**digits, digits)
    assert len(dictionary) == dictionary.offset + base * digits
    codes = torch.tensor(data.draw(st.lists(st.integers(-1, base**digits - 1), max_size=6)))
    tokens = dictionary.tokens(codes.long())
    assert tokens.numel() == codes.numel() * digits
    assert torch.equal(dictionary.codes(tokens), codes.long())
    for position, token in enumerate(tokens.tolist()):
        allowed = dictionary.symbols_at(position)
        assert token == dictionary.pad() or allowed.start <= token < allowed.stop


def test_the_lowest_digit_comes_first() -> None:
    dictionary = LatentDictionary(K, DIGITS)
    assert (dictionary.tokens(torch.tensor([7])) - dictionary.offset).tolist() == [1, BASE + 2]


def test_a_half_written_code_is_none() -> None:
    dictionary = LatentDictionary(K, DIGITS)
    tokens = dictionary.tokens(torch.tensor([5, 4]))
    tokens[3] = dictionary.pad()
    assert dictionary.codes(tokens).tolist() == [5, -1]


def test_the_loss_is_the_chain_rule(tiny: Any) -> None:
    model, batch = make(tiny), tiny.batch(tiny.pairs(6))
    with torch.no_grad():
        out = model(**batch["net_input"], target=batch["target"])
    d, lengths = model.latent_dictionary, out.latent_mask.sum(1)
    found = latent_loss(
        out.latent_logits, out.latent_tokens, out.bottleneck.samples, out.latent_mask, model
    )
    expected, queue = 0.0, iter(out.bottleneck.codes.tolist())
    logs = out.latent_logits.log_softmax(-1)
    for sentence, length in enumerate(lengths.tolist()):
        for position in range(length):
            code = next(queue)
            low, high = d.offset + code % BASE, d.offset + BASE + code // BASE
            expected -= float(logs[sentence, 2 * position, low])
            expected -= float(logs[sentence, 2 * position + 1, high])
        expected -= float(logs[sentence, 2 * length, d.eos()])
        assert out.latent_tokens[sentence, 2 * length] == d.eos()
    assert float(found.loss) == pytest.approx(expected, rel=1e-5)
    assert found.symbols == 2 * int(lengths.sum()) + len(lengths)


def test_smoothing_spreads_over_the_symbols_of_each_place(tiny: Any) -> None:
    model, batch = make(tiny), tiny.batch(tiny.pairs(4))
    with torch.no_grad():
        out = model(**batch["net_input"], target=batch["target"])
    inputs = (out.latent_logits, out.latent_tokens, out.bottleneck.samples, out.latent_mask)
    plain = float(latent_loss(*inputs, model).loss)
    smoothed = float(latent_loss(*inputs, model, 0.4).loss)
    d, logs, uniform, ends = model.latent_dictionary, out.latent_logits.log_softmax(-1), 0.0, 0.0
    for sentence, length in enumerate(out.latent_mask.sum(1).tolist()):
        for position in range(2 * length):
            first = d.offset + position % 2 * BASE
            uniform -= float(logs[sentence, position, first : first + BASE].mean())
        ends -= float(logs[sentence, 2 * length, d.eos()])
    assert smoothed == pytest.approx(0.6 * (plain - ends) + 0.4 * uniform + ends, rel=1e-5)


def test_samples_are_averaged_digit_by_digit(tiny: Any) -> None:
    model, batch = make(tiny), tiny.batch([([5], [6, 7])])
    with torch.no_grad():
        out = model(**batch["net_input"], target=batch["target"])
    samples = torch.tensor([[0, 4, 8, 1]])

    def loss(of: Tensor) -> float:
        found = latent_loss(out.latent_logits, out.latent_tokens, of, out.latent_mask, model)
        return float(found.loss)

    assert loss(samples) == pytest.approx(sum(loss(samples[:, i : i + 1]) for i in range(4)) / 4)


def test_histogram_per_codebook() -> None:
    dictionary = LatentDictionary(K, DIGITS)
    counts = code_histogram(torch.tensor([0, 1, 4, 4]), dictionary)
    assert counts.tolist() == [[1, 3, 0], [2, 2, 0]]


def follow_greedily(model: VQEMTransformer, batch: dict[str, Any]) -> list[list[int]]:
    """Codes by the definition of greedy search, one sentence at a time, without a cache."""
    net, d, found = batch["net_input"], model.latent_dictionary, []
    for i in range(batch["nsentences"]):
        length = net["src_lengths"][i : i + 1]
        source = net["src_tokens"][i : i + 1, -int(length) :]
        encoder_out = model.encoder(source, src_lengths=length)
        limit = int(model.max_latents(length, 2.0, 16)) * DIGITS
        stream = [d.eos()]
        while len(stream) <= limit:
            logits = model.latent_predictor(torch.tensor([stream]), encoder_out=encoder_out)[0]
            place = (len(stream) - 1) % DIGITS
            allowed = list(range(d.offset + place * BASE, d.offset + (place + 1) * BASE))
            if place == 0 and len(stream) > 1:
                allowed.append(d.eos())
            best = max(allowed, key=lambda symbol: float(logits[0, -1, symbol]))
            if best == d.eos():
                break
            stream.append(best)
        found.append(d.codes(torch.tensor(stream[1:])).tolist())
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_search_writes_whole_codes(tiny: Any, seed: int) -> None:
    model, batch = make(tiny, seed=seed), tiny.batch(tiny.pairs(8, seed=seed))
    net = batch["net_input"]
    with torch.no_grad():
        encoder_out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
        options = LatentSearchOptions(max_ratio=2.0, max_offset=16)
        result = search_latents(
            [model], [encoder_out], net["src_tokens"], net["src_lengths"], options
        )
        wanted = follow_greedily(model, batch)
    codes = [[c for c in row[0] if c >= 0] for row in result.codes.tolist()]
    assert codes == wanted


@pytest.mark.parametrize("options", [dict(), dict(beam=3, candidates=2), dict(marginal_end=True)])
def test_batching_changes_nothing(tiny: Any, options: dict[str, Any]) -> None:
    model, pairs = make(tiny, seed=3), tiny.pairs(9, seed=5)
    generator = LatentGenerator(tiny.dictionary(), [model], LatentSearchOptions(**options))

    def tokens(group: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
        return [(h["tokens"].tolist(), h["codes"].tolist()) for h in group]

    together = [tokens(group) for group in generator.generate([model], tiny.batch(pairs))]
    alone = [tokens(generator.generate([model], tiny.batch([pair]))[0]) for pair in pairs]
    assert together == alone
    assert all(0 <= code < K for group in together for _, codes in group for code in codes)


def test_stopping_at_the_pad_latent(tiny: Any) -> None:
    model = make(tiny, latent_length="source", seed=2)
    batch = tiny.batch(tiny.pairs(12, seed=4))
    net = batch["net_input"]

    def codes(stop: int | None) -> list[list[int]]:
        with torch.no_grad():
            encoder_out = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
            options = LatentSearchOptions(stop_code=stop)
            found = search_latents(
                [model], [encoder_out], net["src_tokens"], net["src_lengths"], options
            )
        return [[c for c in row[0] if c >= 0] for row in found.codes.tolist()]

    whole = codes(None)
    stop = whole[0][-1]
    assert codes(stop) == [row[: row.index(stop)] if stop in row else row for row in whole]


def test_the_predictor_s_choice_is_a_joint_code(tiny: Any) -> None:
    d = LatentDictionary(K, DIGITS)
    logits = torch.randn(2 * 50, len(d))
    for row, code in zip(logits.view(50, 2, -1), d.most_likely(logits).tolist(), strict=True):
        low = int(row[0, d.offset : d.offset + BASE].argmax())
        high = int(row[1, d.offset + BASE : d.offset + 2 * BASE].argmax())
        assert code == low + BASE * high


def test_large_products_are_factorised(tiny: Any) -> None:
    model = tiny.model(bottleneck="hard-em", codebook_size=2**18, num_codebooks=2, embed_dim=16)
    assert len(model.latent_dictionary) == model.latent_dictionary.offset + 2 * 2**9
    with pytest.raises(UserError, match="--codebook-size 262144 is too large for one codebook"):
        tiny.model(codebook_size=2**18)
    with pytest.raises(UserError, match="and no --code-stream joint"):
        tiny.model(codebook_size=2**18, num_codebooks=2, code_stream="joint")
