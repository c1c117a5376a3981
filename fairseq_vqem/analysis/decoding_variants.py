"""One student decoded in four ways, so that each of its parts can be blamed for its own errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fairseq_vqem.analysis.posterior import posterior_batches
from fairseq_vqem.analysis.translation_errors import share_doubled
from fairseq_vqem.corpora.subwords import load_subwords
from fairseq_vqem.generation.latent_generator import LatentGenerator
from fairseq_vqem.generation.latent_search import search_latents
from fairseq_vqem.generation.records import LatentHypothesis, LatentSearchOptions
from fairseq_vqem.models.vqem_transformer import VQEMTransformer
from fairseq_vqem.modules.decoders import EncoderOut
from fairseq_vqem.modules.incremental import CachedPredictor

POSTERIOR = "posterior codes"
ONE_STEP = "each code predicted after posterior codes"
FORCED_LENGTH = "predicted codes, as many as the posterior's"
PREDICTED = "predicted codes"
REFERENCE = "reference"
VARIANTS = (POSTERIOR, ONE_STEP, FORCED_LENGTH, PREDICTED)
BEST = 5
PLACES_SHOWN = 10


@dataclass(frozen=True)
class PlaceAccuracy:
    """Accuracy of the codes in one place of their sentences, from 1; the last place: and beyond."""

    place: int
    codes: int
    one_step: float
    free_running: float


@dataclass(frozen=True)
class LatentQuality:
    """How well the predictor knows the posterior's codes. Shares of 1.

    Codes after the end of a target (--latent-length source) count for the last two only.

    Attributes:
        codes: how many codes the posterior wrote.
        code_perplexity: of the posterior's codes, regardless of the source.
        perplexity: of the predictor per code, given the source and the posterior's prefix.
        accuracy: likeliest code is the posterior's, given the posterior's prefix.
        accuracy_best: it is among the ``BEST`` likeliest; None if a code takes several symbols.
        free_running: the same place holds the same code when the predictor continues itself.
        end_accuracy: the end is the likeliest symbol after all of the posterior's codes, which
            often give it away; None where the model writes no end.
        same_number: sentences for which it writes as many codes as the posterior.
        number_ratio: codes that it writes over codes of the posterior.
    """

    codes: int
    code_perplexity: float
    perplexity: float
    accuracy: float
    accuracy_best: float | None
    free_running: float
    end_accuracy: float | None
    same_number: float
    number_ratio: float
    places: list[PlaceAccuracy]


@dataclass(frozen=True)
class Decoded:
    """A split decoded in each of ``VARIANTS``.

    Attributes:
        texts: by variant, one translation per sentence in the order of the data.
        doubled_pieces: by variant, and for ``REFERENCE``, share of sentences in which a piece
            follows itself, before repeats are removed.
        removes_repeats: whether they were, as the checkpoint's own --remove-repeats says.
    """

    texts: dict[str, list[str]]
    doubled_pieces: dict[str, float]
    removes_repeats: bool
    latents: LatentQuality


@torch.no_grad()
def decode_variants(
    checkpoint: str,
    data: Path,
    split: str,
    device: str = "cpu",
    targets: Sequence[Tensor] | None = None,
) -> Decoded:
    """Decode every source of ``split`` in each of ``VARIANTS``, greedily.

    Args:
        targets: the sentences whose posterior codes are meant, token ids ``[length]`` that end in
            EOS, in the order of the data; the references where it is None.

    Raises:
        UserError: the checkpoint is not a ``vqem_transformer``.
    """
    subwords = load_subwords(data)
    tokens: dict[str, dict[int, list[int]]] = {name: {} for name in (*VARIANTS, REFERENCE)}
    tally, task = _Tally(), None
    for task, model, sample in posterior_batches(checkpoint, data, split, device):
        references = [row[row.ne(model.pad)][:-1].tolist() for row in sample["target"]]
        tokens[REFERENCE].update(zip(sample["id"].tolist(), references, strict=True))
        if targets is not None:
            sample["target"] = _of_batch(targets, sample["id"], model.pad)
        encoder_out = _encode(model, sample)
        search = search_options(task, model)
        codes = variant_codes(model, sample, encoder_out, search, tally)
        penalty = task.validation_arguments().iter_decode_eos_penalty
        generator = LatentGenerator(task.target_dictionary, [model], search, eos_penalty=penalty)
        # of an empty source nothing is translated
        occupied = sample["net_input"]["src_lengths"].gt(1).tolist()
        for variant, each in codes.items():
            written = decode_words(generator, model, each, encoder_out)
            rows = zip(written, occupied, strict=True)
            written = [words if is_occupied else [] for words, is_occupied in rows]
            tokens[variant].update(zip(sample["id"].tolist(), written, strict=True))
    assert task is not None
    removes = bool(task.cfg.remove_repeats)

    def text(sentence: list[int]) -> str:
        kept = [token for token, _ in groupby(sentence)] if removes else sentence
        return subwords.decode(task.target_dictionary.string(torch.tensor(kept, dtype=torch.long)))

    ordered = {name: [found[n] for n in sorted(found)] for name, found in tokens.items()}
    return Decoded(
        {variant: [text(sentence) for sentence in ordered[variant]] for variant in VARIANTS},
        {name: share_doubled(sentences) for name, sentences in ordered.items()},
        removes,
        tally.summary(),
    )


def search_options(task: Any, model: VQEMTransformer) -> LatentSearchOptions:
    """The checkpoint's own limits and end rule, greedy whatever its beam."""
    return LatentSearchOptions(
        max_ratio=task.cfg.latent_max_ratio,
        max_offset=task.cfg.latent_max_offset,
        marginal_end=str(task.cfg.latent_end) == "marginal",
        stop_code=model.pad_code() if task.cfg.stop_at_pad_latent else None,
    )


