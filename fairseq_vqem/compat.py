"""Work-arounds for defects of fairseq 0.12 on today's Python, torch, numpy and sacreBLEU.

Each public function mends one defect, which its docstring names. ``apply()`` runs them all; it is
called when the plugin is imported, and calling it again does nothing. A patched function keeps the
one that it replaces: see ``original``.
"""

import argparse
import collections
import functools
import inspect
import logging
import os
import re
import shutil
import socket
import sys
import time
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils, file_io, iterative_refinement_generator, utils
from fairseq.data import data_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import meters
from fairseq.models import distributed_fairseq_model
from fairseq.scoring.bleu import SacrebleuConfig
from fairseq_cli import generate as generate_cli

from fairseq_vqem.errors import UserError

logger = logging.getLogger(__name__)

C = typing.TypeVar("C", bound=type)

_USER_ERROR_LINE = re.compile(
    rf"^(?:{re.escape(UserError.__module__)}\.)?UserError: (.*)", re.MULTILINE
)
_LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


def apply() -> None:
    """Install every work-around; safe to call more than once."""
    allow_fairseq_classes_in_checkpoints()
    keep_last_batch()
    mend_rerank()
    synchronise_generation_timer()
    honour_sacrebleu_flag()
    explain_bad_checkpoints()
    refuse_missing_restore_file()
    copy_checkpoints_atomically()
    restart_failed_saves()
    enable_cpu_data_parallel()
    enable_torchrun()
    recognise_own_user_dir()
    silence_known_warnings()
    install_error_hook()


def original(function: Any) -> Any:
    """The fairseq function (or class) that a work-around replaced, or ``function`` itself."""
    return getattr(function, "vqem_original", function)


def _patch(
    owner: Any, name: str, build: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    current = getattr(owner, name)
    if hasattr(current, "vqem_original"):
        return
    updated = () if isinstance(current, type) else functools.WRAPPER_UPDATES
    replacement: Any = functools.update_wrapper(build(current), current, updated=updated)
    replacement.vqem_original = current
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(replacement) if is_static else replacement)


# --- checkpoints -------------------------------------------------------------------------------


def allow_in_checkpoints(cls: type) -> type:
    """Let checkpoints hold objects of ``cls``; usable as a class decorator.

    torch.load builds only classes that are known as safe. For a Meter there is a second defect:
    fairseq looks up a meter's class by its bare name among its own, so that a run with a custom
    meter could not be resumed (KeyError).

    Raises:
        ValueError: fairseq has another meter of this name.
    """
    torch.serialization.add_safe_globals([cls])
    if issubclass(cls, meters.Meter):
        if getattr(meters, cls.__name__, cls) is not cls:
            raise ValueError(f"fairseq already has a meter named {cls.__name__}")
        setattr(meters, cls.__name__, cls)
    return cls


