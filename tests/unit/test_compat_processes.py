"""Work-arounds for several processes: the defect without them, and its absence with them."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fairseq.distributed import utils as distributed_utils
from fairseq.models import distributed_fairseq_model

from fairseq_vqem import compat


def training_config(**options: Any) -> Any:
    defaults = {
        "distributed_init_method": None,
        "distributed_world_size": 1,
        "distributed_rank": 0,
        "distributed_backend": "nccl",
        "distributed_port": -1,
        "distributed_no_spawn": False,
        "pipeline_model_parallel": False,
        "distributed_num_procs": 1,
        "device_id": 0,
        "tpu": False,
    }
    return Namespace(**{**defaults, **options})


@pytest.fixture
def no_gpu() -> Iterator[None]:
    with (
        mock.patch("torch.cuda.device_count", lambda: 0),
        mock.patch("torch.cuda.is_available", lambda: False),
    ):
        yield


@pytest.mark.usefixtures("no_gpu")
def test_torchrun_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(
        compat.processes._LAUNCHER_VARIABLES, ("localhost", "1", "2", "1"), strict=True
    ):
        monkeypatch.setenv(name, value)
    unconnected = training_config()
    compat.original(distributed_utils.infer_init_method)(unconnected)
    assert unconnected.distributed_init_method is None
    with pytest.raises(ZeroDivisionError):
        compat.original(distributed_utils._infer_torch_distributed_launch_init)(training_config())
    cfg = training_config()
    distributed_utils.infer_init_method(cfg)
    assert (cfg.distributed_init_method, cfg.distributed_world_size) == ("env://", 2)
    assert (cfg.distributed_rank, cfg.device_id, cfg.distributed_backend) == (1, 0, "gloo")
    assert cfg.distributed_no_spawn


@pytest.mark.usefixtures("no_gpu")
def test_spawning_on_cpu() -> None:
    def call(call_main: Any, **options: Any) -> Any:
        training = training_config(distributed_world_size=2, **options)
        cfg = Namespace(distributed_training=training, common=Namespace(cpu=True, tpu=False))
        with mock.patch("torch.multiprocessing.spawn") as spawn:
            call_main(cfg, print)
        return spawn.call_args.kwargs["nprocs"], training

    raw = compat.original(distributed_utils.call_main)
    with pytest.raises(AssertionError, match="0 available devices"):
        call(raw)
    assert call(raw, distributed_init_method="tcp://localhost:5")[0] == 0
    processes, training = call(distributed_utils.call_main)
    assert processes == 2
    assert training.distributed_backend == "gloo"
    assert training.distributed_init_method.startswith("tcp://localhost:")
    _, training = call(distributed_utils.call_main, distributed_port=77)
    assert training.distributed_init_method == "tcp://localhost:77"


def test_data_parallel_modules_on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch.distributed sets its own
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        options = {"module": torch.nn.Linear(2, 2), "device_ids": [0], "output_device": 0}
        wrap = distributed_fairseq_model.DistributedDataParallel
        with pytest.raises(ValueError, match="device_ids"):
            compat.original(wrap)(**options)
        assert wrap(**options)(torch.ones(1, 2)).shape == (1, 2)
    finally:
        torch.distributed.destroy_process_group()
