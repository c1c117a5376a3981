"""Work-arounds for defects of fairseq 0.12 on today's Python, torch, numpy and sacreBLEU.

Each public function mends one defect, which its docstring names. ``apply()`` runs them all; it is
called when the plugin is imported, and calling it again does nothing. A patched function keeps the
one that it replaces: see ``original``.
"""

from fairseq_vqem.compat.batches import (
    end_loader_workers_at_once,
    keep_bf16_off_tpu,
    keep_last_batch,
    make_batches_every_epoch,
)
from fairseq_vqem.compat.checkpoints import (
    allow_fairseq_classes_in_checkpoints,
    allow_in_checkpoints,
    copy_checkpoints_atomically,
    explain_bad_checkpoints,
    name_unknown_models,
    refuse_missing_restore_file,
    restart_failed_saves,
)
from fairseq_vqem.compat.cuda import convolve_in_float32, plan_no_attention
from fairseq_vqem.compat.generation import (
    SynchronisedStopwatch,
    honour_sacrebleu_flag,
    mend_rerank,
    rerank,
    score_empty_validation,
    score_validation_in_its_language,
    synchronise_generation_timer,
)
from fairseq_vqem.compat.messages import (
    install_error_hook,
    recognise_own_user_dir,
    silence_known_warnings,
)
from fairseq_vqem.compat.patching import original
from fairseq_vqem.compat.precision import (
    forget_scale_of_bf16,
    keep_exact_parameters,
    unscale_once,
)
from fairseq_vqem.compat.processes import enable_cpu_data_parallel, enable_torchrun
from fairseq_vqem.compat.text import merge_large_files, segment_one_kind_of_space
from fairseq_vqem.compat.updates import (
    average_with_versions,
    discard_rejected_statistics,
    leave_out_dummy_batches,
    mend_averages,
)

__all__ = [
    "SynchronisedStopwatch",
    "allow_fairseq_classes_in_checkpoints",
    "allow_in_checkpoints",
    "apply",
    "average_with_versions",
    "convolve_in_float32",
    "copy_checkpoints_atomically",
    "discard_rejected_statistics",
    "enable_cpu_data_parallel",
    "enable_torchrun",
    "end_loader_workers_at_once",
    "explain_bad_checkpoints",
    "forget_scale_of_bf16",
    "honour_sacrebleu_flag",
    "install_error_hook",
    "keep_bf16_off_tpu",
    "keep_exact_parameters",
    "keep_last_batch",
    "leave_out_dummy_batches",
    "make_batches_every_epoch",
    "mend_averages",
    "mend_rerank",
    "merge_large_files",
    "name_unknown_models",
    "original",
    "plan_no_attention",
    "recognise_own_user_dir",
    "refuse_missing_restore_file",
    "rerank",
    "restart_failed_saves",
    "score_empty_validation",
    "score_validation_in_its_language",
    "segment_one_kind_of_space",
    "silence_known_warnings",
    "synchronise_generation_timer",
    "unscale_once",
]


def apply() -> None:
    """Install every work-around; safe to call more than once."""
    allow_fairseq_classes_in_checkpoints()
    merge_large_files()
    segment_one_kind_of_space()
    keep_last_batch()
    make_batches_every_epoch()
    keep_bf16_off_tpu()
    end_loader_workers_at_once()
    plan_no_attention()
    convolve_in_float32()
    discard_rejected_statistics()
    leave_out_dummy_batches()
    mend_averages()
    average_with_versions()
    unscale_once()
    forget_scale_of_bf16()
    keep_exact_parameters()
    mend_rerank()
    synchronise_generation_timer()
    honour_sacrebleu_flag()
    score_empty_validation()
    score_validation_in_its_language()
    explain_bad_checkpoints()
    name_unknown_models()
    refuse_missing_restore_file()
    copy_checkpoints_atomically()
    restart_failed_saves()
    enable_cpu_data_parallel()
    enable_torchrun()
    recognise_own_user_dir()
    silence_known_warnings()
    install_error_hook()
