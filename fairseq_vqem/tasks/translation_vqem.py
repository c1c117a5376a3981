"""Translation with discrete latents on top of fairseq's translation task."""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from fairseq import utils
from fairseq.data import encoders
from fairseq.dataclass import ChoiceEnum
from fairseq.dataclass.configs import GenerationConfig
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from sacrebleu.metrics import BLEU
from torch import Tensor

from fairseq_vqem.benchmark.scoring import bleu_for
from fairseq_vqem.corpora.subwords import checked_post_process
from fairseq_vqem.criterions.vqem_loss import VQEMLoss
from fairseq_vqem.errors import UserError
from fairseq_vqem.generation.latent_generator import RESCORES, LatentGenerator, read_words
from fairseq_vqem.generation.parts import refuse_ignored_options, refuse_passes
from fairseq_vqem.generation.records import LatentSearchOptions
from fairseq_vqem.models.config import option
from fairseq_vqem.models.vqem_transformer import VQEMTransformer
from fairseq_vqem.tasks.codebook import LearnsCodebook
from fairseq_vqem.tasks.data_folders import check_data_folders
from fairseq_vqem.tasks.noise import drop_words, shuffle_words
from fairseq_vqem.tasks.validation import bleu_log, log_bleu, unwrapped


@dataclass
class TranslationVQEMConfig(TranslationConfig):
    latent_beam: int = option(1, "beam of the latent search; 1 is greedy")
    latent_candidates: int = option(1, "code sequences decoded per sentence, in one batch")
    latent_temperature: float = option(
        0.0,
        "above 0: candidates are sampled at this temperature, the same ones for a sentence in every"
        " run and whatever the seed",
    )
    latent_end: ChoiceEnum(("marginal", "joint")) = option(  # type: ignore[valid-type]
        "marginal", "end where that is likelier than all codes together, or than the best one"
    )
    latent_length_reward: float = option(
        0.0, "of a beam: added to the log-probability for each code, against short outputs"
    )
    rescore: ChoiceEnum(RESCORES) = option(  # type: ignore[valid-type]
        "none", "which candidate wins: latent search's first, best joint score, teacher's best"
    )
    stop_at_pad_latent: bool = option(
        False, "end at the EOS/PAD latent of Appendix C (needs --latent-length source in training)"
    )
    latent_max_ratio: float = option(2.0, "longest output, as a multiple of the source length …")
    latent_max_offset: int = option(16, "… plus this many tokens")
    remove_repeats: bool = option(False, "collapse runs of one token in the output")
    word_dropout: float = option(0.0, "share of words hidden from the target encoder (paper: 0.3)")
    word_shuffle: float = option(0.0, "share of sentences whose words are shuffled (paper: all)")
    shuffle_distance: float = option(
        3.0, "places get noise in [0, this + 1) and are sorted (paper's shuffle rate: 0.5)"
    )
    eval_latent_bleu: bool = option(
        False, "validation BLEU from predicted codes and from the posterior's codes (Figure 3)"
    )


def check_search(cfg: Any, candidates: int = 1) -> None:
    """Raise ``UserError`` for options of the search for codes that do not go together.

    Args:
        cfg: the task's options.
        candidates: code sequences wanted by whatever option.
    """
    if cfg.latent_beam < 1 or cfg.latent_candidates < 1:
        raise UserError("--latent-beam and --latent-candidates must be at least 1")
    if cfg.latent_temperature < 0:
        raise UserError(
            f"--latent-temperature is {cfg.latent_temperature}: it must be positive, or 0 to search"
            " the best codes"
        )
    if str(cfg.rescore) == "teacher" and max(cfg.latent_candidates, candidates) < 2:
        raise UserError("--rescore teacher needs at least --latent-candidates 2")
    several = max(cfg.latent_beam, cfg.latent_candidates, candidates) > 1
    if cfg.latent_length_reward and (not several or cfg.latent_temperature):
        raise UserError(
            "--latent-length-reward chooses among the hypotheses of a beam: give --latent-beam 2 or"
            " more, and no --latent-temperature"
        )


