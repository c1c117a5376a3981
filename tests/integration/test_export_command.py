"""``fairseq-vqem export`` through the command line, and its folder without fairseq."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from workshop import EXAMPLES, Outcome, Workshop

pytest.importorskip("onnx", reason="needs pip install 'fairseq_vqem[export]'")
pytest.importorskip("onnxruntime", reason="needs pip install 'fairseq_vqem[export]'")

from fairseq_vqem import Translator
from fairseq_vqem.cli import main
from fairseq_vqem.corpora.sample import load_sample
from fairseq_vqem.errors import UserError
from fairseq_vqem.export.artefact import write_program
from fairseq_vqem.export.command import export
from fairseq_vqem.export.standalone import StandaloneError, StandaloneTranslator
from fairseq_vqem.export.standalone.manifest import FORMAT_VERSION, manifest_checksum

# Runs a copy of standalone.pyz where some packages cannot be imported.
WITHOUT = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError("hidden: " + name, name=name)
sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PLUGIN = ("fairseq", "fairseq_vqem", "torch", "onnx")


def export_words(made: Workshop, out: Path, *words: object, checkpoint: object = "") -> list[str]:
    named = ("--checkpoint", checkpoint or made.student, "--data", made.data, "--out", out)
    return ["export", *map(str, named), *map(str, words)]


def standalone(program: Path, *words: object, stdin: str, missing: tuple[str, ...]) -> Outcome:
    """Run a copy of standalone.pyz without the packages ``missing``."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing), str(program), *map(str, words)],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment,
        cwd=program.parent,
        timeout=300,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def artefact(workshop: Workshop, student: Path) -> Path:
    out = workshop.root / "exported"
    words = export_words(workshop, out, "--latent-beam", 2, "--remove-repeats")
    outcome = workshop.run("fairseq_vqem.cli", *words)
    assert outcome.status == 0, outcome.text
    assert "100.0% of the tokens" in outcome.output
    return out


@pytest.mark.parametrize("count", [1, 7, 33])
def test_tokens_are_those_of_fairseq_generate(
    workshop: Workshop, artefact: Path, count: int
) -> None:
    outcome = workshop.generate(count, "--latent-beam", 2, "--remove-repeats", "--batch-size", 5)
    expected = outcome.hypotheses()
    translator = StandaloneTranslator(artefact, threads=1)
    sources = translator.encode(workshop.sources(count))
    found = [translator.target.pieces(ids) for ids in translator.translate_ids(sources)]
    assert {number: [pieces] for number, pieces in enumerate(found)} == expected


def test_text_is_that_of_the_translator(workshop: Workshop, artefact: Path) -> None:
    lines = [source for source, _ in load_sample()["test"] if len(source.split()) < 20]
    lines = ["", *lines[:300], " \t", "snow ☃ unknown", *lines[300:550]]
    options = {"latent_beam": 2, "remove_repeats": True}
    expected = Translator.from_checkpoint(workshop.student, workshop.data, task_overrides=options)
    found = StandaloneTranslator(artefact, threads=1).translate(lines)
    assert len(found) > 500 and found == expected.translate(lines)


def test_the_one_file_is_enough(workshop: Workshop, artefact: Path, tmp_path: Path) -> None:
    program = tmp_path / "elsewhere" / "translate.pyz"
    program.parent.mkdir()
    shutil.copyfile(artefact / "standalone.pyz", program)
    lines = workshop.sources(33)
    text = "".join(f"{line}\n" for line in lines)
    words = (artefact, "--threads", 1)
    outcome = standalone(program, *words, stdin=text, missing=PLUGIN)
    assert outcome.status == 0, outcome.text
    assert outcome.output.split("\n")[:-1] == StandaloneTranslator(artefact, 1).translate(lines)
    unfinished = standalone(program, *words, stdin=text.rstrip("\n"), missing=PLUGIN)
    assert unfinished.output == outcome.output
    marked = standalone(program, *words, stdin=f"\ufeff{text}", missing=PLUGIN)
    assert marked.output == outcome.output  # a byte order mark is no part of the first word
    assert standalone(program, *words, stdin="", missing=PLUGIN).output == ""
    for package in ("numpy", "onnxruntime", "sentencepiece"):
        failed = standalone(program, *words, stdin=text, missing=(*PLUGIN, package))
        assert failed.status == 1 and not failed.output
        assert f"{package} is not installed: pip install {package}" in failed.errors
        assert "Traceback" not in failed.errors


