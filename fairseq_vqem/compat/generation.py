"""Re-ranking, timing and scoring in generation."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import omegaconf
import sacrebleu
import torch
from fairseq import iterative_refinement_generator
from fairseq.logging import meters
from fairseq.scoring.bleu import SacrebleuConfig
from fairseq.tasks.translation import TranslationTask
from fairseq_cli import generate as generate_cli

from fairseq_vqem.compat.patching import patch
from fairseq_vqem.errors import UserError


def mend_rerank() -> None:
    """Re-scoring by an autoregressive teacher fails: encoders return a dict these days.

    fairseq raises "'dict' object has no attribute 'encoder_out'" in IterativeRefinementGenerator.
    """
    generator = iterative_refinement_generator.IterativeRefinementGenerator
    patch(generator, "rerank", lambda _: rerank)


@torch.no_grad()
def rerank(
    self: Any,
    reranker: Any,
    finalized: list[list[dict[str, Any]]],
    encoder_input: Iterable[torch.Tensor],
    beam_size: int,
) -> list[list[dict[str, Any]]]:
    """Set each hypothesis' score to the teacher's mean log-probability per token, EOS included.

    ``finalized`` holds ``beam_size`` consecutive candidates per sentence, one to a list; their
    tokens begin with BOS, where the teacher expects EOS, and may be on another device.
    """
    inputs = list(encoder_input)
    tokens = torch.nn.utils.rnn.pad_sequence(
        [candidates[0]["tokens"] for candidates in finalized], True, self.pad
    ).to(inputs[0].device)
    tokens[:, 0] = self.eos
    encoder_out = reranker.encoder(*inputs)
    order = torch.arange(len(finalized), device=tokens.device) // beam_size
    encoder_out = reranker.encoder.reorder_encoder_out(encoder_out, order)
    decoder_out = reranker.decoder(tokens[:, :-1], encoder_out=encoder_out)
    targets = tokens[:, 1:]
    present = targets.ne(self.pad)
    # Half precision has too few digits for a sum over a long sentence.
    log_probs = reranker.get_normalized_probs(decoder_out, log_probs=True).float()
    token_scores = log_probs.gather(2, targets.unsqueeze(2)).squeeze(2).masked_fill(~present, 0.0)
    # The generator picks the best candidate with numpy, which cannot read a GPU tensor.
    scores = (token_scores.sum(1) / present.sum(1)).cpu()
    for candidates, score in zip(finalized, scores, strict=True):
        candidates[0]["score"] = score
    return finalized


class SynchronisedStopwatch(meters.StopwatchMeter):
    """A stopwatch that waits for the GPU when it starts and when it stops."""

    def start(self) -> None:
        """Wait for earlier work on the GPU, then start."""
        _wait_for_gpu()
        super().start()

    def stop(self, n: float = 1, prehook: Callable[[], object] | None = None) -> None:
        """Wait for the work to be timed, then stop and count ``n``."""
        _wait_for_gpu()
        super().stop(n, prehook)


def _wait_for_gpu() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def synchronise_generation_timer() -> None:
    """fairseq-generate times the launch of GPU work, not the work.

    The first batch stays in the sum, since the reported speeds divide by it all sentences.
    """
    for module in _generate_modules():
        module.StopwatchMeter = SynchronisedStopwatch


def _generate_modules() -> list[Any]:
    """``python -m fairseq_cli.generate`` runs a second copy of the module, named __main__."""
    main = sys.modules.get("__main__")
    name = getattr(getattr(main, "__spec__", None), "name", None)
    return [generate_cli, main] if name == generate_cli.__name__ else [generate_cli]


def honour_sacrebleu_flag() -> None:
    """fairseq-generate advises --sacrebleu, then ignores it and prints its own BLEU4."""

    def build(run: Callable[..., Any]) -> Callable[..., Any]:
        def generate(cfg: Any, output_file: Any) -> Any:
            if cfg.generation.sacrebleu:
                _score_with_sacrebleu(cfg)
            return run(cfg, output_file)

        return generate

    for module in _generate_modules():
        patch(module, "_main", build)


def score_empty_validation() -> None:
    """Training ends with KeyError: 'bleu' where every translation of a validation is empty.

    fairseq logs BLEU only if there is any n-gram, and leaves the references of a batch without any
    out of the brevity penalty. A total that is next to nothing makes it count the batch.
    """

    def build(reduce: Callable[..., Any]) -> Callable[..., Any]:
        def reduce_metrics(self: Any, logs: list[dict[str, Any]], criterion: Any) -> None:
            if self.cfg.eval_bleu and not any(log.get("_bleu_totals_0") for log in logs):
                logs = [*logs, {"_bleu_totals_0": 1e-9}] if _scored(logs) else logs
            reduce(self, logs, criterion)

        return reduce_metrics

    patch(TranslationTask, "reduce_metrics", build)


def score_validation_in_its_language() -> None:
    """fairseq's --eval-bleu takes the words of Chinese, Japanese and Korean to end at spaces.

    So it would choose checkpoints by other words than `translation_vqem` and the final scores.
    """
    from fairseq_vqem.benchmark.scoring import bleu_for

    def build(inference: Callable[..., Any]) -> Callable[..., Any]:
        def inference_with_bleu(self: Any, *args: Any, **kwargs: Any) -> Any:
            module: Any = sacrebleu
            own = module.corpus_bleu

            def corpus_bleu(texts: Any, references: Any, **options: Any) -> Any:
                if options:  # --eval-tokenized-bleu, which needs no tokeniser's package
                    return own(texts, references, **options)
                return bleu_for(self.cfg.target_lang).corpus_score(texts, references)

            module.corpus_bleu = corpus_bleu
            try:
                return inference(self, *args, **kwargs)
            finally:
                module.corpus_bleu = own

        return inference_with_bleu

    patch(TranslationTask, "_inference_with_bleu", build)


def _scored(logs: Iterable[dict[str, Any]]) -> bool:
    return any("_bleu_sys_len" in log for log in logs)


def _score_with_sacrebleu(cfg: Any) -> None:
    scoring = cfg.scoring
    name = scoring._name if isinstance(scoring, omegaconf.DictConfig) else scoring
    if name not in (None, "bleu", "sacrebleu"):
        raise UserError(f"--sacrebleu contradicts --scoring {name}; give only one of them.")
    if name != "sacrebleu":
        with omegaconf.open_dict(cfg):
            cfg.scoring = omegaconf.OmegaConf.structured(SacrebleuConfig(_name="sacrebleu"))
