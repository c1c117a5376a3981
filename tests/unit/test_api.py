"""Translator: N sentences in, N out, in order; and the teacher that other tests borrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

from fairseq_vqem import Translator
from fairseq_vqem.corpora.binarise import binarise
from fairseq_vqem.corpora.files import write_lines
from fairseq_vqem.corpora.subwords import train_subwords
from fairseq_vqem.errors import UserError
from fairseq_vqem.export.standalone.translator import batches_by_length
from fairseq_vqem.generation.api import split_options

ANIMALS = ["cat", "dog", "cow", "fox", "hen"]
TIERE = ["Katze", "Hund", "Kuh", "Fuchs", "Huhn"]
PAIRS = [(f"the {a} sees the {b}", f"{x} sieht {y}") for a, x in zip(ANIMALS, TIERE, strict=True)
         for b, y in zip(ANIMALS, TIERE, strict=True)]  # fmt: skip
PAIRS += [(f"the {a}", x) for a, x in zip(ANIMALS, TIERE, strict=True)]
SPLITS = {"train": PAIRS, "valid": PAIRS[:3], "test": PAIRS[3:8]}
MAX_POSITIONS = 24


def make_data(folder: Path) -> Path:
    """Binarise PAIRS into `folder`/data."""
    for split, pairs in SPLITS.items():
        write_lines(folder / "text" / f"{split}.en", (pair[0] for pair in pairs))
        write_lines(folder / "text" / f"{split}.de", (pair[1] for pair in pairs))
    files = [folder / "text" / f"train.{language}" for language in ("en", "de")]
    subwords = train_subwords("sentencepiece", files, 32, folder)
    binarise(folder / "text", folder / "data", "en", "de", subwords, workers=1)
    return folder / "data"


def make_teacher(data: Path, updates: int = 250) -> Path:
    """Train a tiny AR model on PAIRS until it knows most of them, and save it as fairseq does."""
    torch.manual_seed(1)
    size = ["--encoder-embed-dim", "32", "--encoder-ffn-embed-dim", "64", "--encoder-layers", "1"]
    size += ["--decoder-embed-dim", "32", "--decoder-ffn-embed-dim", "64", "--decoder-layers", "1"]
    size += ["--encoder-attention-heads", "2", "--decoder-attention-heads", "2", "--dropout", "0"]
    words = [str(data), "--task", "translation", "-s", "en", "-t", "de", "--arch", "transformer"]
    words += [*size, "--max-source-positions", str(MAX_POSITIONS), "--share-all-embeddings"]
    config = convert_namespace_to_omegaconf(
        options.parse_args_and_arch(options.get_training_parser(), words)
    )
    task = tasks.setup_task(config.task)
    model = task.build_model(config.model)
    task.load_dataset("train")
    dataset = task.dataset("train")
    sample = dataset.collater([dataset[index] for index in range(len(dataset))])
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    for _ in range(updates):
        logits, _ = model(**sample["net_input"])
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), sample["target"], ignore_index=1
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    history = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}}
    state: dict[str, Any] = {
        "args": None,
        "cfg": OmegaConf.to_container(config),
        "model": model.state_dict(),
        "optimizer_history": [{**history, "num_updates": updates}],
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
    torch.save(state, data.parent / "teacher.pt")
    return data.parent / "teacher.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    make_teacher(make_data(folder))
    return folder


@pytest.fixture(scope="module")
def translator(folder: Path) -> Translator:
    return Translator.from_checkpoint(folder / "teacher.pt", folder / "data", beam=2, max_tokens=60)


@pytest.fixture(scope="module")
def alone(translator: Translator) -> dict[str, str]:
    """The translation of each source when it is translated by itself."""
    return {source: translator.translate([source])[0] for source, _ in PAIRS}


def test_translates_what_it_has_learnt(alone: dict[str, str]) -> None:
    assert sum(alone[source] == target for source, target in PAIRS) >= 0.8 * len(PAIRS)


@pytest.mark.parametrize("count", range(34))
def test_as_many_out_as_in_and_in_order(
    translator: Translator, alone: dict[str, str], count: int
) -> None:
    sources = [source for source, _ in (PAIRS * 2)[:count][::-1]]
    assert translator.translate(sources) == [alone[source] for source in sources]


def test_empty_and_unknown_lines(translator: Translator, alone: dict[str, str]) -> None:
    outputs = translator.translate(["", "the cat", "  \t", "猫 ☃ ~", "the dog", ""])
    expected = ["", alone["the cat"], "", alone["the dog"], ""]
    assert [outputs[index] for index in (0, 1, 2, 4, 5)] == expected
    assert len(outputs) == 6


def test_line_that_is_too_long_is_named(translator: Translator) -> None:
    with pytest.raises(UserError, match=r"Line 3 has \d+ subwords .* at most 24"):
        translator.translate(["the cat", "", "the cat " * 20])


def test_batch_gives_hypotheses_in_the_order_of_the_sentences(
    translator: Translator, alone: dict[str, str]
) -> None:
    sentences = ["the cat", "the dog sees the cat", "the fox"]
    hypotheses = translator.translate_batch(translator.encode(sentences))
    texts = [translator.decode(hypothesis["tokens"]) for hypothesis in hypotheses]
    assert texts == [alone[sentence] for sentence in sentences]
    assert all(float(hypothesis["score"]) < 0 for hypothesis in hypotheses)


def test_ensemble_and_half_precision(folder: Path) -> None:
    both = f"{folder / 'teacher.pt'}:{folder / 'teacher.pt'}"
    ensemble = Translator.from_checkpoint(both, folder / "data", beam=2, dtype="bfloat16")
    assert len(ensemble.models) == 2
    assert next(ensemble.models[1].parameters()).dtype is torch.bfloat16
    assert len(ensemble.translate(["the cow", "", "the cat"])) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_translates(folder: Path, alone: dict[str, str], dtype: str) -> None:
    half = Translator.from_checkpoint(
        folder / "teacher.pt", folder / "data", beam=2, max_tokens=60, dtype=dtype
    )
    found = half.translate([source for source, _ in PAIRS])
    equal = [text == alone[source] for text, (source, _) in zip(found, PAIRS, strict=True)]
    assert sum(equal) >= 0.8 * len(PAIRS)


def test_options_reach_generator_and_task(folder: Path) -> None:
    translator = Translator.from_checkpoint(
        folder / "teacher.pt", folder / "data", beam=3, task_overrides={"max_source_positions": 6}
    )
    assert translator.generator.beam_size == 3
    assert translator.max_source_tokens == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beem": 4}, "no option beem"),
        ({"beam": "many"}, "wrong value: beam: Value 'many' [^\n]* Integer.$"),
        ({"beam": 0}, "beam is 0"),
        ({"device": "mps"}, "Unknown device 'mps'"),
        ({"task_overrides": {"latent_beam": 4}}, "option latent_beam"),
        ({"dtype": "float8"}, "Unknown dtype 'float8'"),
        ({"device": "abacus"}, "Unknown device"),
    ],
)
def test_bad_options_are_user_errors(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Translator.from_checkpoint(folder / "teacher.pt", folder / "data", **options)


def test_bad_files_are_user_errors(folder: Path, tmp_path: Path) -> None:
    content = (folder / "teacher.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"none.pt does not exist"):
        Translator.from_checkpoint(tmp_path / "none.pt", folder / "data")
    for name in ("cut.pt", "empty.pt"):
        with pytest.raises(UserError, match=f"{name} is .*damaged"):
            Translator.from_checkpoint(tmp_path / name, folder / "data")
    with pytest.raises(UserError, match=r"data directory .* does not exist"):
        Translator.from_checkpoint(folder / "teacher.pt", tmp_path / "data")
    with pytest.raises(UserError, match=r"lacks dict.en.txt"):
        Translator.from_checkpoint(folder / "teacher.pt", tmp_path)


def test_checkpoint_of_other_data_is_a_user_error(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "data").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for language in ("en", "de"):
        (tmp_path / f"dict.{language}.txt").write_text("only 1\nthree 1\nwords 1\n")
    with pytest.raises(UserError, match="does not fit the dictionaries"):
        Translator.from_checkpoint(folder / "teacher.pt", tmp_path)


def test_batches_are_full_sorted_and_complete() -> None:
    lengths = [3, 9, 1, 5, 5, 20]
    batches = list(batches_by_length(lengths, 12))
    assert batches == [[5], [1], [3, 4], [0, 2]]
    assert list(batches_by_length([], 12)) == []


def test_options_are_divided() -> None:
    mixed = {"beam": 4, "latent_beam": 2, "rescore": "teacher", "lenpen": 0.6}
    generation, task = split_options(mixed)
    assert generation == {"beam": 4, "lenpen": 0.6}
    assert task == {"latent_beam": 2, "rescore": "teacher"}


def test_options_that_latents_do_not_read_are_refused(tmp_path: Path) -> None:
    """fairseq-generate always has a beam, but here somebody wanted one."""
    from tiny_student import make_student

    data = make_data(tmp_path)
    student = make_student(data, tmp_path / "student.pt")
    with pytest.raises(UserError, match="drop --iter-decode-max-iter 4"):
        Translator.from_checkpoint(student, data, iter_decode_max_iter=4)
    for unread in ({"beam": 4}, {"max_len_b": 3}, {"sampling": True, "temperature": 2.0}):
        first = min(unread).replace("_", ".")
        with pytest.raises(UserError, match=f"does not read (--)?{first}"):
            Translator.from_checkpoint(student, data, **unread)
    assert Translator.from_checkpoint(student, data, beam=5, iter_decode_eos_penalty=0.0)


def test_options_of_the_other_kind_of_search_are_refused(folder: Path) -> None:
    data, teacher = folder / "data", folder / "teacher.pt"
    with pytest.raises(UserError, match="autoregressive model does not read iter_decode_with_beam"):
        Translator.from_checkpoint(teacher, data, beam=2, iter_decode_with_beam=10)


def test_a_checkpoint_of_an_unknown_task_is_named(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "teacher.pt", weights_only=False)
    state["cfg"]["task"]["_name"] = "another_task"
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="of the task 'another_task', which is not supported"):
        Translator.from_checkpoint(tmp_path / "other.pt", folder / "data")
