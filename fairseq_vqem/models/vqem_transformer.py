"""The VQ-VAE latent transformer for translation (paper section 5.1, Figure 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import FairseqEncoderDecoderModel, register_model
from fairseq.models.transformer import TransformerEncoderBase
from torch import Tensor, nn

from fairseq_vqem.bottlenecks import Bottleneck, BottleneckOutput, build_bottleneck
from fairseq_vqem.bottlenecks.base import float32_rows
from fairseq_vqem.errors import UserError
from fairseq_vqem.models.config import (
    VQEMTransformerConfig,
    add_switches,
    bottleneck_options,
    check_config,
    check_effective,
    factorises,
    predictor_config,
    transformer_config,
)
from fairseq_vqem.models.defaults import add_missing_options
from fairseq_vqem.models.initialise import initialise_from_teacher
from fairseq_vqem.models.loading import OTHER_ARCHITECTURE, misfit, refuse_other_sizes
from fairseq_vqem.modules.convolutions import Compressor, Expander
from fairseq_vqem.modules.ctc import CTCOutput, glancing_pass, left_packed
from fairseq_vqem.modules.decoders import (
    EncoderOut,
    LatentDictionary,
    LatentPredictor,
    ParallelDecoder,
)
from fairseq_vqem.modules.frames import PlannedFrames
from fairseq_vqem.modules.target_encoder import TargetEncoder, pad_to_multiple
from fairseq_vqem.schedules import Schedule, parse_schedule


@dataclass
class VQEMOutput:
    """What one training forward returns to the criterion. B sentences, T tokens, L latents.

    Attributes:
        logits: ``[B, T, V]`` word logits; T is a multiple of 2^n_c.
        labels: ``[B, T]`` target tokens; padding where nothing is to be learned.
        ctc: the frames of ``--output ctc``, else None; logits and labels are then theirs.
        bottleneck: the discretisation of the N real latents, None during the warm-up.
        latent_logits: ``[B, L·S+1, V_L]`` predictor logits over the latent dictionary of V_L
            entries, S symbols per latent; None during the warm-up.
        latent_tokens: ``[B, L·S+1]`` mode codes as latent dictionary ids, then the end symbol.
        latent_mask: ``[B, L]`` true at real latents, in whose row-major order N counts.
    """

    logits: Tensor
    labels: Tensor
    ctc: CTCOutput | None
    bottleneck: BottleneckOutput | None
    latent_logits: Tensor | None
    latent_tokens: Tensor | None
    latent_mask: Tensor


NO_LIMIT = 2**30  # more positions than any text has, and still an integer


def _share_schedule(text: str, option: str) -> Schedule:
    return parse_schedule(text, 0.0, 1.0, option=option)


@register_model("vqem_transformer", dataclass=VQEMTransformerConfig)
class VQEMTransformer(FairseqEncoderDecoderModel):
    """Source encoder, target encoder, bottleneck, latent predictor, expander, parallel decoder."""

    def __init__(
        self,
        cfg: VQEMTransformerConfig,
        encoder: TransformerEncoderBase,
        decoder: ParallelDecoder,
        bottleneck: Bottleneck,
    ) -> None:
        super().__init__(encoder, decoder)
        self.cfg = cfg
        self.multiple = 2**cfg.compress_steps
        self.pad, self.eos = decoder.dictionary.pad(), decoder.dictionary.eos()
        self.bottleneck = bottleneck
        compressor = Compressor(
            cfg.embed_dim,
            cfg.compress_steps,
            cfg.residual_blocks,
            str(cfg.residual_placement),
            cfg.dropout,
        )
        heads = cfg.attention_heads if cfg.target_encoder_attend_source else 0
        self.target_encoder = TargetEncoder(
            decoder.embed_tokens, compressor, heads, cfg.dropout, cfg.attention_dropout
        )
        self.expander = Expander(
            cfg.embed_dim,
            cfg.compress_steps,
            cfg.residual_blocks,
            str(cfg.expander),
            cfg.dropout,
        )
        ctc = str(cfg.output) == "ctc"
        self.planned_frames = PlannedFrames(cfg.embed_dim, cfg.upsample_scale) if ctc else None
        self.blank = decoder.dictionary.bos()
        self.latent_dictionary = LatentDictionary(
            cfg.codebook_size, bottleneck.digits if factorises(cfg) else 1
        )
        self.latent_predictor = LatentPredictor(predictor_config(cfg), self.latent_dictionary)
        self.quantise_schedule = _share_schedule(cfg.quantise_schedule, "--quantise-schedule")
        self.gold_schedule = _share_schedule(cfg.gold_schedule, "--gold-schedule")
        self.predicted_schedule = _share_schedule(cfg.predicted_schedule, "--predicted-schedule")
        self.prior_schedule = parse_schedule(cfg.predictor_prior, 0.0)
        self.num_updates = 0

    @classmethod
    def add_args(cls, parser: Any) -> None:
        super().add_args(parser)
        add_switches(parser)

    @classmethod
    def build_model(cls, cfg: VQEMTransformerConfig, task: Any) -> VQEMTransformer:
        """Build for the dictionaries of ``task``; ``UserError`` where options do not fit."""
        add_missing_options(cfg, VQEMTransformerConfig)
        check_config(cfg)
        if not getattr(task, "supports_latents", False):
            raise UserError(
                "vqem_transformer needs its own task: pass --task translation_vqem"
                " (and --criterion vqem_loss in training)"
            )
        source, target = task.source_dictionary, task.target_dictionary
        if cfg.share_all_embeddings and source != target:
            raise UserError(
                "the source and target dictionaries differ, so embeddings cannot be shared:"
                " preprocess with --joined-dictionary or pass --no-share-all-embeddings"
            )
        embeddings = build_embedding(target, cfg.embed_dim)
        shared = cfg.share_all_embeddings
        source_embeddings = embeddings if shared else build_embedding(source, cfg.embed_dim)
        encoder = TransformerEncoderBase(
            transformer_config(cfg, cfg.decoder_layers), source, source_embeddings
        )
        decoder = ParallelDecoder(
            transformer_config(cfg, cfg.decoder_layers),
            target,
            embeddings,
            attend_source=cfg.decoder_attend_source,
            causal=cfg.causal_decoder,
        )
        bottleneck = build_bottleneck(cfg.bottleneck, bottleneck_options(cfg))
        model = cls(cfg, encoder, decoder, bottleneck)
        if getattr(task, "initialises_models", False):  # a training begins
            check_effective(cfg)
            if cfg.init_from:
                initialise_from_teacher(model, cfg.init_from)
        return model

    # ------------------------------------------------------------------ training

    def set_num_updates(self, num_updates: int) -> None:
        self.num_updates = num_updates
        super().set_num_updates(num_updates)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor,
        prev_output_tokens: Tensor | None,
        target: Tensor,
        noised_target: Tensor | None = None,
    ) -> VQEMOutput:
        """Teacher-forced pass over ``target`` ``[B, T]`` (ending in EOS, right-padded)."""
        encoder_out = self.encoder(src_tokens, src_lengths=src_lengths)
        seen = target if noised_target is None else noised_target
        vectors, latent_mask = self.encode_target(seen, src_lengths, encoder_out)
        share = self.quantise_schedule(self.num_updates) if self.training else 1.0
        rows = vectors[latent_mask]
        result: BottleneckOutput | None = None
        latent_logits, latent_tokens = None, None
        if share > 0.0:
            result = self.discretise(rows, latent_mask, encoder_out)
            keep = torch.rand(rows.size(0), 1, device=rows.device) >= share
            rows = torch.where(keep, rows, result.latents)
            latent_tokens = self.latent_tokens(result.codes, latent_mask)
            latent_logits = self.predict_latents(latent_tokens, encoder_out)
            rows = self.mix_predicted(rows, latent_logits[:, :-1][self.stream_mask(latent_mask)])
        elif self.training:
            self.bottleneck.observe(rows)
            rows = rows + self.zero_of_idle_parameters()
        latents = vectors.new_zeros(vectors.shape)
        latents[latent_mask] = rows.to(latents.dtype)
        ctc = None
        if self.planned_frames is None:
            logits, labels = self.reconstruct(latents, latent_mask, encoder_out, target)
        else:
            ctc = self.reconstruct_frames(latents, latent_mask, encoder_out, target)
            logits, labels = ctc.logits, ctc.words
        return VQEMOutput(logits, labels, ctc, result, latent_logits, latent_tokens, latent_mask)

    def discretise(
        self, rows: Tensor, latent_mask: Tensor, encoder_out: EncoderOut
    ) -> BottleneckOutput:
        """The bottleneck on latents ``[N, D]``, in training with the predictor as a prior.

        An E step of the mixture whose prior is the latent predictor: among codes that are about as
        near it takes the one that the predictor expects, after the nearest codes of the places
        before. With the reconstruction that is the evidence bound; vector quantisation knows it as
        entropy-constrained (Chou, Lookabaugh and Gray, 1989). The paper's prior is uniform (3.1).
        """
        weight = self.prior_schedule(self.num_updates) if self.training else 0.0
        if weight == 0.0:
            return self.bottleneck(rows)
        with torch.no_grad():
            with torch.autocast(rows.device.type, enabled=False):
                modes = self.bottleneck.modes(float32_rows(rows))
            nearest = self.latent_tokens(modes, latent_mask)
            logits = self.predict_latents(nearest, encoder_out)[:, :-1][latent_mask].float()
        torch.clear_autocast_cache()  # before torch 2.11 it would hand on weights without gradient
        log_prior = torch.log_softmax(logits[:, self.latent_dictionary.offset :], -1)
        return self.bottleneck(rows, weight * log_prior)

    def mix_predicted(self, rows: Tensor, latent_logits: Tensor) -> Tensor:
        """Replace a share of the latents ``[N, D]`` by the predictor's choices, in training.

        ``latent_logits`` are ``[N·S, V_L]``.
        The decoder otherwise only meets the posterior's codes, yet has to decode the predictor's:
        so it learns how far it may trust a code, and to ask the source instead.
        """
        share = self.predicted_schedule(self.num_updates) if self.training else 0.0
        if share == 0.0:
            return rows
        predicted = self.latent_dictionary.most_likely(latent_logits)
        chosen = torch.rand(rows.size(0), 1, device=rows.device) < share
        return torch.where(chosen, self.bottleneck.lookup(predicted).to(rows.dtype), rows)

    def zero_of_idle_parameters(self) -> Tensor:
        """Zero, as a function of the parameters that the warm-up may leave without a gradient.

        DistributedDataParallel fails unless every parameter receives one.
        """
        modules = (self.encoder, self.latent_predictor, self.bottleneck)
        idle = [parameter for module in modules for parameter in module.parameters()]
        return 0.0 * torch.stack([parameter.flatten()[:1].sum() for parameter in idle]).sum()

    def encode_target(
        self, target: Tensor, src_lengths: Tensor, encoder_out: EncoderOut
    ) -> tuple[Tensor, Tensor]:
        """Continuous latents ``[B, L, D]`` and their mask ``[B, L]`` of ``target`` ``[B, T]``."""
        lengths = target.ne(self.pad).sum(1)
        if self.cfg.latent_length == "source":
            lengths = torch.maximum(lengths, 2 * src_lengths)
        if int(lengths.max()) > self.cfg.max_target_positions:
            raise UserError(
                f"a target of {int(lengths.max())} positions exceeds --max-target-positions"
                f" {self.cfg.max_target_positions}: raise it or drop the sentence"
            )
        tokens = pad_to_multiple(target, int(lengths.max()), self.multiple, self.pad)
        covered = -(-lengths // self.multiple) * self.multiple
        covered_mask = torch.arange(tokens.size(1), device=target.device) < covered.unsqueeze(1)
        real = covered_mask if self.cfg.latent_length == "source" else tokens.ne(self.pad)
        return self.target_encoder(tokens, real, encoder_out)

    def reconstruct(
        self, latents: Tensor, latent_mask: Tensor, encoder_out: EncoderOut, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Word logits and labels; in training a share of inputs is replaced by gold embeddings.

        Replaced positions are no labels: the decoder could copy them.
        """
        inputs, mask = self.expander(latents, latent_mask)
        labels = pad_to_multiple(target, inputs.size(1), self.multiple, self.pad)
        share = self.gold_schedule(self.num_updates) if self.training else 0.0
        if share > 0.0:
            real = labels.ne(self.pad)
            gold = real & (torch.rand(labels.shape, device=labels.device) < share)
            embedded = self.target_encoder.scale * self.decoder.embed_tokens(labels)
            inputs = torch.where(gold.unsqueeze(-1), embedded, inputs)
            labels = labels.masked_fill(gold, self.pad)
        return self.decoder(inputs, mask, encoder_out), labels

    def reconstruct_frames(
        self, latents: Tensor, latent_mask: Tensor, encoder_out: EncoderOut, target: Tensor
    ) -> CTCOutput:
        """Frames of the source that read the latents; in training some show the aligned target.

        A share of the sentences has to do without latents, so that the decoder also learns to
        read the source.
        """
        assert self.planned_frames is not None
        hidden = None
        if self.training and self.cfg.hidden_codes:
            hidden = torch.rand(target.size(0), device=target.device) < self.cfg.hidden_codes
        inputs, frames = self.planned_frames(
            encoder_out, *self.expander(latents, latent_mask), hidden
        )
        words = left_packed(target, target.ne(self.pad) & target.ne(self.eos))
        ratio = self.gold_schedule(self.num_updates) if self.training else 0.0
        return glancing_pass(self.decoder, encoder_out, inputs, frames, words, self.blank, ratio)

    def latent_tokens(self, codes: Tensor, latent_mask: Tensor) -> Tensor:
        """Codes ``[N]`` laid out by ``latent_mask``, then the end symbol, ``[B, L·S+1]``."""
        laid_out = latent_mask.new_full(latent_mask.shape, -1, dtype=torch.long)
        laid_out[latent_mask] = codes
        tokens = self.latent_dictionary.tokens(laid_out)
        last = tokens.new_full((tokens.size(0), 1), self.latent_dictionary.pad())
        tokens = torch.cat([tokens, last], 1)
        if self.cfg.latent_length == "end":
            ends = latent_mask.sum(1, keepdim=True) * self.latent_dictionary.digits
            tokens.scatter_(1, ends, self.latent_dictionary.eos())
        return tokens

    def stream_mask(self, latent_mask: Tensor) -> Tensor:
        """True at the symbols of real latents, ``[B, L·S]``."""
        return latent_mask.repeat_interleave(self.latent_dictionary.digits, 1)

    def predict_latents(self, latent_tokens: Tensor, encoder_out: EncoderOut) -> Tensor:
        """Teacher-forced logits ``[B, L·S+1, V_L]`` for ``latent_tokens`` ``[B, L·S+1]``."""
        end, pad = self.latent_dictionary.eos(), self.latent_dictionary.pad()
        previous = latent_tokens[:, :-1].masked_fill(latent_tokens[:, :-1].eq(end), pad)
        start = latent_tokens.new_full((latent_tokens.size(0), 1), end)
        previous = torch.cat([start, previous], 1)
        return self.latent_predictor(previous, encoder_out=encoder_out)[0]

    # ------------------------------------------------------------------ inference

    def posterior_codes(
        self, target: Tensor, src_lengths: Tensor, encoder_out: EncoderOut
    ) -> Tensor:
        """The autoencoder's own codes ``[B, L]`` of ``target``, -1 at padding."""
        vectors, mask = self.encode_target(target, src_lengths, encoder_out)
        codes = mask.new_full(mask.shape, -1, dtype=torch.long)
        codes[mask] = self.bottleneck(vectors[mask]).codes
        return codes

    def decode_codes(self, codes: Tensor, encoder_out: EncoderOut) -> Tensor:
        """Word logits ``[B, T, V]`` of ``codes`` ``[B, L]`` (-1 at padding).

        T is L·2^n_c, or with ``--output ctc`` the number of frames.
        """
        mask = codes.ge(0)
        latents = self.bottleneck.lookup(codes.clamp(min=0))
        latents = latents.to(self.decoder.embed_tokens.weight.dtype)
        inputs, token_mask = self.expander(latents, mask)
        if self.planned_frames is not None:
            inputs, token_mask = self.planned_frames(encoder_out, inputs, token_mask)
        return self.decoder(inputs, token_mask, encoder_out)

    @torch.no_grad()
    def pad_code(self) -> int:
        """The EOS/PAD latent (Appendix C): the posterior's code for positions after the end.

        Raises:
            UserError: the model predicts an explicit end and so never learned such a code.
        """
        if self.cfg.latent_length != "source":
            raise UserError(
                "--stop-at-pad-latent needs a model trained with --latent-length source: this one"
                " predicts an explicit end symbol and stops by itself"
            )
        self.eval()  # a generator may be built while dropout is still on
        device = self.decoder.embed_tokens.weight.device
        empty = torch.full((1, 1), self.eos, device=device)
        length = min(8 * self.multiple, self.cfg.max_target_positions // 2)
        lengths = torch.tensor([length], device=device)
        codes = self.posterior_codes(empty, lengths, self.encoder(empty, src_lengths=lengths))
        return int(codes[0, codes.size(1) // 2 :].mode().values)

    def max_positions(self) -> tuple[int, int]:
        """The longest source and target; with ``--latent-length source`` the source has latents."""
        source, target = self.encoder.max_positions(), self.decoder.max_positions()
        if self.cfg.latent_length == "source":
            source = min(source, target // 2)
        return source, target

    def max_latents(self, src_lengths: Tensor, ratio: float, offset: int) -> Tensor:
        """The most latents a hypothesis may have, from the source length alone, ``[B]``."""
        if self.cfg.latent_length == "source":
            return -(-2 * src_lengths // self.multiple)
        longest = (ratio * src_lengths).ceil().clamp(max=NO_LIMIT).long() + offset
        longest = longest.clamp(max=self.cfg.max_target_positions)
        return -(-longest // self.multiple)

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As fairseq, but a checkpoint of other sizes or parts is refused in one sentence."""
        refuse_other_sizes(self.state_dict(), state_dict)
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            raise misfit(OTHER_ARCHITECTURE, error) from error


def build_embedding(dictionary: Dictionary, dimension: int) -> nn.Embedding:
    embedding = nn.Embedding(len(dictionary), dimension, padding_idx=dictionary.pad())
    nn.init.normal_(embedding.weight, std=1.0 / math.sqrt(dimension))
    nn.init.zeros_(embedding.weight[dictionary.pad()])
    return embedding
