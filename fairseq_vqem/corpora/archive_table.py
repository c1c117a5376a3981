"""Which files make up the well-known corpora, by the names they are distributed under."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TextPair:
    """Two parallel files inside one archive (without ``.tgz``, ``.tar.gz`` or ``.tar``).

    The files are found by name, in whatever folder of the archive; a trailing ``.gz`` is allowed.
    `fallback` names the two files in archives that lack the first ones.
    """

    archive: str
    source: str
    target: str
    fallback: tuple[str, str] | None = None

    def variants(self) -> list[tuple[str, str]]:
        """Return the (source, target) names to look for, the preferred ones first."""
        names = [(self.source, self.target)]
        return names if self.fallback is None else [*names, self.fallback]


@dataclass(frozen=True)
class ArchiveCorpus:
    """One corpus; lengths count words of `fairseq_vqem.corpora.text.tokenise`.

    With `valid_every` = n, every n-th clean training pair goes to the validation split instead.
    `character_coverage` below 1.0 keeps the stray scripts of web text out of the vocabulary.
    """

    source_lang: str
    target_lang: str
    train: tuple[TextPair, ...]
    test: tuple[TextPair, ...]
    valid: tuple[TextPair, ...] = ()
    valid_every: int | None = None
    lowercase: bool = False
    max_words: int = 250
    max_length_ratio: float = 1.5
    vocabulary_size: int = 32_000
    character_coverage: float = 0.9999


def _parallel(archive: str, stem: str, source: str, target: str) -> TextPair:
    return TextPair(archive, f"{stem}.{source}", f"{stem}.{target}")


def _news_test(archive: str, name: str, source: str, target: str) -> TextPair:
    return TextPair(
        archive,
        f"{name}-src.{source}.sgm",
        f"{name}-ref.{target}.sgm",
        # Some years also or only pack plain text.
        fallback=(f"{name}.{source}", f"{name}.{target}"),
    )


def _talks(name: str, suffix: str = "") -> TextPair:
    return TextPair("de-en", f"{name}.de-en.de{suffix}", f"{name}.de-en.en{suffix}")


_ENGLISH_FRENCH_EXCEPT_NEWS = (
    _parallel("training-parallel-europarl-v7", "europarl-v7.fr-en", "en", "fr"),
    _parallel("training-parallel-commoncrawl", "commoncrawl.fr-en", "en", "fr"),
    _parallel("training-parallel-un", "undoc.2000.fr-en", "en", "fr"),
    _parallel("training-giga-fren", "giga-fren.release2.fixed", "en", "fr"),
)

ARCHIVE_CORPORA: dict[str, ArchiveCorpus] = {
    "wmt14-en-de": ArchiveCorpus(
        "en",
        "de",
        train=(
            _parallel("training-parallel-europarl-v7", "europarl-v7.de-en", "en", "de"),
            _parallel("training-parallel-commoncrawl", "commoncrawl.de-en", "en", "de"),
            _parallel("training-parallel-nc-v9", "news-commentary-v9.de-en", "en", "de"),
        ),
        valid=(_news_test("dev", "newstest2013", "en", "de"),),
        test=(_news_test("test-full", "newstest2014-deen", "en", "de"),),
    ),
    "wmt14-en-fr": ArchiveCorpus(
        "en",
        "fr",
        train=(
            *_ENGLISH_FRENCH_EXCEPT_NEWS,
            _parallel("training-parallel-nc-v9", "news-commentary-v9.fr-en", "en", "fr"),
        ),
        valid=(_news_test("dev", "newstest2013", "en", "fr"),),
        test=(_news_test("test-full", "newstest2014-fren", "en", "fr"),),
    ),
    "wmt13-en-fr": ArchiveCorpus(
        "en",
        "fr",
        train=(
            *_ENGLISH_FRENCH_EXCEPT_NEWS,
            _parallel("training-parallel-nc-v8", "news-commentary-v8.fr-en", "en", "fr"),
        ),
        valid=(_news_test("dev", "newstest2012", "en", "fr"),),
        # This archive has every language's text as a source, and no references.
        test=(TextPair("test", "newstest2013-src.en.sgm", "newstest2013-src.fr.sgm"),),
    ),
    "iwslt14-de-en": ArchiveCorpus(
        "de",
        "en",
        train=(_talks("train.tags"),),
        test=(
            _talks("IWSLT14.TED.dev2010", ".xml"),
            _talks("IWSLT14.TEDX.dev2012", ".xml"),
            _talks("IWSLT14.TED.tst2010", ".xml"),
            _talks("IWSLT14.TED.tst2011", ".xml"),
            _talks("IWSLT14.TED.tst2012", ".xml"),
        ),
        # The customary preparation of this corpus; its published scores rest on it.
        valid_every=23,
        lowercase=True,
        max_words=175,
        vocabulary_size=10_000,
        character_coverage=1.0,
    ),
}
