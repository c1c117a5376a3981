"""Batches and precision."""

from collections.abc import Callable
from typing import Any

import numpy as np
from fairseq import options as fairseq_options
from fairseq import utils
from fairseq.data import data_utils, iterators
from fairseq.tasks import fairseq_task

from fairseq_vqem.compat.patching import patch


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

    patch(data_utils, "batch_by_size", build)


def end_loader_workers_at_once() -> None:
    """With a GPU every training waits at its end, five seconds for each worker of each loader.

    fairseq makes workers persistent, and torch then waits for workers whose batches it pins, one
    after the other, before it tells them to stop. With the four workers of a training and those of
    its validations that was over a minute on an H100. Without persistence they end with an epoch.
    """

    def build(initialise: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            initialise(self, *args, **{**kwargs, "persistent_workers": False})

        return __init__

    patch(iterators.EpochBatchIterator, "__init__", build)
    patch(iterators.StreamingEpochBatchIterator, "__init__", build)


def keep_bf16_off_tpu() -> None:
    """``--bf16`` also sets ``--tpu``, so that without torch_xla every bfloat16 training dies with
    AttributeError ('NoneType' object has no attribute 'xla_device')."""

    def build(parse: Callable[..., Any]) -> Callable[..., Any]:
        def parse_args_and_arch(*words: Any, **options: Any) -> Any:
            result = parse(*words, **options)
            if utils.xm is None:
                (result[0] if isinstance(result, tuple) else result).tpu = False
            return result

        return parse_args_and_arch

    patch(fairseq_options, "parse_args_and_arch", build)


def make_batches_every_epoch() -> None:
    """A training resumed after its first epoch sees other batches than the unbroken one.

    fairseq orders sentences of equal length by seed + epoch, but keeps the batches of the epoch
    that a process began with.
    """

    def build(_: Callable[..., Any]) -> Callable[..., Any]:
        def can_reuse_epoch_itr(self: Any, dataset: Any) -> bool:
            return False

        return can_reuse_epoch_itr

    patch(fairseq_task.FairseqTask, "can_reuse_epoch_itr", build)
