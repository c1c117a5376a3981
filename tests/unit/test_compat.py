"""Each work-around: the defect without it, and its absence with it."""

import contextlib
import io
import logging
import os
import random
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, file_io, iterative_refinement_generator, scoring, utils
from fairseq.data import Dictionary, data_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import meters
from fairseq.models import distributed_fairseq_model
from fairseq.models.transformer import TransformerModel, base_architecture
from fairseq_cli import generate as generate_cli
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import fairseq_vqem
from fairseq_vqem import compat
from fairseq_vqem.errors import UserError

PACKAGE = Path(fairseq_vqem.__file__).parent
TINY = [
    *("--arch", "transformer", "--encoder-layers", "1", "--decoder-layers", "1"),
    *("--encoder-embed-dim", "8", "--decoder-embed-dim", "8", "--encoder-ffn-embed-dim", "8"),
    *("--decoder-ffn-embed-dim", "8", "--encoder-attention-heads", "2"),
    *("--decoder-attention-heads", "2", "--optimizer", "adam", "--lr", "0.01", "--cpu"),
    *("--max-tokens", "60", "--no-progress-bar", "--num-workers", "0", "--no-epoch-checkpoints"),
]


def command(name: str, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    code = f"from fairseq_cli.{name} import cli_main; cli_main()"
    return run([sys.executable, "-c", code], *args, check=check)


def run(start: list[str], *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
    line = [*start, *map(str, args)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=120)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty binarised sentence pairs and a tiny model's checkpoints, one of them mid-epoch."""
    folder = tmp_path_factory.mktemp("compat")
    rng = random.Random(0)
    for side in "st":
        lines = [" ".join(rng.choices("abcdefgh", k=rng.randint(2, 8))) for _ in range(20)]
        (folder / f"data.{side}").write_text("\n".join(lines) + "\n")
    prefixes = [v for split in ("train", "valid", "test") for v in (f"--{split}pref", "data")]
    with contextlib.chdir(folder):
        command("preprocess", "-s", "s", "-t", "t", *prefixes, "--destdir", "bin")
    train(folder, "--max-update", 3, "--save-interval-updates", 2, "--max-epoch", 1)
    return folder


def train(folder: Path, *args: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    places = ("--user-dir", PACKAGE, "--save-dir", folder / "ar")
    return command("train", folder / "bin", *TINY, *places, *args, check=check)


def generate(folder: Path, path: Path, *args: object) -> subprocess.CompletedProcess[str]:
    shape = ("--cpu", "--beam", 1, "--max-len-b", 9, "--user-dir", PACKAGE)
    return command("generate", folder / "bin", "--path", path, *shape, *args, check=False)


# --- checkpoints -------------------------------------------------------------------------------


def test_torch_refuses_namespaces_that_the_plugin_allows(work: Path) -> None:
    path = work / "ar/checkpoint_1_2.pt"
    code = f"import torch; torch.load({str(path)!r})"
    bare = run([sys.executable, "-c", code], check=False)
    assert "argparse.Namespace was not an allowed global" in bare.stderr
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    state = torch.load(path, weights_only=True)
    assert isinstance(state["cfg"]["model"], Namespace)


def test_a_run_resumes_in_the_middle_of_an_epoch(work: Path) -> None:
    state = checkpoint_utils.load_checkpoint_to_cpu(str(work / "ar/checkpoint_1_2.pt"))
    assert state["extra_state"]["train_iterator"]["iterations_in_epoch"] == 2
    resumed = train(
        work, "--restore-file", work / "ar/checkpoint_1_2.pt", "--max-update", 3, "--no-save"
    )
    assert "(epoch 1 @ 2 updates)" in resumed.stderr + resumed.stdout


@pytest.mark.parametrize(
    "value",
    [np.float64(1.5), np.float32(2), np.int64(3), np.bool_(True), np.arange(3), np.ones(2, "f2")],
)
def test_numpy_values_survive_safe_loading(value: Any) -> None:
    assert np.array_equal(reload({"value": value})["value"], value)


def test_the_state_sent_to_other_ranks_survives_safe_loading(work: Path) -> None:
    state = checkpoint_utils.load_checkpoint_to_cpu(str(work / "ar/checkpoint_last.pt"))
    tensors: list[torch.Tensor] = []
    sent = distributed_utils._split_tensors_from_obj(state, tensors)
    received = reload(sent)
    assert received["cfg"].task == state["cfg"].task
    assert received["cfg"].model == state["cfg"].model
    reload([{"size": t.size(), "dtype": t.dtype, "device": t.device} for t in tensors])


def reload(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class CountMeter(meters.Meter):
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.count = state_dict["count"]


def test_custom_meters_can_be_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = meters.MetersDict()
    saved.add_meter("count", CountMeter(), 1)
    saved["count"].count = 7
    restored = meters.MetersDict()
    with pytest.raises(KeyError, match="CountMeter"):
        restored.load_state_dict(saved.state_dict())
    monkeypatch.setattr(meters, "CountMeter", CountMeter, raising=False)  # undone afterwards
    assert compat.allow_in_checkpoints(CountMeter) is CountMeter
    restored.load_state_dict(saved.state_dict())
    assert restored["count"].count == 7
    assert isinstance(reload(CountMeter()), CountMeter)
    with pytest.raises(ValueError, match="AverageMeter"):
        compat.allow_in_checkpoints(type("AverageMeter", (meters.Meter,), {}))


def test_bad_checkpoints_are_explained(work: Path, tmp_path: Path) -> None:
    load = checkpoint_utils.load_checkpoint_to_cpu
    good = (work / "ar/checkpoint_last.pt").read_bytes()
    bad = tmp_path / "bad.pt"
    damaged = [b"", b"PK\x03\x04 half", b"hello" * 50, good[: len(good) // 2], good[:-30]]
    for content in damaged:
        bad.write_bytes(content)
        with pytest.raises(Exception) as raw:
            compat.original(load)(str(bad))
        assert not isinstance(raw.value, UserError)
        with pytest.raises(UserError, match=r"bad\.pt is truncated"):
            load(str(bad))
    for foreign in ({"weight": torch.ones(2)}, [1], torch.ones(2)):
        torch.save(foreign, bad)
        with pytest.raises(UserError, match=r"bad\.pt is not a fairseq checkpoint"):
            load(str(bad))
    torch.save({"model": Path}, bad)
    with pytest.raises(UserError, match=r"not known to be safe \(pathlib\.Path\)"):
        load(str(bad))
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        load(str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match=r"none\.pt does not exist"):
        checkpoint_utils.load_model_ensemble([str(tmp_path / "none.pt")])


def test_other_errors_on_loading_pass_unchanged(work: Path) -> None:
    path = str(work / "ar/checkpoint_last.pt")
    with (
        mock.patch.object(checkpoint_utils, "_upgrade_state_dict", side_effect=KeyError("bug")),
        pytest.raises(KeyError, match="bug"),
    ):
        checkpoint_utils.load_checkpoint_to_cpu(path)


def test_a_missing_restore_file_is_an_error(tmp_path: Path) -> None:
    cfg = Namespace(restore_file=str(tmp_path / "typo.pt"))
    with pytest.raises(UserError, match=r"typo\.pt does not exist; check --restore-file"):
        checkpoint_utils.load_checkpoint(cfg, SimpleNamespace(checkpoint_suffix=""))


def test_the_error_reaches_the_user_as_one_line(work: Path, tmp_path: Path) -> None:
    done = generate(work, tmp_path / "none.pt")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("fairseq_vqem: error: The checkpoint ")
    assert "Traceback" not in done.stderr
    done = train(work, "--restore-file", tmp_path / "typo.pt", check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_copies_of_checkpoints_are_atomic(tmp_path: Path) -> None:
    source, target = tmp_path / "new.pt", tmp_path / "checkpoint_last.pt"
    source.write_bytes(b"new")

    def copy_half(_: str, destination: str) -> None:
        Path(destination).write_bytes(b"ne")
        raise KeyboardInterrupt

    for copy, left in (
        (file_io.PathManager.copy, b"old"),
        (compat.original(file_io.PathManager.copy), b"ne"),
    ):
        target.write_bytes(b"old")
        with (
            mock.patch("shutil.copyfile", copy_half),
            pytest.raises(KeyboardInterrupt),
        ):
            copy(str(source), str(target), overwrite=True)
        assert target.read_bytes() == left
    assert file_io.PathManager.copy(str(source), str(target), overwrite=True)
    assert target.read_bytes() == b"new"


def test_a_first_save_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint1.pt"
    path.write_bytes(b"old")
    with (
        mock.patch("torch.save", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        checkpoint_utils.torch_persistent_save({}, str(path))
    assert path.read_bytes() == b"old"


class FlakyFile(io.BytesIO):
    """Fails at its fifth write, once."""

    writes = 0

    def write(self, data: Any) -> int:
        self.writes += 1
        if self.writes == 5:
            raise OSError("disk full")
        return super().write(data)


def test_a_save_that_is_tried_again_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    save = checkpoint_utils._torch_persistent_save
    flaky = FlakyFile()
    compat.original(save)({"a": torch.arange(999)}, flaky)
    flaky.seek(0)
    with pytest.raises(RuntimeError, match="PytorchStreamReader"):
        torch.load(flaky)
    flaky = FlakyFile()
    save({"a": torch.arange(999)}, flaky)
    flaky.seek(0)
    assert torch.equal(torch.load(flaky)["a"], torch.arange(999))
    always = mock.patch("torch.save", side_effect=OSError("disk full"))
    with always as attempts, pytest.raises(OSError, match="disk full"):
        save({}, io.BytesIO())
    assert attempts.call_count == 3


# --- batches -----------------------------------------------------------------------------------


def batch(function: Any, sizes: list[int], **limits: int | None) -> list[list[int]]:
    vector = np.array(sizes, dtype=np.int64)
    batches = function(
        np.arange(len(sizes)), num_tokens_fn=sizes.__getitem__, num_tokens_vec=vector, **limits
    )
    return [part.tolist() for part in batches]


def test_fairseq_drops_the_last_batch() -> None:
    limits: dict[str, int | None] = {"max_tokens": 1000, "required_batch_size_multiple": 8}
    raw = compat.original(data_utils.batch_by_size)
    assert [len(b) for b in batch(raw, [5] * 20, **limits)] == [16]
    assert [len(b) for b in batch(data_utils.batch_by_size, [5] * 20, **limits)] == [16, 4]
    with pytest.raises(IndexError):
        batch(raw, [], **limits)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 30), max_size=60),
    st.none() | st.integers(30, 200),
    st.none() | st.integers(1, 20),
    st.integers(1, 9),
)
def test_every_index_comes_out_once(
    sizes: list[int], max_tokens: int | None, max_sentences: int | None, multiple: int
) -> None:
    limits = {"max_tokens": max_tokens, "max_sentences": max_sentences}
    for vector in (True, False):
        batches = data_utils.batch_by_size(
            iter(range(len(sizes))),
            num_tokens_fn=sizes.__getitem__,
            num_tokens_vec=np.array(sizes, dtype=np.int64) if vector else None,
            required_batch_size_multiple=multiple,
            **limits,
        )
        assert [i for part in batches for i in part.tolist()] == list(range(len(sizes)))
        for part in batches:
            longest = max(sizes[i] for i in part)
            assert max_tokens is None or len(part) * longest <= max_tokens
            assert max_sentences is None or len(part) <= max_sentences
            assert len(part) < multiple or len(part) % multiple == 0


# --- generation --------------------------------------------------------------------------------


def tiny_teacher(dictionary: Dictionary, **options: Any) -> TransformerModel:
    torch.manual_seed(3)
    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 1, "embed_dim": 8, "attention_heads": 2}.items()
    }
    args = Namespace(**sizes, encoder_ffn_embed_dim=8, decoder_ffn_embed_dim=8, **options)
    base_architecture(args)
    args.max_source_positions = args.max_target_positions = 64
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return TransformerModel.build_model(args, task).eval()


def rerank_problem() -> tuple[Any, TransformerModel, Any, list[torch.Tensor], list[torch.Tensor]]:
    dictionary = Dictionary()
    for symbol in "abcdef":
        dictionary.add_symbol(symbol)
    generator = iterative_refinement_generator.IterativeRefinementGenerator(dictionary)
    teacher = tiny_teacher(dictionary)
    pad = dictionary.pad()
    source = torch.tensor([[pad, 4, 5, 2], [6, 7, 8, 2]])
    bodies = [[4], [5, 6, 7], [8, 9], [4, 4, 4, 4]]
    hypotheses = [torch.tensor([0, *body, 2]) for body in bodies]
    return generator, teacher, [source, torch.tensor([3, 4])], hypotheses, list(source)


def expected_score(
    teacher: TransformerModel, source: torch.Tensor, hypothesis: torch.Tensor
) -> float:
    """The teacher's mean log-probability, one sentence and one token at a time."""
    source = source[source != 1].unsqueeze(0)
    encoded = teacher.encoder(source, torch.tensor([source.size(1)]))
    prefix, total = [2], 0.0
    for token in hypothesis[1:].tolist():
        logits = teacher.decoder(torch.tensor([prefix]), encoder_out=encoded)[0][0, -1]
        total += float(torch.log_softmax(logits.double(), 0)[token])
        prefix.append(token)
    return total / (len(prefix) - 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float", 1e-5), ("half", 5e-3)])
def test_rerank_equals_an_independent_computation(dtype: str, tolerance: float) -> None:
    generator, teacher, inputs, hypotheses, sources = rerank_problem()
    with torch.no_grad():
        expected = [
            expected_score(teacher, sources[i // 2], hypothesis)
            for i, hypothesis in enumerate(hypotheses)
        ]
    getattr(teacher, dtype)()
    finalized = [[{"tokens": tokens.clone(), "score": None}] for tokens in hypotheses]
    scores = [c[0]["score"] for c in generator.rerank(teacher, finalized, inputs, 2)]
    assert [float(score) for score in scores] == pytest.approx(expected, abs=tolerance)
    assert all(score.dtype == torch.float32 for score in scores)
    kept = zip(finalized, hypotheses, strict=True)
    assert all(torch.equal(c[0]["tokens"], tokens) for c, tokens in kept)


def test_fairseq_rerank_fails() -> None:
    generator, teacher, inputs, hypotheses, _ = rerank_problem()
    finalized = [[{"tokens": tokens}] for tokens in hypotheses]
    raw = compat.original(type(generator).rerank)
    with pytest.raises(AttributeError, match="'dict' object has no attribute 'encoder_out'"):
        raw(generator, teacher, finalized, inputs, 2)


def test_the_generation_timer_waits_for_the_gpu() -> None:
    assert generate_cli.StopwatchMeter is compat.SynchronisedStopwatch
    ours, theirs = compat.SynchronisedStopwatch, meters.StopwatchMeter
    for initialised, meter, expected in ((True, ours, 2), (False, ours, 0), (True, theirs, 0)):
        timer = meter()
        with mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            is_initialized=mock.Mock(return_value=initialised),
            synchronize=mock.DEFAULT,
        ) as mocked:
            timer.start()
            timer.stop(5)
        assert mocked["synchronize"].call_count == expected
        assert timer.n == 5
        assert timer.sum > 0


def test_every_sentence_is_translated_and_scored_with_sacrebleu(work: Path) -> None:
    done = generate(work, work / "ar/checkpoint_last.pt", "--sacrebleu")
    assert done.returncode == 0, done.stderr[-2000:]
    assert sum(line.startswith("H-") for line in done.stdout.splitlines()) == 20
    summary = done.stdout.splitlines()[-1]
    assert "BLEU = " in summary
    assert "BLEU4" not in summary


def scoring_config(name: str) -> Any:
    return OmegaConf.create({"generation": {"sacrebleu": True}, "scoring": {"_name": name}})


def test_the_sacrebleu_flag_and_other_scorers() -> None:
    dictionary = Dictionary()
    assert not hasattr(scoring.build_scorer("bleu", dictionary), "add_string")
    for name in ("bleu", "sacrebleu"):
        cfg = scoring_config(name)
        compat.generation._score_with_sacrebleu(cfg)
        assert cfg.scoring._name == "sacrebleu"
    cfg = scoring_config("bleu")
    compat.generation._score_with_sacrebleu(cfg)
    scorer = scoring.build_scorer(cfg.scoring, dictionary)
    scorer.add_string("a b c d e", "a b c d e")
    assert "BLEU = 100.00" in scorer.result_string()
    with pytest.raises(UserError, match="--sacrebleu contradicts --scoring chrf"):
        compat.generation._score_with_sacrebleu(scoring_config("chrf"))


# --- several processes -------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_two_processes_train_and_resume(work: Path, tmp_path: Path, backend: str) -> None:
    start: dict[str, list[str]] = {
        "spawn": [sys.executable, "-c", "from fairseq_cli.train import cli_main; cli_main()"],
        "torchrun": [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", str(Path(sys.executable).parent / "fairseq-train")),
        ],
    }
    shape = ("--user-dir", PACKAGE, "--ddp-backend", backend, "--save-dir", tmp_path)
    for updates, launcher in ((1, "spawn"), (2, "torchrun")):
        size = ("--distributed-world-size", 2) if launcher == "spawn" else ()
        run(start[launcher], work / "bin", *TINY, *shape, *size, "--max-update", updates)
        state = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint_last.pt"))
        assert state["optimizer_history"][-1]["num_updates"] == updates


# --- start and messages ------------------------------------------------------------------------


def test_the_own_user_dir_by_any_path(tmp_path: Path) -> None:
    link = tmp_path / "fairseq_vqem"
    link.symlink_to(PACKAGE)
    raw = compat.original(utils.import_user_module)
    with pytest.raises(ImportError, match="not globally unique"):
        raw(Namespace(user_dir=str(link)))
    before = sys.modules["fairseq_vqem"]
    for path in (str(link), str(PACKAGE), f"{PACKAGE}/", os.path.relpath(PACKAGE)):
        utils.import_user_module(Namespace(user_dir=path))
    assert sys.modules["fairseq_vqem"] is before
    utils.import_user_module(Namespace(user_dir=None))


def test_another_copy_as_user_dir(tmp_path: Path) -> None:
    (tmp_path / "fairseq_vqem").mkdir()
    with pytest.raises(UserError, match="another copy of fairseq_vqem"):
        utils.import_user_module(Namespace(user_dir=str(tmp_path / "fairseq_vqem")))
    with pytest.raises(FileNotFoundError):
        utils.import_user_module(Namespace(user_dir=str(tmp_path / "none/fairseq_vqem")))


def show(error: BaseException, capsys: pytest.CaptureFixture[str]) -> tuple[str, bool]:
    previous = mock.Mock(spec=[])
    with mock.patch("sys.excepthook", previous):
        compat.install_error_hook()
        compat.install_error_hook()
        sys.excepthook(type(error), error, None)
    return capsys.readouterr().err, previous.called


def test_the_error_hook(capsys: pytest.CaptureFixture[str]) -> None:
    line = "fairseq_vqem: error: mend it.\n"
    assert show(UserError("mend it."), capsys) == (line, False)
    assert show(ValueError("a bug"), capsys) == ("", True)
    trace = "\n\n-- Process 1 terminated with the following error:\nTraceback ...\n"
    spawned = torch.multiprocessing.ProcessRaisedException
    ours = spawned(f"{trace}fairseq_vqem.errors.UserError: mend it.\n", 1, 2)
    assert show(ours, capsys) == (line, False)
    assert show(spawned(f"{trace}ValueError: a bug\n", 1, 2), capsys) == ("", True)
    loader = UserError("Caught UserError in DataLoader worker process 0.\n" + str(ours).strip())
    assert show(loader, capsys) == (line, False)


def test_the_error_hook_sees_through_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    hidden = Exception("Cannot load model parameters from checkpoint")
    hidden.__context__ = UserError("mend it.")
    assert show(hidden, capsys) == ("fairseq_vqem: error: mend it.\n", False)
    hidden.__context__ = KeyError("weight")
    assert show(hidden, capsys) == ("", True)


def test_apply_twice_changes_nothing() -> None:
    names = [(data_utils, "batch_by_size"), (checkpoint_utils, "load_checkpoint_to_cpu")]
    names += [(generate_cli, "_main"), (generate_cli, "StopwatchMeter")]
    before = [getattr(owner, name) for owner, name in names]
    hook = sys.excepthook
    compat.apply()
    assert [getattr(owner, name) for owner, name in names] == before
    assert sys.excepthook is hook


def test_importing_leaves_logging_alone() -> None:
    """fairseq's import alone makes the root logger print debug messages of every library."""
    script = "import logging, {}; print(logging.getLogger().level, logging.getLogger().handlers)"

    def level_after(module: str) -> str:
        command = [sys.executable, "-c", script.format(module)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert level_after("fairseq_vqem") == f"{logging.WARNING} []"
    assert level_after("fairseq.models") != f"{logging.WARNING} []"