def test_lines_are_answered_as_they_come(workshop: Workshop, artefact: Path) -> None:
    lines = workshop.sources(33)[:3]
    expected = StandaloneTranslator(artefact, 1).translate(lines)
    words = (artefact / "standalone.pyz", artefact, "--threads", 1, "--buffer-size", 1)
    with subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as running:
        assert running.stdin and running.stdout
        too_late = threading.Timer(300, running.kill)
        too_late.daemon = True
        too_late.start()
        for line, translation in zip(lines, expected, strict=True):
            running.stdin.write(f"{line}\n")
            running.stdin.flush()
            assert running.stdout.readline() == f"{translation}\n"  # before the input has ended
        too_late.cancel()


def test_what_came_before_a_bad_line_is_written(workshop: Workshop, artefact: Path) -> None:
    program, words = artefact / "standalone.pyz", (artefact, "--threads", 1, "--buffer-size", 2)
    lines = workshop.sources(33)[:3]
    text = "".join(f"{line}\n" for line in [*lines, "word " * 3000])
    outcome = standalone(program, *words, stdin=text, missing=())
    assert outcome.status == 1 and "Line 4 has" in outcome.errors
    assert outcome.output.split("\n")[:-1] == StandaloneTranslator(artefact, 1).translate(lines[:2])
    long = "".join(f"{line}\n" for line in [lines[0], "word " * 3000, lines[1]])
    skipped = standalone(program, *words, "--skip-bad-lines", stdin=long, missing=())
    assert skipped.status == 0 and "standalone: warning: Line 2 has" in skipped.errors
    first, second = StandaloneTranslator(artefact, 1).translate(lines[:2])
    assert skipped.output.split("\n") == [first, "", second, ""]
    for option in ("--buffer-size", "--threads"):
        outcome = standalone(program, artefact, option, 0, stdin=text, missing=())
        assert outcome.status == 1 and f"{option} is 0: it must be positive" in outcome.errors
    latin = subprocess.run(
        [sys.executable, str(program), str(artefact), "--buffer-size", "1"],
        input=b"word\n\xe9t\xe9\n",
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert latin.returncode == 1 and b"Line 2 is not UTF-8 text." in latin.stderr
    assert latin.stdout.count(b"\n") == 1


def test_the_one_file_can_be_imported(workshop: Workshop, artefact: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(artefact / 'standalone.pyz')!r});"
        " from standalone import StandaloneTranslator;"
        f" print(StandaloneTranslator({str(artefact)!r}, 1).translate(['Opens the dialog.'])[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    expected = StandaloneTranslator(artefact, 1).translate(["Opens the dialog."])
    assert done.stdout.rstrip("\n") == expected[0]


def test_equal_programs_are_equal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "one.pyz")
    monkeypatch.setattr("time.time", lambda: 2e9)
    write_program(tmp_path / "two.pyz")
    assert (tmp_path / "one.pyz").read_bytes() == (tmp_path / "two.pyz").read_bytes()


def test_example(workshop: Workshop, artefact: Path) -> None:
    program = EXAMPLES / "translate_exported.py"
    done = standalone(program, artefact, stdin="Opens the dialog.\n\n", missing=PLUGIN)
    assert done.status == 0, done.text
    expected = StandaloneTranslator(artefact, 1).translate(["Opens the dialog.", ""])
    assert done.output.split("\n") == [*expected, ""]


