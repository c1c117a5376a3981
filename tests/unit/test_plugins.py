"""Models and losses of other packages: found, checked, and part of what results are made from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.models import ARCH_MODEL_REGISTRY
from peer_helpers import BOS, EOS, SIZES, batch, make_task, sentences
from test_pipeline_checks import checked
from test_pipeline_stages import NAT, run_of, trained

from fairseq_vqem.benchmark.signature import code_checksum, make_signature, plugin_checksums
from fairseq_vqem.benchmark.tables import _signature_line
from fairseq_vqem.errors import UserError
from fairseq_vqem.export.command import decoding_options
from fairseq_vqem.peers import CTCNAT, CTCNATLoss
from fairseq_vqem.peers.config import CTCNATConfig
from fairseq_vqem.peers.rules import Rules, check_criterion, rules_of
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.checks import check
from fairseq_vqem.pipeline.training import _other_origin
from fairseq_vqem.plugins import VARIABLE, code_of, plugin_of, plugins, use_plugins

__all__ = ["trained"]  # a fixture
EXAMPLES = Path(__file__).parents[2] / "examples"
SPLIT = {**NAT, "arch": "split_ctc", "criterion": "ctc_nat_loss"}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """On the path of modules, with no plugin in use."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("a_plugin"):
            del sys.modules[name]


@pytest.fixture
def split_ctc(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's class, in use."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.syspath_prepend(EXAMPLES)
    use_plugins(["own_model"])
    return ARCH_MODEL_REGISTRY["split_ctc"]


def make_split(kind: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    model = kind.build_model(CTCNATConfig(**{**SIZES, **options}), make_task())
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_modules_and_packages_are_imported_and_told_apart(folder: Path) -> None:
    (folder / "a_plugin_file.py").write_text("class Own: pass\n")
    package = folder / "a_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text("class Own: pass\n")
    use_plugins(["a_plugin_file", "a_plugin"])
    assert plugins() == ["a_plugin_file", "a_plugin"]
    use_plugins(["a_plugin"])
    assert plugins() == ["a_plugin_file", "a_plugin"]
    assert plugin_of(sys.modules["a_plugin_file"].Own) == "a_plugin_file"
    from a_plugin import models  # type: ignore[import-not-found]

    assert plugin_of(models.Own) == "a_plugin" and plugin_of(CTCNAT) is None
    assert code_of("a_plugin") == package and code_of("a_plugin_file").name == "a_plugin_file.py"


def test_a_missing_plugin_is_named_and_its_own_errors_stay(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no module a_plugin_of_nobody, .* PYTHONPATH"):
        use_plugins(["a_plugin_of_nobody"])
    os.environ[VARIABLE] = ""
    (folder / "a_plugin_broken.py").write_text("import a_library_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        use_plugins(["a_plugin_broken"])


def test_results_depend_on_the_code_of_plugins(folder: Path) -> None:
    path = folder / "a_plugin_changed.py"
    path.write_text("ONE = 1\n")
    assert make_signature(command=[]).plugins == {}
    use_plugins(["a_plugin_changed"])
    before = plugin_checksums()
    signature = make_signature(command=[])
    assert signature.plugins == before and set(before) == {"a_plugin_changed"}
    line = _signature_line({"plugins": before})
    assert f"a_plugin_changed {before['a_plugin_changed']}" in line
    code_checksum.cache_clear()
    path.write_text("ONE = 2\n")
    assert plugin_checksums() != before
    code_checksum.cache_clear()


def test_a_training_knows_the_code_of_its_own_plugin_alone(
    tmp_path: Path, trained: dict[str, Any], split_ctc: Any
) -> None:
    run = run_of(tmp_path, split=SPLIT)
    stages.train_student(run, "first")
    assert trained["origin"] == {"data": "abc"}
    stages.train_student(run, "split")
    assert trained["origin"] == {"data": "abc", "plugin": plugin_checksums()["own_model"]}
    told = _other_origin({"data": "abc", "plugin": "1"}, {"data": "abc", "plugin": "2"})
    assert told == "with another plugin"


@pytest.mark.parametrize(
    ("name", "value"),
    [("arch", "splitt_ctc"), ("criterion", "ctc_loss_of_mine"), ("task", "translation_of_mine")],
)
def test_unknown_names_are_refused_before_any_training(
    tmp_path: Path, split_ctc: Any, name: str, value: str
) -> None:
    run = checked(run_of(tmp_path, split=SPLIT))
    check(run)
    run.recipe.students["split"] = {**SPLIT, name: value}
    with pytest.raises(UserError, match=f"no {name} {value}, which 'split' has: .* plugins"):
        check(run)


def test_only_engines_that_know_a_model_take_it(tmp_path: Path, split_ctc: Any) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    run = checked(run_of(tmp_path, split=SPLIT))
    variants = {"v": {"student": "split", "engine": "exported"}}
    with pytest.raises(UserError, match="exported of 'v' cannot decode 'split'"):
        check(replace(run, recipe=replace(run.recipe, variants=variants)))
    translator: Any = type("Translator", (), {"models": [make_split(split_ctc)], "generator": None})
    with pytest.raises(UserError, match="Only vqem_transformer and ctc_nat"):
        decoding_options(translator)


def test_the_example_reads_each_sentence_by_itself_and_learns(split_ctc: Any) -> None:
    model = make_split(split_ctc)
    names = [name for name, _ in model.named_parameters()]
    assert any(name.startswith("split") for name in names)
    assert not any("encoder_attn" in name for name in names)
    sources = sentences(5)
    both = batch(sources, sources)
    output = model(**both["net_input"], target=both["target"])
    assert output.frames.sum(1).tolist() == [2 * (len(source) + 2) for source in sources]
    for row, source in enumerate(sources):
        one = batch([source], [source])
        alone = model(**one["net_input"], target=one["target"]).logits[0]
        assert torch.allclose(output.logits[row, : len(alone)], alone, atol=1e-5)
    criterion = CTCNATLoss(make_task(), 0.0)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        loss, words, _ = criterion(model.train(), both)
        losses.append(float(loss) / words)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]
    assert model.split.weight.grad.abs().sum() > 0


def test_a_class_may_have_rules_of_its_own(split_ctc: Any) -> None:
    model, criterion = make_split(split_ctc), CTCNATLoss(make_task(), 0.0)
    check_criterion(model, criterion)
    assert rules_of(model).name == "ctc_nat" and {BOS, EOS} == {model.bos, model.eos}

    class Own(split_ctc):  # type: ignore[misc]
        rules = Rules("own", dict, "own_loss")

    own = make_split(Own)
    assert rules_of(own).name == "own"
    with pytest.raises(UserError, match="own needs its own loss: pass --criterion own_loss"):
        check_criterion(own, criterion)
