"""The well-known corpora, from tiny archives of the same inner layout."""

from __future__ import annotations

import gzip
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from fairseq_vqem.corpora import archives as module
from fairseq_vqem.corpora.archive_table import ARCHIVE_CORPORA, ArchiveCorpus
from fairseq_vqem.corpora.archives import extract_text
from fairseq_vqem.corpora.files import write_json
from fairseq_vqem.errors import UserError

PAIRS = 25
TRAIN_FOLDERS = {"training-parallel-un": "un", "training-parallel-commoncrawl": "."}


def sgm(lines: list[str]) -> str:
    segments = "".join(f'<seg id="{i}">{line}</seg>\n' for i, line in enumerate(lines, 1))
    return f'<srcset setid="x"><doc docid="d">\n<p>\n{segments}</p></doc></srcset>\n'


def talk_xml(lines: list[str]) -> str:
    segments = "".join(f'<seg id="{i}"> {line} </seg>\n' for i, line in enumerate(lines, 1))
    return f'<?xml version="1.0"?>\n<mteval>\n<url>http</url>\n{segments}</mteval>\n'


def text_of(name: str, lang: str) -> str:
    """File content in the form that the file's name asks for; `name` is in every line."""
    lines = [f"{name[:12]} number {i} in {lang} words" for i in range(PAIRS)]
    if name.endswith(".sgm"):
        return sgm([*lines, "Tom &amp; Jerry, and then a very much longer line than before"])
    if name.endswith(".xml"):
        return talk_xml(lines)
    if name.startswith("train.tags"):
        head = f"<url>x</url>\n<keywords>k</keywords>\n<title>A Title in {lang}</title>\n"
        return head + "".join(f" {line} \n" for line in lines)
    other = "" if lang == "en" else "word " * 30
    # An empty line, a line of uneven length and a carriage return, as in the real files.
    return "".join(f"{line}\r\n" for line in lines) + "\n" + f"short one here {other}\n"


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, BytesIO(content))


def make_archives(corpus: ArchiveCorpus, folder: Path) -> list[Path]:
    folder.mkdir()
    contents: dict[str, dict[str, str]] = {}
    for pair in (*corpus.train, *corpus.valid, *corpus.test):
        files = contents.setdefault(pair.archive, {})
        files[pair.source] = text_of(pair.source, corpus.source_lang)
        files[pair.target] = text_of(pair.target, corpus.target_lang)
    made = []
    for archive_name, files in contents.items():
        plain = archive_name == "training-giga-fren"
        path = folder / f"{archive_name}{'.tar' if plain else '.tgz'}"
        with tarfile.open(path, "w" if plain else "w:gz") as archive:
            inner = TRAIN_FOLDERS.get(archive_name, "training")
            add(archive, f"{inner}/another-file.xx-en", b"not wanted\n")
            for name, text in files.items():
                content = text.encode("utf-8")
                if plain:
                    add(archive, f"{name}.gz", gzip.compress(content))
                else:
                    add(archive, f"{inner}/{name}", content)
        made.append(path)
    return made


@pytest.mark.parametrize("name", ARCHIVE_CORPORA)
def test_from_archives_to_text(name: str, tmp_path: Path) -> None:
    corpus = ARCHIVE_CORPORA[name]
    make_archives(corpus, tmp_path / "downloads")
    manifest = extract_text(name, tmp_path / "downloads", tmp_path / "raw")
    lines = {split: described["lines"] for split, described in manifest["splits"].items()}
    if corpus.valid_every:
        # The title line counts as text.
        assert lines == {"train": PAIRS, "valid": 1, "test": PAIRS * len(corpus.test)}
        assert manifest["dropped"] == {}
    else:
        files = len(corpus.train)
        assert lines == {"train": PAIRS * files, "valid": PAIRS + 1, "test": PAIRS + 1}
        assert manifest["dropped"] == {"empty": files, "ratio": files}
    for split, count in lines.items():
        for lang in (corpus.source_lang, corpus.target_lang):
            text = (tmp_path / "raw" / f"{split}.{lang}").read_text(encoding="utf-8")
            assert text.count("\n") == count
            assert "<" not in text and "\r" not in text and "&amp;" not in text
            assert text == text.lower() if corpus.lowercase else "number" in text
    sides = [
        (tmp_path / "raw" / f"train.{lang}").read_text(encoding="utf-8").split("\n")
        for lang in (corpus.source_lang, corpus.target_lang)
    ]
    for source, target in zip(*sides, strict=True):
        assert source.replace(f" in {corpus.source_lang}", f" in {corpus.target_lang}") == target


def test_finished_text_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads, raw = tmp_path / "downloads", tmp_path / "raw"
    make_archives(ARCHIVE_CORPORA["wmt14-en-de"], downloads)
    first = extract_text("wmt14-en-de", downloads, raw)

    def unexpected(*args: object) -> None:
        raise AssertionError("unpacked again")

    monkeypatch.setattr(module, "_unpack", unexpected)
    assert extract_text("wmt14-en-de", downloads, raw) == first
    other = {"wmt14-en-de": replace(ARCHIVE_CORPORA["wmt14-en-de"], max_words=7)}
    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(module, "ARCHIVE_CORPORA", other)
        extract_text("wmt14-en-de", downloads, raw)
    write_json(raw / "manifest.json", first)
    (raw / "manifest.json").unlink()
    with pytest.raises(AssertionError):
        extract_text("wmt14-en-de", downloads, raw)


