"""Reading and writing checkpoints."""

import argparse
import collections
import logging
import os
import re
import shutil
import time
import typing
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils, file_io, models
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import meters

from fairseq_vqem.compat.patching import patch
from fairseq_vqem.errors import UserError
from fairseq_vqem.plugins import VARIABLE

logger = logging.getLogger(__name__)


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
    patch(checkpoint_utils, "load_checkpoint_to_cpu", _load_or_explain)
    patch(checkpoint_utils, "load_model_ensemble_and_task", _find_or_explain)


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


def name_unknown_models() -> None:
    """A checkpoint of a model that is not registered ends in a KeyError of fairseq's own message.

    That one formats the whole configuration, braces and all.
    """

    def build(build_model: Callable[..., Any]) -> Callable[..., Any]:
        def build_known_model(cfg: Any, *args: Any, **kwargs: Any) -> Any:
            name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
            known = models.ARCH_MODEL_REGISTRY, models.MODEL_REGISTRY
            if name and not any(name in each for each in known):
                raise UserError(
                    f"There is no model {name!r} here; one of another package needs that in"
                    f" {VARIABLE}."
                )
            return build_model(cfg, *args, **kwargs)

        return build_known_model

    patch(models, "build_model", build)


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

    patch(checkpoint_utils, "load_checkpoint", build)


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

    patch(file_io.PathManager, "copy", build)


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

    patch(checkpoint_utils, "_torch_persistent_save", build)