def test_damage_is_noticed(artefact: Path, tmp_path: Path) -> None:
    parts = [path.name for path in artefact.iterdir()]
    assert len(parts) == 10
    for name in parts:
        for damage in ("flipped", "cut", "missing"):
            copy = tmp_path / f"{name}-{damage}"
            shutil.copytree(artefact, copy)
            content = bytearray((copy / name).read_bytes())
            content[len(content) // 2] ^= 1
            if damage == "missing":
                (copy / name).unlink()
            else:
                kept = content if damage == "flipped" else content[: len(content) // 2]
                (copy / name).write_bytes(kept)
            with pytest.raises(StandaloneError, match=r"damaged|lacks|no exported model"):
                StandaloneTranslator(copy, threads=1)
            shutil.rmtree(copy)
    with pytest.raises(StandaloneError, match="is no exported model"):
        StandaloneTranslator(tmp_path / "nowhere")


def test_latency_of_an_export(
    workshop: Workshop, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.txt"
    source.write_text("Open the file.\nClose it.\n", encoding="utf-8")
    words = ["latency", "--data", workshop.data, "--source", source, "--system", f"it={artefact}"]
    words += ["--baseline", "it", "--repeats", 1, "--burn-in", 1, "--threads", 1]

    def run(options: str) -> int:
        return main([*map(str, words), "--system-options", f"it={options}"])

    assert run('{"engine": "exported"}') == 0
    assert "| it |" in capsys.readouterr().out
    assert run('{"engine": "exported", "latent_beam": 3}') == 1
    assert "leave out latent_beam" in capsys.readouterr().err
    assert run("{}") == 1
    assert '"engine": "exported" among its options' in capsys.readouterr().err


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    del manifest["checksum"]
    change(manifest)
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("change", [-2, 1])
def test_other_formats_are_refused(artefact: Path, tmp_path: Path, change: int) -> None:
    copy = tmp_path / "other"
    shutil.copytree(artefact, copy)
    change_manifest(copy, lambda manifest: manifest.update(version=FORMAT_VERSION + change))
    asked = f"has format fairseq_vqem-export {FORMAT_VERSION + change}, but .* without latents"
    with pytest.raises(StandaloneError, match=asked):
        StandaloneTranslator(copy)


def test_the_teacher_comes_along(workshop: Workshop, student: Path, teacher: Path) -> None:
    out, count = workshop.root / "exported-with-teacher", 33
    search = ("--latent-beam", 3, "--latent-candidates", 3, "--remove-repeats")
    search = (*search, "--latent-length-reward", 0.5)
    words = export_words(workshop, out, "--teacher", teacher, *search)
    outcome = workshop.run("fairseq_vqem.cli", *words)
    assert outcome.status == 0, outcome.text
    both = f"{student}:{teacher}"
    outcome = workshop.generate(count, *search, "--rescore", "teacher", path=both)
    translator = StandaloneTranslator(out, threads=1)
    sources = translator.encode(workshop.sources(count))
    found = [translator.target.pieces(ids) for ids in translator.translate_ids(sources)]
    assert {number: [pieces] for number, pieces in enumerate(found)} == outcome.hypotheses()
    lines = "".join(f"{line}\n" for line in workshop.sources(count))
    alone = standalone(out / "standalone.pyz", out, stdin=lines, missing=PLUGIN)
    assert alone.output.split("\n")[:-1] == translator.translate(workshop.sources(count))
    with pytest.raises(StandaloneError, match=r"2 is impossible with .* 3 candidates"):
        StandaloneTranslator(out, latent_beam=2)


@pytest.mark.int8
def test_eight_bits(workshop: Workshop, student: Path, tmp_path: Path) -> None:
    translators = []
    for weights in ("float32", "int8"):
        export(student, workshop.data, tmp_path / weights, weights=weights)
        translators.append(StandaloneTranslator(tmp_path / weights, threads=1))
    sources = translators[0].encode(workshop.sources(33))
    expected, found = (translator.translate_ids(sources) for translator in translators)
    pairs = [
        (a, b)
        for own, other in zip(expected, found, strict=True)
        for a, b in itertools.zip_longest(own, other)
    ]
    share = sum(a == b for a, b in pairs) / len(pairs)
    print(f"int8 agrees on {share:.1%} of the tokens of a trained student")
    assert share > 0.7
    sizes = [(tmp_path / weights / "weights.bin").stat().st_size for weights in ("float32", "int8")]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, StandaloneError])
def test_an_export_that_was_not_checked_is_removed(
    workshop: Workshop,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: type[BaseException],
) -> None:
    def stops(translator: Translator, folder: Path, *, weights: str) -> float:
        assert (folder / "manifest.json").is_file() and not (tmp_path / "out").exists()
        raise ending("stopped")

    monkeypatch.setattr("fairseq_vqem.export.command._checked_agreement", stops)
    expected = UserError if ending is StandaloneError else ending
    with pytest.raises(expected):
        export(student, workshop.data, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refusals(
    workshop: Workshop,
    artefact: Path,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def message(*words: object, out: Path = tmp_path / "out", checkpoint: object = "") -> str:
        assert main(export_words(workshop, out, *words, checkpoint=checkpoint)) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert f"{artefact} exists already" in message(out=artefact)
    assert "Only vqem_transformer, ctc_nat and dag_nat models can be" in message(checkpoint=teacher)
    assert "does not exist" in message(checkpoint=tmp_path / "none.pt")
    assert "--latent-length source" in message("--stop-at-pad-latent")
    assert "A latent beam of 99 is impossible" in message("--latent-beam", 99)
    assert "at least --latent-candidates 2" in message("--teacher", teacher)
    for beam in (4, 0):
        refusal = message("--iter-decode-with-beam", beam)
        assert f"--iter-decode-with-beam {beam} is for ctc_nat" in refusal
    both = f"{workshop.student}:{workshop.student}"
    assert "An ensemble" in message(checkpoint=both)
