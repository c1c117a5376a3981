"""Training in several processes, on CPU as well."""

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model

from fairseq_vqem.compat.patching import patch

logger = logging.getLogger(__name__)

_LAUNCHER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


def enable_cpu_data_parallel() -> None:
    """fairseq counts GPUs to know how many processes to start, so that on CPU it starts none.

    It fails with "0 available devices", or, given --distributed-init-method, ends at once as if
    all were well. DistributedDataParallel also refuses a device number for a model on CPU.
    """
    patch(distributed_utils, "call_main", _call_main_on_cpu)
    patch(distributed_fairseq_model, "DistributedDataParallel", _without_cpu_device)


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
    patch(distributed_utils, "infer_init_method", _with_launcher_world_size)
    patch(distributed_utils, "_infer_torch_distributed_launch_init", _with_any_device_count)


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