def _of_batch(targets: Sequence[Tensor], ids: Tensor, pad: int) -> Tensor:
    """The targets of sentences ``ids`` ``[B]``, padded on the right, ``[B, T]``."""
    rows = [targets[number] for number in ids.tolist()]
    return pad_sequence(rows, batch_first=True, padding_value=pad).to(ids.device)


def _encode(model: VQEMTransformer, sample: dict[str, Any]) -> EncoderOut:
    net = sample["net_input"]
    found: EncoderOut = model.encoder(net["src_tokens"], src_lengths=net["src_lengths"])
    return found


def variant_codes(
    model: VQEMTransformer,
    sample: dict[str, Any],
    encoder_out: EncoderOut,
    search: LatentSearchOptions,
    tally: _Tally,
) -> dict[str, Tensor]:
    """Codes ``[B, L]`` of each of ``VARIANTS``, -1 at padding; L may differ."""
    net = sample["net_input"]
    src_tokens, src_lengths = net["src_tokens"], net["src_lengths"]
    posterior = model.posterior_codes(sample["target"], src_lengths, encoder_out)
    one_step, logits, ends = one_step_codes(model, posterior, encoder_out)
    forced = forced_length_codes(model, posterior.ge(0).sum(1), encoder_out)
    found = search_latents([model], [encoder_out], src_tokens, src_lengths, search)
    predicted = found.codes[:, 0]
    codes = dict(zip(VARIANTS, (posterior, one_step, forced, predicted), strict=True))
    lengths, stops = sample["target"].ne(model.pad).sum(1), search.stop_code is not None
    tally.add(model, codes, logits, lengths, stops=stops)
    if model.cfg.latent_length == "end":
        tally.ends.append(ends.cpu())
    return codes


