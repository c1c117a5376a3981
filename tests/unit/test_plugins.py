"""Models and losses of other packages: found, checked, and part of what results are made from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.dataclass.configs import GenerationConfig
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, ARCH_MODEL_REGISTRY
from omegaconf import OmegaConf
from peer_helpers import BOS, EOS, SIZES, batch, make_task, sentences
from test_pipeline_checks import checked
from test_pipeline_stages import NAT, run_of, trained

from fairseq_vqem.benchmark.engine_kinds import ENGINES, check_options
from fairseq_vqem.benchmark.signature import code_checksum, make_signature, plugin_checksums
from fairseq_vqem.benchmark.tables import _signature_line
from fairseq_vqem.errors import UserError
from fairseq_vqem.export.command import decoding_options
from fairseq_vqem.generation.parts import is_parallel
from fairseq_vqem.models.vqem_transformer import VQEMTransformer
from fairseq_vqem.peers import CTCNATLoss
from fairseq_vqem.peers.config import CTCNATConfig
from fairseq_vqem.peers.rules import Rules, check_criterion, rules_of
from fairseq_vqem.pipeline import stages
from fairseq_vqem.pipeline.checks import check
from fairseq_vqem.pipeline.training import PLUGIN, _other_origin
from fairseq_vqem.plugins import VARIABLE, code_of, plugins, plugins_of, use_plugins

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
    assert code_of("a_plugin") == package and code_of("a_plugin_file").name == "a_plugin_file.py"
    (package / "register.py").write_text("")
    use_plugins(["a_plugin.register"])
    assert code_of("a_plugin.register") == package  # with whatever it imports


def test_a_missing_plugin_is_named_and_its_own_errors_stay(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no module a_plugin_of_nobody, .* PYTHONPATH"):
        use_plugins(["a_plugin_of_nobody"])
    (folder / "a_plugin_without_init").mkdir()
    with pytest.raises(UserError, match="a_plugin_without_init is a folder without __init__"):
        use_plugins(["a_plugin_without_init"])
    (folder / "a_plugin_broken.py").write_text("import a_library_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        use_plugins(["a_plugin_broken"])
    assert not plugins()  # no process that is started later fails for it


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
    known = {"data": "abc", PLUGIN: plugin_checksums()["own_model"]}
    assert trained["origin"] == known
    common = {"arch": "split_ctc", "criterion": "ctc_nat_loss"}  # of all models
    stages.train_student(replace(run, recipe=replace(run.recipe, common=common)), "first")
    assert trained["origin"] == {"data": "abc"}  # which has an architecture of its own
    own = {name: value for name, value in NAT.items() if name != "arch"}
    run = run_of(tmp_path, own=own)
    run = replace(run, recipe=replace(run.recipe, common=common, teacher={"max_update": 3}))
    stages.train_student(run, "own")
    assert trained["origin"] == known
    stages.train_teacher(run)
    assert trained["origin"] == known
    told = _other_origin(known, {**known, PLUGIN: "2"})
    assert told == "with another version of its plugin"


def test_an_architecture_of_a_plugin_is_its_code_too(folder: Path) -> None:
    (folder / "a_plugin_size.py").write_text(
        "from fairseq.models import register_model_architecture\n"
        "@register_model_architecture('transformer', 'a_plugin_transformer')\n"
        "def size(args): args.dropout = 0.3\n"
    )
    use_plugins(["a_plugin_size"])
    assert plugins_of({"arch": "a_plugin_transformer"}) == ["a_plugin_size"]
    assert plugins_of({"arch": "transformer", "task": "translation"}) == []


def test_a_task_built_on_another_has_its_options_of_decoding(tmp_path: Path, folder: Path) -> None:
    (folder / "a_plugin_task.py").write_text(
        "from fairseq.tasks import register_task\n"
        "from fairseq_vqem.tasks.translation_nat import TranslationNATConfig, TranslationNATTask\n"
        "@register_task('a_plugin_nat', dataclass=TranslationNATConfig)\n"
        "class OwnTask(TranslationNATTask): pass\n"
    )
    use_plugins(["a_plugin_task"])
    own = {**NAT, "task": "a_plugin_nat", "remove_repeats": True}
    run = run_of(tmp_path, own=own)
    assert stages.systems(run)["own"].options == {"remove_repeats": True}
    assert is_parallel("a_plugin_nat") and not is_parallel("translation")
    variants = {"v": {"student": "own", "beam": 4}}
    with pytest.raises(UserError, match="a parallel model does not read beam"):
        check(checked(replace(run, recipe=replace(run.recipe, variants=variants))))


def test_a_checkpoint_of_an_unknown_model_asks_for_its_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"task 'a_task_of_nobody', .* {VARIABLE}"):
        check_options({}, "a_task_of_nobody")
    name, path = "a_model_of_nobody", tmp_path / "model.pt"
    model = {"_name": name, "arch": name}
    torch.save({"cfg": {"model": model, "task": {}}, "model": {}, "best_loss": 0.0}, path)
    state = {"cfg": OmegaConf.create({"model": model, "task": {}}), "model": {}}
    with pytest.raises(UserError, match=f"no model 'a_model_of_nobody' here; .* {VARIABLE}"):
        load_model_ensemble_and_task([str(path)], task=make_task(), state=state)


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
    run.recipe.students["split"] = {**SPLIT, "criterion": "nat_loss"}
    with pytest.raises(UserError, match="ctc_nat needs its own loss: pass --criterion ctc_nat"):
        check(run)


@pytest.mark.parametrize("engine", ["exported", "ctranslate2"])
def test_only_engines_that_know_a_model_take_it(
    tmp_path: Path, split_ctc: Any, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    for package in ENGINES[engine].packages:
        pytest.importorskip(package)
    known = "ctc_nat" if engine == "exported" else "transformer"
    task = "translation_nat" if engine == "exported" else "translation"
    run = checked(run_of(tmp_path, own={"task": task, "arch": f"{known}_own", "max_update": 1}))
    variants = {"v": {"student": "own", "engine": engine}}
    run = replace(run, recipe=replace(run.recipe, variants=variants))
    monkeypatch.setitem(ARCH_MODEL_NAME_REGISTRY, f"{known}_own", known)
    check(run)
    monkeypatch.setitem(ARCH_MODEL_NAME_REGISTRY, f"{known}_own", f"{known}_own")
    with pytest.raises(UserError, match=f"{engine} of 'v' cannot decode 'own'"):
        check(run)


def test_another_models_pass_is_not_exported(split_ctc: Any, tiny: Any) -> None:
    translator: Any = type("Translator", (), {"models": [make_split(split_ctc)], "generator": None})
    with pytest.raises(UserError, match="Only vqem_transformer, ctc_nat and dag_nat"):
        decoding_options(translator)

    class Own(VQEMTransformer):
        pass

    task, student = tiny.task(), tiny.model()
    translator.models, translator.max_source_tokens = [student], 9
    translator.generator = task.build_generator([student], OmegaConf.structured(GenerationConfig))
    decoding_options(translator)
    student.__class__ = Own
    with pytest.raises(UserError, match="Own is of another package and cannot be exported"):
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