@pytest.mark.parametrize("change", ["archive", "loose file", "result"])
def test_changed_sources_and_results_are_noticed(tmp_path: Path, change: str) -> None:
    """Also where what was unpacked of an earlier archive still lies there."""
    downloads, raw = tmp_path / "downloads", tmp_path / "raw"
    corpus = ARCHIVE_CORPORA["wmt14-en-de"]
    made = make_archives(corpus, downloads)
    names = [
        f"newstest2014-deen-{side}.{lang}.sgm" for side, lang in (("src", "en"), ("ref", "de"))
    ]

    def write_loose(line: str) -> None:
        for name in names:
            (downloads / name).write_text(sgm([line]), encoding="utf-8")

    if change == "loose file":
        write_loose("the first line")
    before = extract_text("wmt14-en-de", downloads, raw)["splits"]["test"]
    text = (raw / "test.en").read_text("utf-8")
    if change == "archive":
        (path,) = (path for path in made if path.name.startswith("test-full"))
        path.unlink()
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                add(archive, f"test-full/{name}", sgm(["another line"]).encode())
        assert path.is_file()
    elif change == "loose file":
        write_loose("another line")
    else:
        (raw / "test.en").write_text("another line\n", encoding="utf-8")
    after = extract_text("wmt14-en-de", downloads, raw)["splits"]["test"]
    found = (raw / "test.en").read_text("utf-8")
    if change == "result":
        assert (found, after) == (text, before)
    else:
        assert found == "another line\n" and after["lines"] == 1


def test_missing_archives_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        extract_text("wmt14-en-de", tmp_path / "none", tmp_path / "raw")
    made = make_archives(ARCHIVE_CORPORA["wmt14-en-de"], tmp_path / "downloads")
    for path in made[1:3]:
        path.unlink()
    with pytest.raises(UserError) as caught:
        extract_text("wmt14-en-de", tmp_path / "downloads", tmp_path / "raw")
    for path in made[1:3]:
        assert path.name.removesuffix(".tgz") in str(caught.value)
    assert "europarl" not in str(caught.value)
    assert not (tmp_path / "raw").exists()


def test_loose_files_replace_an_archive(tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    make_archives(ARCHIVE_CORPORA["wmt14-en-de"], downloads)
    (downloads / "test-full.tgz").unlink()
    for side, lang in (("src", "en"), ("ref", "de")):
        name = f"newstest2014-deen-{side}.{lang}.sgm"
        (downloads / name).write_text(sgm(["only one line"]), encoding="utf-8")
    manifest = extract_text("wmt14-en-de", downloads, tmp_path / "raw")
    assert manifest["splits"]["test"]["lines"] == 1


@pytest.mark.parametrize("damage", ["truncated", "rubbish", "incomplete"])
def test_damaged_archive(tmp_path: Path, damage: str) -> None:
    downloads = tmp_path / "downloads"
    path = make_archives(ARCHIVE_CORPORA["wmt14-en-de"], downloads)[0]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-150])
    elif damage == "rubbish":
        path.write_bytes(b"<html>404</html>" * 100)
    else:
        with tarfile.open(path, "w:gz") as archive:
            add(archive, "training/europarl-v7.de-en.de", b"x\n")
    message = "lacks europarl-v7.de-en.en or" if damage == "incomplete" else "is damaged"
    with pytest.raises(UserError, match=message):
        extract_text("wmt14-en-de", downloads, tmp_path / "raw")
    assert not list(tmp_path.glob("raw/*.en"))


def test_files_of_different_length(tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    make_archives(ARCHIVE_CORPORA["wmt14-en-de"], downloads)
    (downloads / "commoncrawl.de-en.en").write_text("a b c\nd e f\n", encoding="utf-8")
    (downloads / "commoncrawl.de-en.de").write_text("a b c\n", encoding="utf-8")
    with pytest.raises(UserError, match="differ in length"):
        extract_text("wmt14-en-de", downloads, tmp_path / "raw")
    assert not list(tmp_path.glob("raw/train.*"))


def test_overlong_training_pairs_are_dropped(tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    make_archives(ARCHIVE_CORPORA["wmt14-en-de"], downloads)
    for lang in ("en", "de"):
        path = downloads / f"commoncrawl.de-en.{lang}"
        path.write_text("long " * 251 + "\n" + "long " * 250 + "\n", encoding="utf-8")
    manifest = extract_text("wmt14-en-de", downloads, tmp_path / "raw")
    assert manifest["dropped"]["length"] == 1


def test_plain_text_where_the_archive_has_no_sgm(tmp_path: Path) -> None:
    downloads = tmp_path / "downloads"
    make_archives(ARCHIVE_CORPORA["wmt13-en-fr"], downloads)
    with tarfile.open(downloads / "dev.tgz", "w:gz") as archive:
        add(archive, "dev/newstest2012.en", b"one\n\nthree\n")
        add(archive, "dev/newstest2012.fr", b"un\ndeux\ntrois\n")
        add(archive, "dev/newstest2012-src.en.sgm", b"no reference to go with it\n")
    manifest = extract_text("wmt13-en-fr", downloads, tmp_path / "raw")
    assert manifest["splits"]["valid"]["lines"] == 3
    assert (tmp_path / "raw" / "valid.en").read_text(encoding="utf-8") == "one\n\nthree\n"