def allow_fairseq_classes_in_checkpoints() -> None:
    """torch 2.6 and later refuse fairseq checkpoints, since these hold more than tensors.

    Needed: the model's arguments (Namespace), numpy scalars and arrays among the meters, and, for
    the state that rank 0 sends to the other ranks on resuming, omegaconf nodes. Loading stays safe:
    none of these runs code that a file could choose.
    """
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    dtypes = {type(np.dtype(kind)) for kind in ("?bBhHiIlLqQefd")}
    safe: list[Any] = [
        argparse.Namespace,
        *(np.ndarray, np.dtype, multiarray.scalar, multiarray._reconstruct, *dtypes),
        # the names that numpy 1 wrote
        (multiarray.scalar, "numpy.core.multiarray.scalar"),
        (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
        *(omegaconf.DictConfig, omegaconf.ListConfig, omegaconf.AnyNode),
        *(omegaconf.base.ContainerMetadata, omegaconf.base.Metadata),
        *(dict, list, int, collections.defaultdict, (typing.Any, "typing.Any")),
        distributed_utils._TensorPlaceholder,
    ]
    torch.serialization.add_safe_globals(safe)


def explain_bad_checkpoints() -> None:
    """A missing, truncated or foreign checkpoint file ends in a bare torch or zip stack trace.

    With this, it ends in a UserError that names the file. Any other error passes unchanged.
    """
    _patch(checkpoint_utils, "load_checkpoint_to_cpu", _load_or_explain)
    _patch(checkpoint_utils, "load_model_ensemble_and_task", _find_or_explain)


def _load_or_explain(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(path, *args, **kwargs)
        except Exception as error:
            reason = _why_unreadable(path, error)
            if reason is None:
                raise
            raise UserError(reason) from error

    return load_checkpoint_to_cpu


def _why_unreadable(path: str, error: Exception) -> str | None:
    if not os.path.isfile(path):
        # A remote path: only fairseq's own file handlers know about it.
        if file_io.PathManager.path_requires_pathmanager(path):
            return None
        return f"The checkpoint {path} does not exist; check the path."
    if "Weights only load failed" in str(error) and (refused := _refused_classes(path)):
        return (
            f"The checkpoint {path} holds objects that are not known to be safe ({refused}); "
            "load it with the plugin that wrote it, or register them with "
            "fairseq_vqem.compat.allow_in_checkpoints if you trust the file."
        )
    if not zipfile.is_zipfile(path) or "PytorchStreamReader failed" in str(error):
        return (
            f"The checkpoint {path} is truncated, damaged or no checkpoint at all; "
            "use another one (for example an earlier checkpoint of the same run)."
        )
    if not _holds_fairseq_state(path):
        return f"{path} is not a fairseq checkpoint; give a file that fairseq-train wrote."
    return None


def _refused_classes(path: str) -> str:
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return ""


def _holds_fairseq_state(path: str) -> bool:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:
        return False
    history = {"optimizer_history", "best_loss"}
    return isinstance(state, dict) and "model" in state and not history.isdisjoint(state)


def _find_or_explain(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_model_ensemble_and_task(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **kwargs)
        except OSError as error:
            missing = re.match("Model file not found: (.*)", str(error), re.DOTALL)
            if missing is None:
                raise
            raise UserError(f"The checkpoint {missing[1]} does not exist; check --path.") from error

    return load_model_ensemble_and_task


def refuse_missing_restore_file() -> None:
    """fairseq-train silently starts from scratch when the file of --restore-file is absent."""

    def build(load: Callable[..., Any]) -> Callable[..., Any]:
        def load_checkpoint(cfg: Any, trainer: Any, **kwargs: Any) -> Any:
            path = cfg.restore_file
            if path != "checkpoint_last.pt":
                path = path.replace(".pt", f"{trainer.checkpoint_suffix}.pt")
                if not file_io.PathManager.isfile(path):
                    raise UserError(f"The checkpoint {path} does not exist; check --restore-file.")
            return load(cfg, trainer, **kwargs)

        return load_checkpoint

    _patch(checkpoint_utils, "load_checkpoint", build)


def copy_checkpoints_atomically() -> None:
    """A run killed while fairseq copies checkpoint_last.pt or _best.pt leaves half a file there.

    The first file of a save is written under a temporary name and renamed; its copies were not.
    """

    def build(copy: Callable[..., Any]) -> Callable[..., Any]:
        def copy_then_rename(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
            if not overwrite or not file_io.PathManager.supports_rename(dst_path):
                return copy(src_path, dst_path, overwrite=overwrite)
            shutil.copyfile(src_path, f"{dst_path}.tmp")
            os.replace(f"{dst_path}.tmp", dst_path)
            return True

        return copy_then_rename

    _patch(file_io.PathManager, "copy", build)


def restart_failed_saves() -> None:
    """After a failed write (full disk, network drive) fairseq saves again behind the first half.

    That save succeeds and leaves a checkpoint that nobody can read. Each new try must start where
    the first one did.
    """

    def build(save: Callable[..., Any]) -> Callable[..., Any]:
        def save_from_the_same_place(obj: Any, f: Any) -> Any:
            if isinstance(f, str) or not f.seekable():
                return save(obj, f)
            start = f.tell()
            for pause in (2.5, 2.5, None):
                try:
                    f.seek(start)
                    f.truncate()
                    return torch.save(obj, f)
                except Exception:
                    if pause is None:
                        raise
                    logger.warning("writing a checkpoint failed, trying again", exc_info=True)
                    time.sleep(pause)

        return save_from_the_same_place

    _patch(checkpoint_utils, "_torch_persistent_save", build)


# --- batches -----------------------------------------------------------------------------------


def keep_last_batch() -> None:
    """fairseq drops the last batch if its size is no multiple of --required-batch-size-multiple.

    The compiled batcher gives every index and a smaller last batch, as documented; batch_by_size
    then throws that batch away (and fails on no index at all), in training and generation alike.
    """

    def build(batch: Callable[..., Any]) -> Callable[..., Any]:
        def batch_by_size(indices: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(indices, np.ndarray):
                indices = np.fromiter(indices, dtype=np.int64, count=-1)
            if len(indices) == 0:
                return []
            batches = batch(indices, *args, **kwargs)
            # Batches are consecutive slices of the indices, save for the fixed shapes of a TPU.
            dropped = indices[sum(map(len, batches)) :]
            if len(dropped) == 0 or kwargs.get("fixed_shapes") is not None:
                return batches
            return [*batches, dropped]

        return batch_by_size

    _patch(data_utils, "batch_by_size", build)


# --- generation --------------------------------------------------------------------------------


def mend_rerank() -> None:
    """Re-scoring by an autoregressive teacher fails: encoders return a dict these days.

    fairseq raises "'dict' object has no attribute 'encoder_out'" in IterativeRefinementGenerator.
    """
    generator = iterative_refinement_generator.IterativeRefinementGenerator
    _patch(generator, "rerank", lambda _: rerank)


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
    tokens begin with BOS, where the teacher expects EOS.
    """
    tokens = torch.nn.utils.rnn.pad_sequence(
        [candidates[0]["tokens"] for candidates in finalized], True, self.pad
    )
    tokens[:, 0] = self.eos
    encoder_out = reranker.encoder(*encoder_input)
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
    if generate_cli.StopwatchMeter is not SynchronisedStopwatch:
        generate_cli.StopwatchMeter = SynchronisedStopwatch


def honour_sacrebleu_flag() -> None:
    """fairseq-generate advises --sacrebleu, then ignores it and prints its own BLEU4."""

    def build(run: Callable[..., Any]) -> Callable[..., Any]:
        def generate(cfg: Any, output_file: Any) -> Any:
            if cfg.generation.sacrebleu:
                _score_with_sacrebleu(cfg)
            return run(cfg, output_file)

        return generate

    _patch(generate_cli, "_main", build)


def _score_with_sacrebleu(cfg: Any) -> None:
    scoring = cfg.scoring
    name = scoring._name if isinstance(scoring, omegaconf.DictConfig) else scoring
    if name not in (None, "bleu", "sacrebleu"):
        raise UserError(f"--sacrebleu contradicts --scoring {name}; give only one of them.")
    if name != "sacrebleu":
        with omegaconf.open_dict(cfg):
            cfg.scoring = omegaconf.OmegaConf.structured(SacrebleuConfig(_name="sacrebleu"))


# --- several processes -------------------------------------------------------------------------


def enable_cpu_data_parallel() -> None:
    """fairseq counts GPUs to know how many processes to start, so that on CPU it starts none.

    It fails with "0 available devices", or, given --distributed-init-method, ends at once as if
    all were well. DistributedDataParallel also refuses a device number for a model on CPU.
    """
    _patch(distributed_utils, "call_main", _call_main_on_cpu)
    _patch(distributed_fairseq_model, "DistributedDataParallel", _without_cpu_device)


def _call_main_on_cpu(call_main: Callable[..., Any]) -> Callable[..., Any]:
    def call_main_anywhere(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> Any:
        training = cfg.distributed_training
        on_cpu = cfg.common.cpu or not torch.cuda.is_available()
        if (
            on_cpu
            and training.distributed_world_size > 1
            and not (_under_launcher() or training.distributed_no_spawn or cfg.common.tpu)
        ):
            return _spawn_on_cpu(cfg, main, kwargs)
        return call_main(cfg, main, **kwargs)

    return call_main_anywhere


def _spawn_on_cpu(cfg: Any, main: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    training = cfg.distributed_training
    _choose_cpu_backend(training)
    if training.distributed_init_method is None:
        port = training.distributed_port if training.distributed_port > 0 else _free_port()
        training.distributed_init_method = f"tcp://localhost:{port}"
    training.distributed_rank = None  # distributed_main then counts from start_rank
    torch.multiprocessing.spawn(
        fn=distributed_utils.distributed_main,
        args=(main, cfg, {**kwargs, "start_rank": 0}),
        nprocs=training.distributed_world_size,
    )


def _choose_cpu_backend(training: Any) -> None:
    if training.distributed_backend == "nccl":
        logger.info("NCCL needs GPUs: using --distributed-backend gloo")
        training.distributed_backend = "gloo"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _without_cpu_device(ddp: Callable[..., Any]) -> Callable[..., Any]:
    def distributed_data_parallel(module: Any, **kwargs: Any) -> Any:
        if not next(module.parameters()).is_cuda:
            kwargs.update(device_ids=None, output_device=None)
        return ddp(module=module, **kwargs)

    return distributed_data_parallel


def enable_torchrun() -> None:
    """Under torchrun without GPUs, fairseq divides by the number of GPUs.

    And unless the world size is given again, each process trains its own, unconnected model.
    """
    _patch(distributed_utils, "infer_init_method", _with_launcher_world_size)
    _patch(distributed_utils, "_infer_torch_distributed_launch_init", _with_any_device_count)


def _under_launcher() -> bool:
    return all(name in os.environ for name in _LAUNCHER_VARIABLES)


def _with_launcher_world_size(infer: Callable[..., Any]) -> Callable[..., Any]:
    def infer_init_method(cfg: Any, force_distributed: bool = False) -> None:
        if _under_launcher() and cfg.distributed_init_method is None:
            cfg.distributed_world_size = int(os.environ["WORLD_SIZE"])
        infer(cfg, force_distributed)

    return infer_init_method


def _with_any_device_count(infer: Callable[..., Any]) -> Callable[..., Any]:
    def infer_torch_distributed_launch_init(cfg: Any) -> None:
        if torch.cuda.device_count() > 0:
            return infer(cfg)
        cfg.distributed_init_method = "env://"
        cfg.distributed_world_size = int(os.environ["WORLD_SIZE"])
        cfg.distributed_rank = int(os.environ["RANK"])
        cfg.device_id = 0
        cfg.distributed_no_spawn = True
        _choose_cpu_backend(cfg)
        return None

    return infer_torch_distributed_launch_init


# --- start and messages ------------------------------------------------------------------------


def recognise_own_user_dir() -> None:
    """--user-dir fails with "not globally unique" if the path reaches this package by a link.

    A second copy of the package is still refused, with a message that names both.
    """

    def build(import_user_module: Callable[..., Any]) -> Callable[..., Any]:
        def import_unless_loaded(args: Any) -> Any:
            user_dir = getattr(args, "user_dir", None)
            here = os.path.dirname(os.path.realpath(__file__))
            name = os.path.basename(os.path.abspath(user_dir or ""))
            if user_dir is None or name != __package__ or not os.path.isdir(user_dir):
                return import_user_module(args)
            if os.path.realpath(user_dir) == here:
                return None
            raise UserError(
                f"--user-dir {user_dir} is another copy of {__package__} than the one in use "
                f"({here}); give --user-dir {here}."
            )

        return import_unless_loaded

    _patch(utils, "import_user_module", build)


def silence_known_warnings() -> None:
    """Every run prints a page of warnings about calls that fairseq makes, not the user."""
    for message in (
        r"`torch\.cuda\.amp\.(autocast|GradScaler)\(args\.\.\.\)` is deprecated",
        "'pin_memory' argument is set as true but no accelerator is found",
        r"hydra\.experimental\.",
        r"\s*The version_base parameter is not specified",
        r"\s*The strict flag in the compose API is deprecated",
        "In 'config': Usage of deprecated keyword in package header",
        r"\s*'config' is validated against ConfigStore schema with the same name",
    ):
        warnings.filterwarnings("ignore", message=message)


def install_error_hook() -> None:
    """Print a UserError as one line, ``fairseq_vqem: error: <message>``; exit status 1.

    Every other error goes to the hook that was there before.
    """
    previous = sys.excepthook
    if hasattr(previous, "vqem_original"):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        message = _user_message(error)
        if message is None:
            previous(kind, error, trace)
        else:
            print(f"fairseq_vqem: error: {message}", file=sys.stderr)

    hook.vqem_original = previous  # type: ignore[attr-defined]
    sys.excepthook = hook


def _user_message(error: BaseException) -> str | None:
    if isinstance(error, UserError):
        # An error in a data-loading process arrives with its stack trace for a message.
        return _last_user_error(str(error)) or str(error)
    if isinstance(error, torch.multiprocessing.ProcessRaisedException):
        return _last_user_error(str(error))
    # fairseq's trainer replaces an error on loading a model by a bare Exception.
    if type(error) is Exception and isinstance(error.__context__, UserError):
        return str(error.__context__)
    return None


def _last_user_error(trace: str) -> str | None:
    last_line = trace.strip().rpartition("\n")[2]
    match = _USER_ERROR_LINE.match(last_line)
    return match[1] if match else None
