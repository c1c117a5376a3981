"""The pretrained students in examples/ still translate."""

import tarfile
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="needs pip install 'fairseq_vqem[export]'")

from fairseq_vqem.benchmark.scoring import score
from fairseq_vqem.corpora.files import read_columns
from fairseq_vqem.export.standalone import StandaloneTranslator

pytestmark = pytest.mark.int8
ROOT = Path(__file__).parents[2]
SENTENCES = 100
DIALOG = {"help-en-de": "Öffnet den Dialog.", "help-en-fr": "Ouvre la boîte de dialogue."}
TESTED = {  # the row that each is, and its BLEU on these sentences but for another processor's ties
    "help-en-de": (
        ROOT / "recipes" / "compare" / "results" / "full-hypotheses.tsv.gz",
        "CTC with glancing, 5000 updates, 30 candidates, exported int8",
    ),
    "help-en-fr": (
        ROOT / "recipes" / "debian-en-fr" / "results" / "more-hypotheses.tsv.gz",
        "VQ-EM, 10000 updates, more source, beam 5, exported int8",
    ),
}


@pytest.fixture(scope="module", params=DIALOG)
def named(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, StandaloneTranslator]:
    """The name of a student, and the student."""
    folder, name = tmp_path_factory.mktemp("pretrained"), request.param
    with tarfile.open(ROOT / "examples" / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return name, StandaloneTranslator(str(folder / name), threads=1)


def test_a_pretrained_student_translates(named: tuple[str, StandaloneTranslator]) -> None:
    name, student = named
    assert student.translate(["Opens the dialog."]) == [DIALOG[name]]


def test_it_is_the_row_of_the_report(named: tuple[str, StandaloneTranslator]) -> None:
    name, student = named
    path, row = TESTED[name]
    columns = {each: lines[:SENTENCES] for each, lines in read_columns(path).items()}
    translations = student.translate(columns["source"])
    same = sum(a == b for a, b in zip(translations, columns[row], strict=True))
    assert same >= 0.9 * SENTENCES
    scores = [score(texts, columns["reference"]).bleu for texts in (translations, columns[row])]
    assert abs(scores[0] - scores[1]) < 1