@register_task("translation_vqem", dataclass=TranslationVQEMConfig)
class TranslationVQEMTask(LearnsCodebook, TranslationTask):
    """fairseq's translation task with codebook updates, latent decoding and its two BLEUs."""

    cfg: TranslationVQEMConfig
    supports_latents = True

    def __init__(self, cfg: TranslationVQEMConfig, src_dict: Any, tgt_dict: Any) -> None:
        super().__init__(cfg, src_dict, tgt_dict)
        for name in ("word_dropout", "word_shuffle"):
            if not 0.0 <= getattr(cfg, name) <= 1.0:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(cfg, name)}: it must be in [0, 1]"
                )
        if cfg.left_pad_target:
            raise UserError("the latents of a sentence come first: leave out --left-pad-target")
        self.initialises_models = False

    @classmethod
    def setup_task(cls, cfg: TranslationVQEMConfig, **kwargs: Any) -> "TranslationVQEMTask":
        check_data_folders(cfg.data)
        task: TranslationVQEMTask = super().setup_task(cfg, **kwargs)
        return task

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        self.initialises_models = not from_checkpoint
        model = super().build_model(cfg, from_checkpoint)
        if not from_checkpoint and not isinstance(model, VQEMTransformer):
            raise UserError(
                "--task translation_vqem trains vqem_transformer architectures only: pass"
                " --arch vqem_transformer (or _small, _tiny), or --task translation"
            )
        if not from_checkpoint and self.cfg.eval_bleu and self.cfg.stop_at_pad_latent:
            raise UserError(
                "--eval-bleu would stop at the EOS/PAD latent of the untrained model: pass"
                " --eval-latent-bleu instead"
            )
        if not from_checkpoint and self.cfg.eval_latent_bleu:
            self.build_generator([model], self.validation_arguments())  # refused now, not later
            self.detokenise(torch.tensor([self.target_dictionary.eos()]))
            model.train()
        return model

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        criterion = super().build_criterion(cfg, from_checkpoint)
        if not isinstance(criterion, VQEMLoss):
            raise UserError(
                "--task translation_vqem needs its own loss: pass --criterion vqem_loss"
            )
        return criterion

    # ------------------------------------------------------------------ training

    def train_step(
        self, sample: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """As every task with a codebook, on a noised target if asked for."""
        if self.cfg.word_dropout or self.cfg.word_shuffle:
            sample["net_input"]["noised_target"] = self.noise(sample["target"])
        return super().train_step(sample, *args, **kwargs)

    def noise(self, target: Tensor) -> Tensor:
        """The target as the target encoder sees it (denoising, Appendix C)."""
        pad, eos = self.target_dictionary.pad(), self.target_dictionary.eos()
        noised = shuffle_words(target, self.cfg.word_shuffle, self.cfg.shuffle_distance, pad, eos)
        return drop_words(noised, self.cfg.word_dropout, self.target_dictionary.unk(), pad, eos)

    # ------------------------------------------------------------------ generation

    def build_generator(self, models: Sequence[Any], args: Any, **unused: Any) -> LatentGenerator:
        """fairseq's beam, re-ranker and penalty flags are understood as their counterparts here."""
        if not isinstance(models[0], VQEMTransformer):
            raise UserError(
                "--task translation_vqem decodes vqem_transformer checkpoints: use --task"
                " translation for an autoregressive one, or give it last (--path"
                " student.pt:teacher.pt) with --rescore teacher"
            )
        refuse_ignored_options(args)
        refuse_passes("vqem_transformer", getattr(args, "iter_decode_max_iter", 0))
        if getattr(args, "retain_dropout", False):
            raise UserError("latents are searched without dropout: leave out --retain-dropout")
        rescore = str(self.cfg.rescore)
        if getattr(args, "iter_decode_with_external_reranker", False):
            rescore = "teacher"
        candidates = max(self.cfg.latent_candidates, getattr(args, "iter_decode_with_beam", 1))
        check_search(self.cfg, candidates)
        search = LatentSearchOptions(
            beam=self.cfg.latent_beam,
            candidates=candidates,
            temperature=self.cfg.latent_temperature,
            max_ratio=self.cfg.latent_max_ratio,
            max_offset=self.cfg.latent_max_offset,
            marginal_end=str(self.cfg.latent_end) == "marginal",
            stop_code=models[0].pad_code() if self.cfg.stop_at_pad_latent else None,
            length_reward=self.cfg.latent_length_reward,
        )
        history = getattr(args, "retain_iter_history", False)
        return LatentGenerator(
            self.target_dictionary,
            models,
            search,
            rescore,
            history,
            self.cfg.remove_repeats,
            getattr(args, "iter_decode_eos_penalty", 0.0),
        )

    # ------------------------------------------------------------------ validation

    def valid_step(
        self, sample: dict[str, Any], model: Any, criterion: Any
    ) -> tuple[Tensor, int, dict[str, Any]]:
        loss, sample_size, log = super().valid_step(sample, model, criterion)
        if self.cfg.eval_latent_bleu:
            model = unwrapped(model)
            with torch.no_grad():
                log.update(self.bleu_statistics("bleu", self.predicted(sample, model), sample))
                log.update(
                    self.bleu_statistics("posterior_bleu", self.posterior(sample, model), sample)
                )
        return loss, sample_size, log

    def validation_arguments(self) -> Namespace:
        """Generation options of validation, such as what is taken from the blank of CTC."""
        try:
            given = json.loads(self.cfg.eval_bleu_args)
            unknown = sorted(set(given) - set(GenerationConfig.__dataclass_fields__))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"--eval-bleu-args {self.cfg.eval_bleu_args} is no JSON of options:"
                " write '{\"iter_decode_eos_penalty\": 1}'"
            ) from error
        if unknown:
            raise UserError(
                f"--eval-bleu-args names {unknown[0]}, which is no option of fairseq's generation:"
                " give the task's own as flags, such as --latent-beam"
            )
        return Namespace(**{"iter_decode_eos_penalty": 0.0, **given})

    def predicted(self, sample: dict[str, Any], model: Any) -> list[Tensor]:
        """Translations from the latent predictor's codes, searched as the task's options say."""
        generator = self.build_generator([model], self.validation_arguments())
        return [hypotheses[0]["tokens"] for hypotheses in generator.generate([model], sample)]

    def posterior(self, sample: dict[str, Any], model: VQEMTransformer) -> list[Tensor]:
        """Reconstructions from the target's own codes: the autoencoder's ceiling."""
        src_tokens = sample["net_input"]["src_tokens"]
        src_lengths = sample["net_input"]["src_lengths"]
        encoder_out = model.encoder(src_tokens, src_lengths=src_lengths)
        codes = model.posterior_codes(sample["target"], src_lengths, encoder_out)
        penalty = self.validation_arguments().iter_decode_eos_penalty
        log_probabilities = torch.log_softmax(model.decode_codes(codes, encoder_out).float(), -1)
        tokens, _, lengths = read_words(model, log_probabilities, codes, encoder_out, penalty)
        found = [row[:n] for row, n in zip(tokens, lengths.tolist(), strict=True)]
        # as predicted codes are decoded, so that the two compare
        return [row.unique_consecutive() for row in found] if self.cfg.remove_repeats else found

    def bleu_statistics(
        self, name: str, hypotheses: list[Tensor], sample: dict[str, Any]
    ) -> dict[str, int]:
        """Summable n-gram statistics of sacreBLEU, one entry each so that workers can add them."""
        references = [
            utils.strip_pad(row, self.target_dictionary.pad()) for row in sample["target"]
        ]
        # --eval-tokenized-bleu is fairseq's: words are what spaces separate
        metric = BLEU(tokenize="none") if self.cfg.eval_tokenized_bleu else self.bleu
        bleu = metric.corpus_score(
            [self.detokenise(h) for h in hypotheses],
            [[self.detokenise(r, "UNKNOWNTOKENINREF") for r in references]],
        )
        return bleu_log(name, bleu)

    @cached_property
    def bleu(self) -> BLEU:
        """What scores detokenised text in the target language."""
        return bleu_for(self.cfg.target_lang)

    def detokenise(self, tokens: Tensor, unknown: str = "UNKNOWNTOKENINHYP") -> str:
        text = self.target_dictionary.string(tokens.int().cpu(), self.joiner, unk_string=unknown)
        return str(self.detokeniser.decode(text) if self.detokeniser else text)

    @cached_property
    def joiner(self) -> str | None:
        """What joins the subwords of validation."""
        given, symbols = self.cfg.eval_bleu_remove_bpe, self.target_dictionary.symbols
        return checked_post_process(given, symbols, self.cfg.data)

    @cached_property
    def detokeniser(self) -> Any:
        """What --eval-bleu-detok names, as fairseq's --eval-bleu reads it."""
        name, given = self.cfg.eval_bleu_detok, self.cfg.eval_bleu_detok_args or "{}"
        try:
            return encoders.build_tokenizer(Namespace(tokenizer=name, **json.loads(given)))
        except ValueError as error:
            raise UserError(f"--eval-bleu-detok-args {given} is no JSON: {error}") from error
        except TypeError as error:
            raise UserError(f"--eval-bleu-detok-args {given} has no names: {error}") from error
        except KeyError as error:
            raise UserError(
                f"there is no --eval-bleu-detok {name}: choose space or moses"
            ) from error
        except ImportError as error:
            raise UserError(f"--eval-bleu-detok {name} needs a package: {error}") from error

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: Any) -> None:
        super().reduce_metrics(logging_outputs, criterion)
        for name in ("bleu", "posterior_bleu"):
            if any(f"_{name}_sys_len" in log for log in logging_outputs):
                log_bleu(name, logging_outputs)
