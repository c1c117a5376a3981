"""Compressor, expander, target encoder, latent dictionary and predictor, parallel decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_vqem.modules.convolutions import (
    EXPANDER_KINDS,
    RESIDUAL_PLACEMENTS,
    Compressor,
    Expander,
    ResidualConvBlock,
)
from fairseq_vqem.modules.decoders import LatentDictionary
from fairseq_vqem.modules.target_encoder import pad_to_multiple

D = 6
CLOSE = dict(rtol=1e-4, atol=1e-5)


def ragged_mask(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(7)
    for parameter in module.parameters():
        parameter.data.normal_(0.2, 0.5)
    return module.eval()


# --- convolutions -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("placement", RESIDUAL_PLACEMENTS)
def test_compressor_ignores_padding(steps: int, placement: str) -> None:
    compressor = randomise(Compressor(D, steps, 2, placement, 0.0))
    multiple = 2**steps
    lengths = [1, multiple, multiple + 1, 3 * multiple]
    x = torch.randn(len(lengths), 3 * multiple, D)
    out, mask = compressor(x, ragged_mask(lengths, x.size(1)))
    assert out.shape == (len(lengths), 3, D)
    assert mask.sum(1).tolist() == [-(-n // multiple) for n in lengths]
    assert out[~mask].eq(0).all()
    for extra in (0, 1, 4):
        width = x.size(1) + extra * multiple
        wider = 1e3 * torch.randn(len(lengths), width, D)  # rubbish at padding
        real = ragged_mask(lengths, width)
        wider[real] = x[ragged_mask(lengths, x.size(1))]
        again, wide_mask = compressor(wider, real)
        torch.testing.assert_close(again[wide_mask], out[mask], **CLOSE)
    for i, n in enumerate(lengths):
        short = -(-n // multiple) * multiple
        single, _ = compressor(x[i : i + 1, :short], ragged_mask([n], short))
        torch.testing.assert_close(single[0], out[i][mask[i]], **CLOSE)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", EXPANDER_KINDS)
def test_expander_ignores_padding(steps: int, kind: str) -> None:
    expander = randomise(Expander(D, steps, 1, kind, 0.0))
    lengths = [1, 2, 5]
    x = torch.randn(3, 5, D)
    out, mask = expander(x, ragged_mask(lengths, 5))
    assert out.shape == (3, 5 * 2**steps, D)
    assert mask.sum(1).tolist() == [n * 2**steps for n in lengths]
    assert out[~mask].eq(0).all()
    for extra in (1, 7):
        wider = 1e3 * torch.randn(3, 5 + extra, D)
        real = ragged_mask(lengths, 5 + extra)
        wider[real] = x[ragged_mask(lengths, 5)]
        again, wide_mask = expander(wider, real)
        torch.testing.assert_close(again[wide_mask], out[mask], **CLOSE)
    for i, n in enumerate(lengths):
        single, _ = expander(x[i : i + 1, :n], ragged_mask([n], n))
        torch.testing.assert_close(single[0], out[i][mask[i]], **CLOSE)


def test_residual_blocks_are_where_the_placement_says() -> None:
    def lengths_seen(placement: str) -> list[int]:
        compressor, seen = Compressor(D, 3, 2, placement, 0.0), []
        for module in compressor.modules():
            if isinstance(module, ResidualConvBlock):
                module.register_forward_pre_hook(lambda _, args: seen.append(args[0].size(1)))
        compressor(torch.randn(1, 16, D), torch.ones(1, 16, dtype=torch.bool))
        return seen

    assert lengths_seen("between") == [16, 16, 8, 8, 4, 4]
    assert lengths_seen("before") == [16, 16]


def test_a_residual_block_adds_to_its_input() -> None:
    block = ResidualConvBlock(D, 0.0)
    for parameter in block.convolutions.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 5, D)
    assert torch.equal(block(x, torch.ones(2, 5, dtype=torch.bool)), x)


def test_projection_keeps_latents_apart_and_the_transposed_convolution_does_not() -> None:
    """Without residual blocks, latent 0 reaches its own two tokens, or one neighbour more."""
    reached = {}
    for kind in EXPANDER_KINDS:
        expander = randomise(Expander(D, 1, 0, kind, 0.0))
        x = torch.zeros(1, 4, D)
        mask = torch.ones(1, 4, dtype=torch.bool)
        changed = x.clone()
        changed[0, 1] = 1
        difference = (expander(changed, mask)[0] - expander(x, mask)[0]).abs().sum(-1)[0]
        reached[kind] = difference.gt(1e-6).nonzero().flatten().tolist()
    assert reached == {"projection": [2, 3], "transposed-conv": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("width", "length", "multiple", "wanted"), [(5, 0, 4, 8), (4, 4, 4, 4), (3, 9, 4, 12)]
)
def test_pad_to_multiple(width: int, length: int, multiple: int, wanted: int) -> None:
    tokens = torch.arange(2 * width).view(2, width)
    out = pad_to_multiple(tokens, length, multiple, -7)
    assert out.shape == (2, wanted)
    assert torch.equal(out[:, :width], tokens) and out[:, width:].eq(-7).all()


# --- latent dictionary and predictor --------------------------------------------------------------


def test_latent_dictionary_round_trip() -> None:
    dictionary = LatentDictionary(9)
    codes = torch.tensor([[0, 8, -1], [3, -1, -1]])
    tokens = dictionary.tokens(codes)
    assert len(dictionary) == 9 + dictionary.offset
    assert tokens.tolist()[1] == [3 + dictionary.offset, dictionary.pad(), dictionary.pad()]
    assert torch.equal(dictionary.codes(tokens), codes)
    special = torch.tensor([dictionary.bos(), dictionary.pad(), dictionary.eos(), dictionary.unk()])
    assert dictionary.codes(special).eq(-1).all()


@pytest.mark.parametrize("half", [False, True])
def test_special_symbols_are_impossible(tiny: Any, half: bool) -> None:
    model = tiny.model()
    predictor = model.latent_predictor.bfloat16() if half else model.latent_predictor
    dtype = next(predictor.parameters()).dtype
    logits = predictor.output_layer(torch.randn(2, 3, 16, dtype=dtype))
    shares = logits.float().softmax(-1)
    dictionary = model.latent_dictionary
    assert logits.isfinite().all()
    for symbol in (dictionary.bos(), dictionary.pad(), dictionary.unk()):
        assert shares[..., symbol].eq(0).all()
    assert shares[..., dictionary.eos()].gt(0).all()


# --- parallel decoder -----------------------------------------------------------------------------


def decode(model: Any, inputs: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    lengths = torch.full((source.size(0),), source.size(1))
    logits: Tensor = model.decoder(inputs, mask, model.encoder(source, src_lengths=lengths))
    return logits


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attend", [True, False])
def test_what_the_decoder_sees(tiny: Any, causal: bool, attend: bool) -> None:
    model = tiny.model(causal_decoder=causal, decoder_attend_source=attend)
    torch.manual_seed(0)
    inputs, source = torch.randn(1, 6, 16), torch.tensor([[5, 6, 7, 2]])
    mask = torch.ones(1, 6, dtype=torch.bool)
    before = decode(model, inputs, mask, source)
    later = inputs.clone()
    later[0, 4] += torch.randn(16)
    moved = (decode(model, later, mask, source) - before).abs().amax(-1)[0]
    assert moved[4:].gt(1e-4).all()
    assert moved[:4].lt(1e-6).all() if causal else moved[:4].gt(1e-5).all()
    other = decode(model, inputs, mask, torch.tensor([[9, 8, 7, 2]]))
    assert torch.equal(other, before) != attend


@pytest.mark.parametrize("causal", [True, False])
def test_the_decoder_ignores_padding(tiny: Any, causal: bool) -> None:
    model = tiny.model(causal_decoder=causal)
    torch.manual_seed(0)
    lengths = [3, 8, 5]
    inputs, source = torch.randn(3, 8, 16), torch.tensor([[5, 6, 2]]).expand(3, 3)
    mask = ragged_mask(lengths, 8)
    out = decode(model, inputs, mask, source)
    rubbish = torch.where(mask.unsqueeze(-1), inputs, 50.0)
    torch.testing.assert_close(decode(model, rubbish, mask, source)[mask], out[mask], **CLOSE)
    for i, n in enumerate(lengths):
        alone = decode(model, inputs[i : i + 1, :n], mask[i : i + 1, :n], source[:1])
        torch.testing.assert_close(alone[0], out[i, :n], **CLOSE)


def test_the_decoder_knows_positions(tiny: Any) -> None:
    model = tiny.model()
    inputs = torch.ones(1, 4, 16)
    out = decode(model, inputs, torch.ones(1, 4, dtype=torch.bool), torch.tensor([[5, 2]]))
    assert not torch.allclose(out[0, 0], out[0, 1], atol=1e-3)
