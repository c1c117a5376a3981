"""The Debian corpus builder: its extractors, and a whole build with a make-believe apt."""

from __future__ import annotations

import gzip
import json
import os
import struct
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from fairseq_vqem.corpora.debian import build as build_module
from fairseq_vqem.corpora.debian.alignment import align_sentences, split_sentences
from fairseq_vqem.corpora.debian.apt import PackageStore
from fairseq_vqem.corpora.debian.build import build_corpus, check_request
from fairseq_vqem.corpora.debian.descriptions import align_descriptions
from fairseq_vqem.corpora.debian.filters import rejection_reason
from fairseq_vqem.corpora.debian.gettext_catalogs import align_catalogue, read_catalogue
from fairseq_vqem.corpora.debian.html_pages import align_pages
from fairseq_vqem.corpora.debian.man_pages import align_man_pages, plain_text
from fairseq_vqem.corpora.debian.misc import ding_sentences, game_dialogue
from fairseq_vqem.corpora.debian.packages import GROUP_PACKAGES, groups_for, packages_of
from fairseq_vqem.corpora.debian.xml_manuals import align_manuals
from fairseq_vqem.corpora.files import read_json, write_json
from fairseq_vqem.corpora.splits import SplitRule
from fairseq_vqem.errors import UserError

HELP_ROOT = "./usr/share/libreoffice/help"
RULE = SplitRule(valid_size=5, test_size=5)


def test_sentence_split_spares_abbreviations_and_ordinals() -> None:
    assert split_sentences("Use e.g. Writer. Then save it! (Or not.)", "en") == [
        "Use e.g. Writer.",
        "Then save it!",
        "(Or not.)",
    ]
    assert split_sentences("Am 3. Mai z. B. Montag. Das ist gut.", "de") == [
        "Am 3. Mai z. B. Montag.",
        "Das ist gut.",
    ]
    assert split_sentences("", "de") == []


def test_alignment_by_length_when_counts_differ() -> None:
    english = "This is a rather long first sentence with many words. A short one. The last is here."
    german = "Das ist ein recht langer erster Satz mit vielen Wörtern. Ein kurzer und der letzte."
    assert align_sentences(english, german, "de") == [
        (
            "This is a rather long first sentence with many words.",
            "Das ist ein recht langer erster Satz mit vielen Wörtern.",
        ),
        ("A short one. The last is here.", "Ein kurzer und der letzte."),
    ]
    assert align_sentences("One.", "", "de") == []


@pytest.mark.parametrize(
    ("english", "other", "reason"),
    [
        ("Open the file in Writer.", "Öffnen Sie die Datei im Writer.", None),
        ("The same text here", "the same text here", "same"),
        ("Too short", "Zu kurz hier drin", "length"),
        ("A few words here", "sehr " * 20 + "viele", "ratio"),
        ("Page 12 of the book", "Seite 13 des Buchs", "numbers"),
        ("About 1,000 lines of code here", "Etwa 1.000 Zeilen mit Code sind hier", None),
        ("Could not open %s here", "Konnte es nicht öffnen", "placeholders"),
        ("a = b + c * ( d - e )", "x = b + c * ( d - e )", "symbols"),
        ("Öffnen Sie die Datei jetzt", "Open the file of the user", "language"),
        ("alpha beta gamma delta test", "alpha beta gamma delta Versuch", "copy"),
    ],
)
def test_filters(english: str, other: str, reason: str | None) -> None:
    assert rejection_reason(english, other) == reason


