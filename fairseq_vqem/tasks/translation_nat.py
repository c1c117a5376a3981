"""Translation with the peers: fairseq's NAT models and those of ``peers``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from fairseq import utils
from fairseq.data import LanguagePairDataset, indexed_dataset
from fairseq.tasks import register_task
from fairseq.tasks.fairseq_task import FairseqTask
from fairseq.tasks.translation import TranslationTask, load_langpair_dataset
from fairseq.tasks.translation_lev import (
    TranslationLevenshteinConfig,
    TranslationLevenshteinTask,
)
from torch import Tensor

from fairseq_vqem.corpora.subwords import checked_post_process
from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.parts import refuse_ignored_options
from fairseq_vqem.models.config import option
from fairseq_vqem.models.initialise import initialise_from_teacher
from fairseq_vqem.peers.alignments import alignment_prefix
from fairseq_vqem.peers.generator import ParallelGenerator
from fairseq_vqem.peers.own_search import OwnSearchGenerator
from fairseq_vqem.peers.rules import (
    check_criterion,
    check_source_copy,
    check_training,
    rules_of,
)
from fairseq_vqem.tasks.data_folders import check_data_folders
from fairseq_vqem.tasks.validation import bleu_log, log_bleu, unwrapped


@dataclass
class TranslationNATConfig(TranslationLevenshteinConfig):
    """fairseq's own options, ``--eval-bleu`` and ``--load-alignments`` included."""

    remove_repeats: bool = option(False, "collapse immediately repeated tokens of the output")
    length_span: Optional[float] = option(
        None,
        "with --iter-decode-with-beam: lengths of candidates stay within this part of the predicted"
        " length (without it 100 of them reach down to the empty translation)",
    )
    init_from: Optional[str] = option(
        None, "AR Transformer checkpoint whose encoder, decoder and embeddings start the model"
    )