def one_step_codes(
    model: VQEMTransformer, posterior: Tensor, encoder_out: EncoderOut
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest code after each prefix of the posterior's codes ``[B, L]``.

    Returns:
        Codes ``[B, L]``, the predictor's logits ``[N·S, V_L]`` at the symbols of the N codes, and
        whether the end is the likeliest symbol after the last code, ``[B]``.
    """
    mask, dictionary = posterior.ge(0), model.latent_dictionary
    tokens = model.latent_tokens(posterior[mask], mask)
    every = model.predict_latents(tokens, encoder_out)
    logits = every[:, :-1][model.stream_mask(mask)].float()
    codes = posterior.clone()
    codes[mask] = dictionary.most_likely(logits)
    rows = torch.arange(every.size(0), device=every.device)
    after = every[rows, mask.sum(1) * dictionary.digits]
    return codes, logits, after.argmax(-1).eq(dictionary.eos())


def forced_length_codes(model: VQEMTransformer, lengths: Tensor, encoder_out: EncoderOut) -> Tensor:
    """Greedy codes ``[B, max(lengths)]``, ``lengths`` ``[B]`` of them per sentence, -1 after."""
    dictionary = model.latent_dictionary
    predictor = CachedPredictor(model.latent_predictor, encoder_out, 1)
    symbols = [torch.full_like(lengths, dictionary.eos())]
    for position in range(int(lengths.max()) * dictionary.digits):
        allowed = dictionary.symbols_at(position)
        logits = predictor.advance(symbols[-1])
        symbols.append(logits[:, allowed].argmax(-1) + allowed.start)
    codes = dictionary.codes(torch.stack(symbols[1:], 1))
    places = torch.arange(codes.size(1), device=codes.device)
    return codes.masked_fill(places >= lengths.unsqueeze(1), -1)


def decode_words(
    generator: LatentGenerator, model: VQEMTransformer, codes: Tensor, encoder_out: EncoderOut
) -> list[list[int]]:
    """Target tokens without the end, of codes ``[B, L]``, as the generator decodes them."""
    unscored = torch.zeros(codes.size(0), 1, device=codes.device)
    latent = LatentHypothesis(codes.unsqueeze(1), unscored, codes.ge(0).sum(1, keepdim=True))
    found = generator.decode([model], latent, [encoder_out])
    return [hypothesis["tokens"][:-1].tolist() for hypothesis in found]


@dataclass
class _Tally:
    """Counts over batches, one entry per posterior code before the end of its target."""

    codes: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    one_step: list[Tensor] = field(default_factory=list)
    free_running: list[Tensor] = field(default_factory=list)
    among_best: list[Tensor] = field(default_factory=list)
    nll: float = 0.0
    ends: list[Tensor] = field(default_factory=list)
    """``[B]``: whether the end was predicted."""
    numbers: list[Tensor] = field(default_factory=list)
    """``[B, 2]``: codes written by the posterior and by the predictor."""

    def add(
        self,
        model: VQEMTransformer,
        codes: dict[str, Tensor],
        logits: Tensor,
        target_lengths: Tensor,
        *,
        stops: bool = False,
    ) -> None:
        """Count a batch; ``logits`` ``[N·S, V_L]`` as ``one_step_codes`` gives them.

        Args:
            stops: whether the predictor stops at the code that stands behind the end.
        """
        posterior, dictionary = codes[POSTERIOR], model.latent_dictionary
        mask = posterior.ge(0)
        places = mask.cumsum(1) - 1
        covers = mask & (places * model.multiple < target_lengths.unsqueeze(1))
        logits = logits[covers[mask].repeat_interleave(dictionary.digits)]
        labels = dictionary.tokens(posterior[covers].unsqueeze(1)).flatten()
        self.codes.append(posterior[covers].cpu())
        self.places.append(places[covers].cpu())
        self.one_step.append(codes[ONE_STEP][covers].eq(posterior[covers]).cpu())
        self.free_running.append(codes[FORCED_LENGTH][covers].eq(posterior[covers]).cpu())
        if dictionary.digits == 1:
            best = logits.topk(min(BEST, logits.size(1)), 1).indices
            self.among_best.append(best.eq(labels.unsqueeze(1)).any(1).cpu())
        taken = torch.log_softmax(logits, -1).gather(1, labels.unsqueeze(1))
        self.nll -= float(taken.double().sum())
        written = [(covers if stops else mask).sum(1), codes[PREDICTED].ge(0).sum(1)]
        self.numbers.append(torch.stack(written, 1).cpu())

    def summary(self) -> LatentQuality:
        codes, numbers = torch.cat(self.codes), torch.cat(self.numbers)
        shares = codes.unique(return_counts=True)[1].double() / codes.numel()
        best = torch.cat(self.among_best) if self.among_best else None
        written = numbers.sum(0).tolist()
        return LatentQuality(
            codes.numel(),
            math.exp(-float((shares * shares.log()).sum())),
            math.exp(self.nll / codes.numel()),
            _mean(torch.cat(self.one_step)),
            None if best is None else _mean(best),
            _mean(torch.cat(self.free_running)),
            _mean(torch.cat(self.ends)) if self.ends else None,
            _mean(numbers[:, 0].eq(numbers[:, 1])),
            written[1] / written[0],
            self.by_place(),
        )

    def by_place(self) -> list[PlaceAccuracy]:
        places = torch.cat(self.places).clamp(max=PLACES_SHOWN - 1)
        one_step, free = torch.cat(self.one_step), torch.cat(self.free_running)
        found = []
        for place in range(int(places.max()) + 1):
            here = places.eq(place)
            accuracies = _mean(one_step[here]), _mean(free[here])
            found.append(PlaceAccuracy(place + 1, int(here.sum()), *accuracies))
        return found


def _mean(hits: Tensor) -> float:
    return float(hits.double().mean())
