"""From unpacked packages to labelled sentence pairs, one function per group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from fairseq_vqem.corpora.debian.apt import PackageStore
from fairseq_vqem.corpora.debian.descriptions import align_descriptions
from fairseq_vqem.corpora.debian.gettext_catalogs import align_catalogue
from fairseq_vqem.corpora.debian.html_pages import align_pages
from fairseq_vqem.corpora.debian.man_pages import align_man_pages
from fairseq_vqem.corpora.debian.misc import ding_sentences, game_dialogue
from fairseq_vqem.corpora.debian.packages import PAGE_SETS, packages_of
from fairseq_vqem.corpora.debian.xml_manuals import align_manuals

LabelledPair = tuple[str, str, str]
Item = TypeVar("Item")

LIBREOFFICE_HELP = "usr/share/libreoffice/help"
LIBREOFFICE_CONTENT_START = '<div id="DisplayArea"'
LIBREOFFICE_CONTENT_END = '<div id="SearchFrame"'
FILLETS_SCRIPTS = "usr/share/games/fillets-ng/script"
MANUAL_FOLDERS = (
    ("usr/share/doc/HTML/en/", "usr/share/doc/HTML/{lang}/", "**/*.docbook"),
    ("usr/share/help/C/", "usr/share/help/{lang}/", "**/*.page"),
    ("usr/share/help/C/", "usr/share/help/{lang}/", "**/*.docbook"),
)


def extract_group(group: str, lang: str, store: PackageStore) -> Iterator[LabelledPair]:
    """Yield (label, English, other) of a group, raw; fetches its packages first.

    Raises:
        UserError: the packages could not be fetched.
    """
    folders = store.fetch(packages_of(group, lang))
    yield from _EXTRACTORS[group](lang, folders, store)


def _progress(items: Iterable[Item], what: str) -> Iterable[Item]:
    progress: Iterable[Item] = tqdm(list(items), desc=what, disable=None)
    return progress


Folders = dict[str, Path]


def _libreoffice_help(lang: str, folders: Folders, store: PackageStore) -> Iterator[LabelledPair]:
    tag = lang.replace("_", "-")
    other_package = f"libreoffice-help-{tag.lower()}"
    if len(folders) < 2:
        return
    english = folders["libreoffice-help-en-us"] / LIBREOFFICE_HELP / "en-US" / "text"
    other = folders[other_package] / LIBREOFFICE_HELP / tag / "text"
    for page in _progress(sorted(english.glob("**/*.html")), "LibreOffice help"):
        translated = other / page.relative_to(english)
        if translated.is_file():
            marks = LIBREOFFICE_CONTENT_START, LIBREOFFICE_CONTENT_END
            for pair in align_pages(page, translated, lang, *marks):
                yield "lohelp", *pair


def _descriptions(lang: str, folders: Folders, store: PackageStore) -> Iterator[LabelledPair]:
    english, other = store.description_index("en"), store.description_index(lang)
    if english is not None and other is not None:
        for pair in align_descriptions(english, other, lang):
            yield "ddtp", *pair


def _man_pages(lang: str, folders: Folders, store: PackageStore) -> Iterator[LabelledPair]:
    english: dict[tuple[str, str], Path] = {}
    for folder in folders.values():
        for page in sorted(folder.glob("usr/share/man/man*/*.gz")):
            english.setdefault((page.parent.name, page.name), page)
    pages = (p for f in folders.values() for p in f.glob(f"usr/share/man/{lang}/man*/*.gz"))
    for page in _progress(sorted(pages), "man pages"):
        original = english.get((page.parent.name, page.name))
        if original is not None:
            for pair in align_man_pages(original, page, lang):
                yield "man", *pair


def _html_documentation(lang: str, folders: Folders, store: PackageStore) -> Iterator[LabelledPair]:
    suffix = lang.lower().replace("_", "-")
    for pages in PAGE_SETS:
        english = folders.get(pages.english_package)
        other = folders.get(pages.other_package.format(lang=suffix))
        if english is None or other is None:
            continue
        found = sorted(english.glob(pages.english_pages))
        for page in _progress(found, pages.english_package):
            name = page.name.replace(".en.", f".{lang}.")
            pattern = pages.other_page.format(lang=lang, name=name)
            for translated in sorted(other.glob(pattern))[:1]:
                for pair in align_pages(page, translated, lang, "<body"):
                    yield pages.label, *pair


def _manuals(label: str, lang: str, folders: Folders) -> Iterator[LabelledPair]:
    for folder in _progress(folders.values(), f"{label} manuals"):
        for english_root, other_root, pattern in MANUAL_FOLDERS:
            english, other = folder / english_root, folder / other_root.format(lang=lang)
            for manual in sorted(english.glob(pattern)):
                translated = other / manual.relative_to(english)
                if translated.is_file():
                    for pair in align_manuals(manual, translated, lang):
                        yield label, *pair


def _catalogues(label: str, lang: str, folders: Folders) -> Iterator[LabelledPair]:
    for name, folder in _progress(folders.items(), f"{label} catalogues"):
        catalogue_label = "wesnoth" if name.startswith("wesnoth") else label
        for path in sorted(folder.glob(f"**/{lang}/LC_MESSAGES/*.mo")):
            for pair in align_catalogue(path, lang):
                yield catalogue_label, *pair


def _kde(lang: str, folders: Folders, store: PackageStore) -> Iterator[LabelledPair]:
    yield from _manuals("kdehelp", lang, folders)
    yield from _catalogues("mo", lang, folders)


def _gnome(lang: str, folders: Folders, store: PackageStore) -> Iterator[LabelledPair]:
    yield from _manuals("gnomehelp", lang, folders)
    yield from _catalogues("mo", lang, folders)


def _games(lang: str, folders: Folders, store: PackageStore) -> Iterator[LabelledPair]:
    yield from _catalogues("games", lang, folders)
    fillets = folders.get("fillets-ng-data")
    if fillets is not None:
        for script in sorted((fillets / FILLETS_SCRIPTS).glob(f"*/*_{lang}.lua")):
            for pair in game_dialogue(script):
                yield "games", *pair


def _message_catalogues(lang: str, folders: Folders, store: PackageStore) -> Iterator[LabelledPair]:
    yield from _catalogues("mo", lang, folders)


def _ding(lang: str, folders: Folders, store: PackageStore) -> Iterator[LabelledPair]:
    for folder in folders.values():
        for pair in ding_sentences(folder / "usr/share/trans/de-en"):
            yield "ding-sent", *pair


_EXTRACTORS: dict[str, Callable[[str, Folders, PackageStore], Iterator[LabelledPair]]] = {
    "lohelp": _libreoffice_help,
    "ddtp": _descriptions,
    "man": _man_pages,
    "docs": _html_documentation,
    "kde": _kde,
    "gnome": _gnome,
    "games": _games,
    "games-large": _games,
    "mo": _message_catalogues,
    "ding": _ding,
}