@register_task("translation_nat", dataclass=TranslationNATConfig)
class TranslationNATTask(TranslationLevenshteinTask):
    """fairseq's ``translation_lev`` with validation BLEU, word alignments and candidates.

    Wrong combinations of model, noise, loss and options are refused (``peers/rules.py``).
    """

    cfg: TranslationNATConfig
    supports_parallel_decoding = True

    def __init__(self, cfg: TranslationNATConfig, src_dict: Any, tgt_dict: Any) -> None:
        super().__init__(cfg, src_dict, tgt_dict)
        self.trained: Any = None

    @classmethod
    def setup_task(cls, cfg: TranslationNATConfig, **kwargs: Any) -> "TranslationNATTask":
        check_data_folders(cfg.data)
        task: TranslationNATTask = super().setup_task(cfg, **kwargs)
        return task

    def load_dataset(
        self, split: str, epoch: int = 1, combine: bool = False, **kwargs: Any
    ) -> None:
        """As fairseq's ``translation``, with BOS first and, if asked for, word alignments."""
        cfg = self.cfg
        folders = utils.split_paths(cfg.data)
        if split != cfg.train_subset:
            folders = folders[:1]
        folder = folders[(epoch - 1) % len(folders)]
        prefix = alignment_prefix(folder, split, cfg.source_lang, cfg.target_lang)
        if cfg.load_alignments and cfg.truncate_source:
            raise UserError("--load-alignments is of whole sources: leave out --truncate-source")
        if cfg.load_alignments and not indexed_dataset.dataset_exists(prefix, cfg.dataset_impl):
            raise UserError(
                f"--load-alignments: there is no {prefix}.idx: make it with fairseq-vqem align"
            )
        self.datasets[split] = load_langpair_dataset(
            folder,
            split,
            cfg.source_lang,
            self.src_dict,
            cfg.target_lang,
            self.tgt_dict,
            combine=combine,
            dataset_impl=cfg.dataset_impl,
            upsample_primary=cfg.upsample_primary,
            left_pad_source=cfg.left_pad_source,
            left_pad_target=cfg.left_pad_target,
            max_source_positions=cfg.max_source_positions - 1,  # BOS comes before a cut source
            max_target_positions=cfg.max_target_positions,
            prepend_bos=True,
            load_alignments=cfg.load_alignments,
            truncate_source=cfg.truncate_source,
            num_buckets=cfg.num_batch_buckets,
            shuffle=(split != "test"),
            pad_to_multiple=cfg.required_seq_len_multiple,
        )

    def build_dataset_for_inference(
        self, src_tokens: list[Tensor], src_lengths: list[int], constraints: Any = None
    ) -> LanguagePairDataset:
        """As fairseq, but padded on the side that the model was trained with.

        fairseq always pads left, where ``--src-embedding-copy`` copies the padding.
        """
        dataset = super().build_dataset_for_inference(src_tokens, src_lengths, constraints)
        dataset.left_pad_source = self.cfg.left_pad_source
        return dataset

    # ------------------------------------------------------------------ building

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        if from_checkpoint and not self.cfg.eval_bleu:  # to decode: perhaps a teacher
            return FairseqTask.build_model(self, cfg, from_checkpoint)
        if self.cfg.eval_bleu:
            given, symbols = self.cfg.eval_bleu_remove_bpe, self.tgt_dict.symbols
            self.cfg.eval_bleu_remove_bpe = checked_post_process(given, symbols, self.cfg.data)
        model = super().build_model(cfg, from_checkpoint)
        if from_checkpoint:  # fairseq-validate
            return model
        check_training(model, self.cfg)
        if self.cfg.init_from:  # a resumed training then loads its own parameters
            initialise_from_teacher(model, self.cfg.init_from)
        self.trained = model
        return model

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        criterion = super().build_criterion(cfg, from_checkpoint)
        if self.trained is not None:
            check_criterion(self.trained, criterion)
        return criterion

    def build_generator(self, models: Sequence[Any], args: Any, **unused: Any) -> ParallelGenerator:
        check_source_copy(models[0], self.cfg)
        refuse_ignored_options(args)
        candidates = getattr(args, "iter_decode_with_beam", 1) > 1
        searched = candidates and rules_of(models[0]).own_search
        kind = OwnSearchGenerator if searched else ParallelGenerator
        cfg = self.cfg
        return kind(self.target_dictionary, models, args, cfg.remove_repeats, cfg.length_span)

    # ------------------------------------------------------------------ training, validation

    def inject_noise(self, target_tokens: Tensor) -> Tensor:
        """The target as fairseq's NAT models read it; the other peers do not."""
        if self.trained is not None and rules_of(self.trained).noise is None:
            return target_tokens
        noised: Tensor = super().inject_noise(target_tokens)
        return noised

    def train_step(
        self,
        sample: dict[str, Any],
        model: Any,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """As fairseq's base task: ``translation_lev`` tells no model the number of its update."""
        sample["prev_target"] = self.inject_noise(sample["target"])
        result: tuple[Tensor, int, dict[str, Any]] = FairseqTask.train_step(
            self, sample, model, criterion, optimizer, update_num, ignore_grad
        )
        return result

    def valid_step(
        self, sample: dict[str, Any], model: Any, criterion: Any
    ) -> tuple[Tensor, int, dict[str, Any]]:
        loss, sample_size, log = super().valid_step(sample, model, criterion)
        if self.cfg.eval_bleu:
            with torch.no_grad():
                bleu = self._inference_with_bleu(self.sequence_generator, sample, unwrapped(model))
            log.update(bleu_log("bleu", bleu))
        return loss, sample_size, log

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        """As fairseq, but BLEU is 0 rather than absent where every hypothesis is empty."""
        super(TranslationTask, self).reduce_metrics(logging_outputs, criterion)
        if any("_bleu_sys_len" in log for log in logging_outputs):
            log_bleu("bleu", logging_outputs)
