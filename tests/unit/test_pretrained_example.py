"""The pretrained student in examples/ still translates."""

import gzip
import tarfile
from pathlib import Path

import pytest

from fairseq_vqem.benchmark.scoring import score
from fairseq_vqem.export.standalone import StandaloneTranslator

ROOT = Path(__file__).parents[2]
SENTENCES = 100


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> StandaloneTranslator:
    folder = tmp_path_factory.mktemp("pretrained")
    with tarfile.open(ROOT / "examples" / "help-en-de.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return StandaloneTranslator(str(folder / "help-en-de"), threads=1)


def test_the_pretrained_student_translates(student: StandaloneTranslator) -> None:
    assert student.translate(["Opens the dialog."]) == ["Öffnet den Dialog."]


def test_its_score_on_test_sentences_is_not_that_of_a_broken_model(
    student: StandaloneTranslator,
) -> None:
    path = ROOT / "recipes" / "sample-en-de" / "results" / "hypotheses.tsv.gz"
    rows = [line.split("\t") for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    columns = dict(zip(rows[0], zip(*rows[1 : SENTENCES + 1], strict=True), strict=True))
    translations = student.translate(list(columns["source"]))
    assert score(translations, list(columns["reference"])).bleu > 25