def test_html_pages(tmp_path: Path) -> None:
    page = "<nav>x</nav><h1>{}</h1><p>{} <b>{}</b></p><pre>code</pre><p id='par_1'>{}</p>"
    english, german = tmp_path / "en.html", tmp_path / "de.html"
    english.write_text(page.format("Title", "One", "bold", "A &amp; B. See C."), encoding="utf-8")
    german.write_text(
        page.format("Titel", "Ein", "fetter", "A &amp; B. Siehe C."), encoding="utf-8"
    )
    assert list(align_pages(english, german, "de")) == [
        ("Title", "Titel"),
        ("One bold", "Ein fetter"),
        ("A & B. See C.", "A & B. Siehe C."),
    ]
    german.write_text("<h2>Titel</h2><div><p id='par_1'>Siehe C.</p></div>", encoding="utf-8")
    english.write_text("<h1>Title</h1><p id='par_1'>See C.</p>", encoding="utf-8")
    assert list(align_pages(english, german, "de")) == [("See C.", "Siehe C.")]


def test_xml_manuals(tmp_path: Path) -> None:
    book = "<!DOCTYPE book [<!ENTITY x 'y'>]><book><title>{}</title><para>{}</para></book>"
    english, german = tmp_path / "en.docbook", tmp_path / "de.docbook"
    english.write_text(book.format("The &konsole; Handbook", "Press <b>Enter</b> now."))
    german.write_text(book.format("Das Handbuch zu &konsole;", "Drücken Sie <b>Eingabe</b>."))
    assert list(align_manuals(english, german, "de")) == [
        ("The konsole Handbook", "Das Handbuch zu konsole"),
        ("Press Enter now.", "Drücken Sie Eingabe."),
    ]
    german.write_text("<book><title>broken")
    assert list(align_manuals(english, german, "de")) == []


def test_man_pages(tmp_path: Path) -> None:
    page = '.\\" a comment\n.SH {}\n.TP\n.BR \\-a ,\n{} \\fIfile\\fR.\n.nf\nliteral\n.fi\n.PP\n{}\n'
    english, german = tmp_path / "ls.1.gz", tmp_path / "ls.de.1.gz"
    english.write_bytes(gzip.compress(page.format("NAME", "List the", "It ends.").encode()))
    german.write_bytes(gzip.compress(page.format("BEZEICHNUNG", "Zeigt die", "Ende.").encode()))
    assert list(align_man_pages(english, german, "de")) == [
        ("NAME", "BEZEICHNUNG"),
        ("List the file.", "Zeigt die file."),
        ("It ends.", "Ende."),
    ]
    german.write_bytes(b"not gzipped")
    assert list(align_man_pages(english, german, "de")) == []


def test_troff_escapes() -> None:
    assert plain_text(r"\fBls\fP \(em \(:u\[u00E4]\(ss \-l\& \s-1SMALL\s0\" comment") == (
        "ls — üäß -l SMALL"
    )


def mo_file(entries: dict[str, str]) -> bytes:
    encoded = [(k.encode(), v.encode()) for k, v in sorted(entries.items())]
    tables, strings = [b"", b""], b""
    start = 28 + 16 * len(encoded)
    for side in (0, 1):
        for entry in encoded:
            tables[side] += struct.pack("<2I", len(entry[side]), start + len(strings))
            strings += entry[side] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(encoded), 28, 28 + 8 * len(encoded), 0, 0)
    return head + tables[0] + tables[1] + strings


def test_gettext_catalogues(tmp_path: Path) -> None:
    path = tmp_path / "x.mo"
    content = mo_file(
        {
            "": "Content-Type: text/plain; charset=UTF-8\n",
            "menu\x04&Open _file": "Datei ö&ffnen",
            "%d file\0%d files": "%d Datei\0%d Dateien",
            "same": "same",
            "First <b>part</b>.\n\nSecond part.": "Erster <b>Teil</b>.\n\nZweiter Teil.",
        }
    )
    path.write_bytes(content)
    assert ("%d file", "%d Datei") in list(read_catalogue(path))
    assert sorted(align_catalogue(path, "de")) == [
        ("%d file", "%d Datei"),
        ("First part.", "Erster Teil."),
        ("Open file", "Datei öffnen"),
        ("Second part.", "Zweiter Teil."),
    ]
    for damaged in (content[:60], b"", b"PK\x03\x04 something else"):
        path.write_bytes(damaged)
        assert list(read_catalogue(path)) == []


