"""What the peer models share: encoder, parallel decoder and fairseq's NAT interface."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from fairseq.iterative_refinement_generator import DecoderOut
from fairseq.models import FairseqEncoderDecoderModel
from fairseq.models.transformer import TransformerEncoderBase
from torch import Tensor

from fairseq_vqem.errors import UserError
from fairseq_vqem.models.config import transformer_config
from fairseq_vqem.models.defaults import add_missing_options
from fairseq_vqem.models.loading import misfit
from fairseq_vqem.models.vqem_transformer import build_embedding
from fairseq_vqem.modules.decoders import EncoderOut, ParallelDecoder
from fairseq_vqem.peers.config import PeerConfig, check_config

Model = TypeVar("Model", bound="PeerModel")


class PeerModel(FairseqEncoderDecoderModel):
    """Encoder and parallel decoder in one pass, as ``IterativeRefinementGenerator`` calls them.

    Sources and targets begin with BOS and end with EOS, as fairseq's NAT task makes them. B
    sentences, S source tokens, V words.

    Attributes:
        config: the dataclass of the model's options.
        attend_source: whether the decoder's layers cross-attend to the encoder.
    """

    config: ClassVar[type[PeerConfig]]
    attend_source: ClassVar[bool] = True

    def __init__(self, cfg: Any, encoder: TransformerEncoderBase, decoder: ParallelDecoder) -> None:
        super().__init__(encoder, decoder)
        self.cfg = cfg
        dictionary = decoder.dictionary
        self.bos, self.pad, self.eos = dictionary.bos(), dictionary.pad(), dictionary.eos()
        self.num_updates = 0

    @classmethod
    def build_model(cls: type[Model], cfg: Any, task: Any) -> Model:
        """Build for the dictionaries of ``task``; ``UserError`` where options do not fit."""
        add_missing_options(cfg, cls.config)
        check_config(cfg)
        if not getattr(task, "supports_parallel_decoding", False):
            raise UserError("this model needs its own task: pass --task translation_nat")
        source, target = task.source_dictionary, task.target_dictionary
        if cfg.share_all_embeddings and source != target:
            raise UserError(
                "the source and target dictionaries differ, so embeddings cannot be shared:"
                " preprocess with --joined-dictionary or drop --share-all-embeddings"
            )
        embeddings = build_embedding(target, cfg.embed_dim)
        shared = cfg.share_all_embeddings
        source_embeddings = embeddings if shared else build_embedding(source, cfg.embed_dim)
        config = transformer_config(cfg, cfg.decoder_layers)
        encoder = TransformerEncoderBase(config, source, source_embeddings)
        decoder = ParallelDecoder(config, target, embeddings, cls.attend_source, causal=False)
        return cls(cfg, encoder, decoder)

    @property
    def allow_length_beam(self) -> bool:
        return False

    def set_num_updates(self, num_updates: int) -> None:
        self.num_updates = num_updates
        super().set_num_updates(num_updates)

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As fairseq, but a checkpoint of another configuration is refused in one sentence."""
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            advice = "use the dictionaries, --arch and sizes of its training"
            raise misfit(advice, error) from error

    def forward_encoder(self, encoder_inputs: list[Tensor]) -> EncoderOut:
        encoder_out: EncoderOut = self.encoder(*encoder_inputs)
        return encoder_out

    def initialize_output_tokens(self, encoder_out: EncoderOut, src_tokens: Tensor) -> DecoderOut:
        """An empty sentence: what is decoded comes from the encoder's output."""
        tokens = src_tokens.new_tensor([[self.bos, self.eos]]).repeat(src_tokens.size(0), 1)
        scores = torch.zeros_like(tokens, dtype=torch.float)
        return DecoderOut(tokens, scores, None, 0, 0, None)

    def words_of(self, tokens: Tensor) -> Tensor:
        """True at words of ``tokens`` ``[B, S]``: neither padding nor a sentence's ends."""
        return tokens.ne(self.pad) & tokens.ne(self.bos) & tokens.ne(self.eos)

    def hypotheses(
        self, decoder_out: DecoderOut, words: Tensor, scores: Tensor, counts: Tensor
    ) -> DecoderOut:
        """fairseq's record of finished hypotheses: BOS, words, EOS, padding.

        Args:
            words: ``[B, W]``, the first ``counts`` ``[B]`` of each row count.
            scores: ``[B, W]`` log-probabilities; those of BOS and EOS, which are sure, are 0.
        """
        batch = words.size(0)
        ends = counts.unsqueeze(1)
        beyond = torch.arange(words.size(1), device=words.device) >= ends
        last = words.new_full((batch, 1), self.pad)
        tokens = torch.cat([last, words.masked_fill(beyond, self.pad), last], 1)
        tokens[:, 0] = self.bos
        tokens = tokens.scatter(1, ends + 1, self.eos)
        zero = scores.new_zeros(batch, 1)
        scores = torch.cat([zero, scores.masked_fill(beyond, 0.0), zero], 1)
        if decoder_out.history is not None:
            decoder_out.history.append(tokens.clone())
        return decoder_out._replace(output_tokens=tokens, output_scores=scores, attn=None)