def test_package_descriptions() -> None:
    stanza = "Package: x\nDescription-md5: {}\nDescription-{}: {}\n"
    body = " {}\n .\n  * {}\n    {}\n  * {}\n"
    english = (stanza + body).format("1", "en", "title", "Text.", "one", "more", "two")
    other = (stanza + body).format("1", "de", "Titel", "Worte.", "eins", "mehr", "zwei")
    unmatched = stanza.format("2", "de", "anderer Titel")
    assert list(align_descriptions(english, f"{other}\n{unmatched}", "de")) == [
        ("title", "Titel"),
        ("Text.", "Worte."),
        ("one more", "eins mehr"),
        ("two", "zwei"),
    ]


def test_dictionary_and_dialogue(tmp_path: Path) -> None:
    ding = tmp_path / "de-en"
    ding.write_text(
        "# comment\nHaus {n} | Das ist gut. [ugs.]; Na gut. :: house | That is good.; All right.\n",
        encoding="utf-8",
    )
    assert list(ding_sentences(ding)) == [
        ("That is good.", "Das ist gut."),
        ("All right.", "Na gut."),
    ]
    script = tmp_path / "x.lua"
    script.write_text('dialogId("a", "f", "Say \\"hi\\".")\ndialogStr("Sag \\"hallo\\".")\n')
    assert list(game_dialogue(script)) == [('Say "hi".', 'Sag "hallo".')]


def test_requests() -> None:
    assert check_request("de", []) == groups_for("de") == list(GROUP_PACKAGES)
    assert "ding" not in groups_for("fr")
    assert packages_of("lohelp", "pt_BR") == ["libreoffice-help-en-us", "libreoffice-help-pt-br"]
    for lang in ("en", "Deutsch", "../x", ""):
        with pytest.raises(UserError, match="language"):
            check_request(lang, [])
    for lang in ("zh_CN", "ja"):
        with pytest.raises(UserError, match=f"'{lang}' has no spaces between words"):
            check_request(lang, [])
    with pytest.raises(UserError, match="Unknown group films"):
        check_request("de", ["films"])
    with pytest.raises(UserError, match="no text in 'fr'"):
        check_request("fr", ["ding"])


FAKE_PROGRAMS = {
    "apt-get": """
case "$*" in
  *update*) test ! -e REPO/offline || { echo "E: Failed to fetch the index" >&2; exit 100; } ;;
  *download*) shift 2; echo "$@" >> REPO/log; for p; do
      cp REPO/$p.tar ${p}_`cat REPO/version | sed s/:/%3a/`_all.deb
    done ;;
esac""",
    "apt-cache": """
shift
for p; do
  if test -e REPO/$p.tar; then
    printf '%s:\\n  Installed: (none)\\n  Candidate: %s\\n' $p `cat REPO/version`
  fi
done""",
    "dpkg-deb": 'cat "$2"',
}


def help_package(repository: Path, package: str, lang: str, paragraphs: list[str]) -> None:
    html = "".join(f'<p id="par_{i}">{text}</p>' for i, text in enumerate(paragraphs)).encode()
    with tarfile.open(repository / f"{package}.tar", "w") as archive:
        for name in (f"{HELP_ROOT}/{lang}/text/a.html", "./usr/share/unwanted", "./../x.html"):
            member = tarfile.TarInfo(name)
            member.size = len(html)
            archive.addfile(member, BytesIO(html))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of make-believe packages, with programs on PATH that serve them."""
    folder, programs = tmp_path / "repository", tmp_path / "bin"
    folder.mkdir()
    (folder / "version").write_text("1.0")
    programs.mkdir()
    for name, script in FAKE_PROGRAMS.items():
        path = programs / name
        path.write_text("#!/bin/sh\n" + script.replace("REPO", str(folder)), encoding="utf-8")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    colours = ("red", "green", "blue", "white", "black", "brown", "grey", "pink")
    english = [
        f"The {a} box holds many {b} stones {chr(97 + i)}{chr(97 + j)} today."
        for i, a in enumerate(colours)
        for j, b in enumerate(colours[i:])
    ]
    german = [f"Heute {s[-9:-7]} liegt viel Gestein {s[4:8]} drin {s[-20:-9]}." for s in english]
    english[::5] = [f"{sentence} That is really so." for sentence in english[::5]]
    help_package(folder, "libreoffice-help-en-us", "en-US", [*english, "Short.", english[0]])
    help_package(folder, "libreoffice-help-de", "de", [*german, "Kurz.", german[0]])
    return folder


def test_whole_build_and_its_resumption(repository: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    manifest = build_corpus("de", ["lohelp"], out, work, RULE)
    assert manifest["packages"]["lohelp"] == {
        "libreoffice-help-en-us": "1.0",
        "libreoffice-help-de": "1.0",
    }
    reasons = manifest["dropped"]["lohelp"]
    assert (reasons["length"], reasons["duplicate"]) == (1, 1)
    counts = {split: manifest["splits"][split]["pairs"] for split in ("train", "valid", "test")}
    near_duplicates = reasons.get("near-duplicate of an evaluation pair", 0)
    assert sum(counts.values()) + near_duplicates == 36
    for split, count in counts.items():
        for suffix in ("en", "de", "label"):
            lines = (out / f"{split}.{suffix}").read_text(encoding="utf-8").split("\n")
            assert len(lines) == count + 1
    assert set((out / "train.label").read_text(encoding="utf-8").split()) == {"lohelp"}
    assert not list(work.glob("**/unwanted")) and not (work / "unpacked" / "x.html").exists()

    (repository / "offline").touch()
    assert build_corpus("de", ["lohelp"], out, work, RULE) == manifest
    assert len((repository / "log").read_text().splitlines()) == 1

    (out / "train.de").write_text("damaged", encoding="utf-8")
    assert build_corpus("de", ["lohelp"], out, work, RULE) == manifest
    assert (out / "train.de").read_text(encoding="utf-8") != "damaged"

    group = work / "groups" / "de.lohelp.tsv"
    group.write_text("damaged", encoding="utf-8")
    assert build_corpus("de", ["lohelp"], out, work, RULE) == manifest  # has no need of it
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"fetch the package index.*Failed to fetch.*network"):
        build_corpus("de", ["lohelp"], out, work, RULE)


def test_another_size_of_the_splits_is_another_corpus(repository: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    first = build_corpus("de", ["lohelp"], out, work, RULE)
    fewer = replace(RULE, test_size=RULE.test_size - 1)
    second = build_corpus("de", ["lohelp"], out, work, fewer)
    assert second["splits"]["test"]["pairs"] == first["splits"]["test"]["pairs"] - 1


def test_a_package_of_another_version_is_fetched_again(repository: Path, tmp_path: Path) -> None:
    """Else pages of two releases would be paired."""
    work = tmp_path / "work"
    build_corpus("de", ["lohelp"], tmp_path / "first", work, RULE)
    (work / "groups" / "de.lohelp.tsv").unlink()
    (repository / "version").write_text("1:2.0")
    manifest = build_corpus("de", ["lohelp"], tmp_path / "second", work, RULE)
    assert set(manifest["packages"]["lohelp"].values()) == {"1:2.0"}
    assert len((repository / "log").read_text().splitlines()) == 2


def test_a_corpus_of_other_rules_is_made_again(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    made = build_corpus("de", ["lohelp"], out, work, RULE)
    group = work / "groups" / "de.lohelp.json"
    for path in (out / "manifest.json", group):  # as the first rules left them
        content = {key: value for key, value in read_json(path).items() if key != "rules"}
        write_json(path, content)
    (repository / "offline").touch()
    assert build_corpus("de", ["lohelp"], out, work, RULE)["splits"] == made["splits"]
    monkeypatch.setattr(build_module, "RULES", 2)
    with pytest.raises(UserError, match="fetch the package index"):
        build_corpus("de", ["lohelp"], out, work, RULE)
    (repository / "offline").unlink()
    assert build_corpus("de", ["lohelp"], out, work, RULE)["rules"] == 2
    assert read_json(group)["rules"] == 2


def read_rows(folder: Path) -> set[tuple[str, str, str]]:
    """Split, English and German of every pair."""
    rows = set()
    for split in ("train", "valid", "test"):
        sides = [(folder / f"{split}.{s}").read_text("utf-8").splitlines() for s in ("en", "de")]
        rows |= {(split, *pair) for pair in zip(*sides, strict=True)}
    return rows


def test_pairs_with_more_words_are_left_out_of_the_same_split(
    repository: Path, tmp_path: Path
) -> None:
    build_corpus("de", ["lohelp"], tmp_path / "all", tmp_path / "work", RULE)
    every = read_rows(tmp_path / "all")
    words = {row: max(len(side.split()) for side in row[1:]) for row in every}
    limit = max(words.values()) - 1
    expected = {row for row, count in words.items() if count <= limit}
    assert 0 < len(expected) < len(every)

    out = tmp_path / "short"
    manifest = build_corpus("de", ["lohelp"], out, tmp_path / "work", RULE, max_words=limit)
    assert read_rows(out) == expected
    dropped = manifest["dropped"]["lohelp"][f"more than {limit} words"]
    assert dropped == len(every) - len(expected)
    assert sum(split["pairs"] for split in manifest["splits"].values()) == len(expected)
    (repository / "offline").touch()
    assert build_corpus("de", ["lohelp"], out, tmp_path / "work", RULE, max_words=limit) == manifest
    longer = build_corpus("de", ["lohelp"], out, tmp_path / "work", RULE)
    assert longer["max_words"] is None and read_rows(out) == every


def test_interrupted_group_leaves_no_group_file(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(english: str, other: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "rejection_reason", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_corpus("de", ["lohelp"], tmp_path / "out", tmp_path / "work", RULE)
    assert not list((tmp_path / "work").glob("groups/*"))


def test_language_without_packages(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no text in 'xx'"):
        build_corpus("xx", ["lohelp"], tmp_path / "out", tmp_path / "work", RULE)
    assert not (tmp_path / "out").exists()


def test_damaged_package(repository: Path, tmp_path: Path) -> None:
    (repository / "libreoffice-help-de.tar").write_bytes(b"not a tar archive" * 100)
    with pytest.raises(UserError, match="damaged"):
        build_corpus("de", ["lohelp"], tmp_path / "out", tmp_path / "work", RULE)


def test_descriptions_of_a_language_with_a_country(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """apt escapes the underscore in names of files."""
    store = PackageStore(tmp_path, "pt_BR")
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("pt%5fBR", "pt", "de"):
        (lists / f"deb_dists_bookworm_main_i18n_Translation-{name}").write_text(name)
    monkeypatch.setattr(store, "_updated", True)
    monkeypatch.setattr("fairseq_vqem.corpora.debian.apt.APT_HELPER", tmp_path / "apt.conf")
    (tmp_path / "apt.conf").touch()
    monkeypatch.setattr(store, "_run", lambda command, purpose: Path(command[2]).read_text())
    assert store.description_index("pt_BR") == "pt%5fBR"
    assert store.description_index("pt") == "pt"


def test_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get and apt-cache and dpkg-deb not found"):
        build_corpus("de", ["lohelp"], tmp_path / "out", tmp_path / "work", RULE)


def test_manifest_is_json(repository: Path, tmp_path: Path) -> None:
    manifest = build_corpus("de", ["lohelp"], tmp_path / "out", tmp_path / "work", RULE)
    written = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert written == manifest
