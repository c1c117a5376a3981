"""Code statistics against planted codes and brute force; one tiny model from end to end."""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_api import PAIRS, SPLITS, make_data
from tiny_student import make_student

from fairseq_vqem.analysis import codes as command
from fairseq_vqem.analysis.code_records import (
    END,
    Coded,
    CodedSentence,
    analyse,
    evenly,
    windows_of,
)
from fairseq_vqem.analysis.code_statistics import (
    LEAST_SHARE,
    LEAST_TOGETHER,
    Windows,
    entropy,
    mutual_information,
    permuted,
    position_information,
    top_words,
    word_information,
    words_per_code,
)
from fairseq_vqem.analysis.codes import encode_split
from fairseq_vqem.analysis.codes_report import render
from fairseq_vqem.analysis.posterior import posterior_batches
from fairseq_vqem.analysis.words import Word, length_of, words_of, words_of_pieces
from fairseq_vqem.benchmark.signature import read_result
from fairseq_vqem.errors import UserError

# --- words --------------------------------------------------------------------------------------


def spans(words: Sequence[Word]) -> list[tuple[str, int, int]]:
    return [(word.text, word.first, word.last) for word in words]


def test_pieces_become_words() -> None:
    pieces = ["▁Öff", "net", "▁", "den", "▁Dialog", "▁(F", "1", ").", "▁Text-", "Datei"]
    assert spans(words_of_pieces(pieces, "sentencepiece")) == [
        ("Öffnet", 0, 1),
        ("den", 3, 3),
        ("Dialog", 4, 4),
        ("(", 5, 5),
        ("F1", 5, 6),
        (")", 7, 7),
        (".", 7, 7),
        ("Text-Datei", 8, 9),
    ]
    pieces = ["Öff@@", "net", "den", "Dia@@", "log@@", "."]
    expected = [("Öffnet", 0, 1), ("den", 2, 2), ("Dialog", 3, 4), (".", 5, 5)]
    assert spans(words_of_pieces(pieces, "subword-nmt")) == expected
    assert words_of_pieces([], "sentencepiece") == []
    assert words_of("Öffnet (F1).") == ["Öffnet", "(", "F1", ")", "."]
    assert words_of("打开PDF文件3。") == ["打", "开", "PDF", "文", "件", "3", "。"]
    assert length_of("打开 PDF文件3。") == 6 and length_of(" Opens (F1). ") == 2


# --- statistics ---------------------------------------------------------------------------------


def planted(codes: Sequence[int], words: Sequence[int], places: Sequence[int] = ()) -> Windows:
    """One word per window, window i in sentence i unless ``places`` say otherwise."""
    count = len(codes)
    names, dense = np.unique(np.array(codes), return_inverse=True)
    return Windows(
        dense,
        names,
        np.array(places or [0] * count),
        np.zeros(count, dtype=np.int64),
        np.arange(count),
        np.array(words),
        [f"w{number}" for number in range(max(words) + 1)],
    )


def test_a_code_that_is_the_word_has_the_words_own_information() -> None:
    times = {0: 8, 1: 4, 2: 4}
    words = [word for word, count in times.items() for _ in range(count)]
    windows = planted([word + 5 for word in words], words)
    pmi, tf_idf = top_words(windows)
    for word, count in times.items():
        (best,) = pmi[word]
        assert (best.word, best.together) == (f"w{word}", count)
        assert best.score == pytest.approx(math.log2(16 / count))
        assert tf_idf[word][0].score == pytest.approx(math.log(3), abs=1e-4)
    information, words_of_codes = word_information(windows, 200, seed=0)
    assert information.bits == pytest.approx(1.5) == information.ceiling
    assert 0 < information.chance < 0.5 and information.share == pytest.approx(1.0)
    assert information.p == pytest.approx(1 / 201)
    assert words_of_codes.entropy.tolist() == [0, 0, 0] and (words_of_codes.information_z > 2).all()
    expected = [math.log2(16 / count) for count in times.values()]
    assert words_of_codes.information.tolist() == pytest.approx(expected)
    assert (words_of_codes.entropy_by_chance > 0.5).all() and words_of_codes.telling.any()


@pytest.mark.parametrize("seed", range(5))
def test_random_codes_are_at_the_level_of_chance(seed: int) -> None:
    generator = np.random.default_rng(seed)
    words = generator.integers(0, 40, 600).tolist()
    codes = generator.integers(0, 30, 600).tolist()
    information, single = word_information(planted(codes, words), 100, seed=1)
    assert information.bits > 0.9  # the raw number alone would pass for information
    assert abs(information.bits - information.chance) < 4 * information.chance_deviation
    assert information.share is not None and abs(information.share) < 0.05
    assert information.p > 0.01 and single.telling.sum() <= 1
    assert abs(single.entropy_z.mean()) < 0.7 and abs(single.information_z.mean()) < 0.7
    assert 0 < single.telling_by_chance < 0.02


def test_mutual_information_equals_brute_force() -> None:
    generator = np.random.default_rng(3)
    one = generator.integers(0, 5, 200)
    other = (one + generator.integers(0, 3, 200)) % 7
    table = np.zeros((5, 7))
    np.add.at(table, (one, other), 1 / 200)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = table * np.log2(table / (table.sum(1, keepdims=True) * table.sum(0)))
    assert mutual_information(one, other) == pytest.approx(np.nansum(terms))
    assert mutual_information(one, np.zeros_like(one)) == pytest.approx(0)
    entropies, divergences = words_per_code(one, other, 6)
    everywhere = table.sum(0)
    for code in range(5):
        own = table[code] / table[code].sum()
        assert entropies[code] == pytest.approx(entropy(own))
        with np.errstate(divide="ignore", invalid="ignore"):
            assert divergences[code] == pytest.approx(np.nansum(own * np.log2(own / everywhere)))
    assert np.isnan(entropies[5]) and np.isnan(divergences[5])
    assert (divergences[:5] * table.sum(1)).sum() == pytest.approx(mutual_information(one, other))


def test_entropy_of_counts() -> None:
    assert entropy(np.array([1, 1, 0, 2])) == pytest.approx(1.5)
    assert entropy(np.array([7])) == 0 == entropy(np.array([]))


def test_permutation_stays_within_strata() -> None:
    generator = np.random.default_rng(0)
    strata = generator.integers(0, 4, 100)
    codes = np.arange(100)
    drawn = permuted(codes, strata, generator)
    assert (drawn != codes).sum() > 50
    for stratum in range(4):
        assert sorted(drawn[strata == stratum]) == codes[strata == stratum].tolist()


def test_codes_that_only_know_the_position() -> None:
    """Words and codes both depend on the place, and on nothing else."""
    generator = np.random.default_rng(2)
    places = generator.integers(0, 4, 800)
    words = places * 5 + generator.integers(0, 5, 800)
    codes = places * 3 + generator.integers(0, 3, 800)
    windows = planted(codes.tolist(), words.tolist(), places.tolist())
    anywhere, _ = word_information(windows, 50, seed=0)
    here, _ = word_information(windows, 50, seed=0, same_position=True)
    assert anywhere.share is not None and anywhere.share > 0.5
    assert here.bits == anywhere.bits and abs(here.bits - here.chance) < 0.05 and here.p > 0.02
    position = position_information(windows.codes, windows.places, 50, seed=0)
    assert position.bits == pytest.approx(entropy(np.bincount(places))) and position.p < 0.05


def test_top_words_equal_brute_force() -> None:
    generator = np.random.default_rng(5)
    words = generator.integers(0, 12, 300).tolist()
    codes = [(word // 2 + int(generator.integers(0, 3))) % 7 for word in words]
    windows = planted(codes, words)
    pmi, tf_idf = top_words(windows)
    together = Counter(zip(codes, words, strict=True))
    by_code, by_word = Counter(codes), Counter(words)
    documents = Counter(word for _, word in together)
    for code in by_code:
        met = {word: n for (c, word), n in together.items() if c == code}
        by_pmi = {
            f"w{word}": math.log2(n * 300 / (by_code[code] * by_word[word]))
            for word, n in met.items()
            if n >= max(LEAST_TOGETHER, LEAST_SHARE * by_code[code])
        }
        by_tf_idf = {
            f"w{word}": n / by_code[code] * math.log(7 / documents[word]) for word, n in met.items()
        }
        for found, wanted in ((pmi[code], by_pmi), (tf_idf[code], by_tf_idf)):
            scores = [each.score for each in found]
            assert scores == pytest.approx(sorted(wanted.values(), reverse=True)[:8], abs=1e-4)
            assert all(each.score == pytest.approx(wanted[each.word], abs=1e-4) for each in found)


def test_narrow_codes_and_codes_of_rare_words_both_tell() -> None:
    """Code 0 always covers the commonest word; code 1 words of its own, each of them once."""
    generator = np.random.default_rng(1)
    rest = generator.integers(1, 30, 400).tolist()
    words = [0] * 40 + list(range(30, 70)) + rest + [0] * 1000
    codes = [0] * 40 + [1] * 40 + generator.integers(2, 20, 1400).tolist()
    _, single = word_information(planted(codes, words), 100, seed=0)
    assert single.entropy_z[0] < -3 and single.information_z[1] > 3
    assert single.information_z[0] < 1 and single.entropy_z[1] > -1  # blind to the other's kind
    assert single.telling[:2].all() and single.telling[2:].sum() <= 2


def test_pmi_leaves_out_what_is_rare_among_many() -> None:
    windows = planted([0] * 500 + [1] * 500, [0] * 496 + [1] * 4 + [0] * 100 + [2] * 400)
    pmi, _ = top_words(windows)
    assert [word.word for word in pmi[0]] == ["w0"]  # w1: four times of 500
    assert [word.word for word in pmi[1]] == ["w2", "w0"]


# --- sentences ----------------------------------------------------------------------------------


def sentence(codes: list[int], words: list[tuple[str, int, int]], pieces: int) -> CodedSentence:
    return CodedSentence(
        codes, [*(Word(*word) for word in words), Word(END, pieces, pieces)], pieces + 1
    )


def coded(pad_code: int | None = None) -> Coded:
    """Windows of two positions; the second sentence is padded by two codes 9."""
    first = sentence([4, 7], [("ab", 0, 0), ("cde", 1, 2)], 3)
    second = sentence([4, 9, 9], [("ab", 0, 0)], 1)
    return Coded([first, second], [], 2, 16, pad_code)


def test_words_belong_to_every_code_that_covers_a_piece_of_them() -> None:
    windows = windows_of(coded())
    pairs = [
        (int(windows.names[windows.codes[w]]), windows.vocabulary[v])
        for w, v in zip(windows.window, windows.word, strict=True)
    ]
    assert pairs == [(4, "ab"), (4, "cde"), (7, "cde"), (7, END), (4, "ab"), (4, END)]
    assert windows.places.tolist() == [0, 1, 0, 1, 2]
    assert windows.from_end.tolist() == [1, 0, 0, -1, -1]
    assert windows.empty.tolist() == [0, 0, 0, 1, 1]


def test_analysis_of_two_sentences() -> None:
    result = analyse(coded(pad_code=9), "test", 10, seed=0)
    assert (result.latents, result.used, result.pairs, result.vocabulary) == (5, 3, 6, 3)
    assert result.perplexity == pytest.approx(2 ** entropy(np.array([2, 1, 2])))
    four, nine, seven = result.codes
    assert (four.code, four.uses, four.words, four.distinct) == (4, 2, 4, 3)
    assert four.entropy == pytest.approx(1.5) and four.first == 1 and four.last == 0.5
    assert four.contexts == [("", "ab cde", END), ("", f"ab {END}", "")]
    assert (nine.code, nine.words, nine.entropy, nine.telling) == (9, 0, None, False)
    assert nine.information is None and nine.entropy_z is None
    assert nine.entropy_by_chance is None and nine.pmi == [] == nine.tf_idf
    assert seven.code == 7 and seven.contexts == [("ab", f"cde {END}", "")]
    assert [(place.place, place.windows) for place in result.places] == [
        *(("1", 2), ("2", 2), ("3", 1), ("last", 2))
    ]
    ending = result.ending
    assert ending is not None and ending.windows_after_end == 2
    assert ending.share_after_end == 1 and ending.share_before_end == 0
    assert ending.commonest_after_end == 9 and ending.sentences == 0.5
    assert "It is the EOS/PAD latent" in render(result)
    collapsed = replace(result, ending=replace(ending, share_before_end=1.0))
    assert "marks no end" in render(collapsed)
    assert "It is the EOS/PAD latent" not in render(collapsed)
    assert "explicit symbol" in render(analyse(coded(), "test", 10, seed=0))


def test_a_code_that_does_not_pad_is_not_called_so() -> None:
    result = analyse(coded(pad_code=4), "test", 10, seed=0)
    assert "no reliable EOS/PAD latent" in render(result)
    assert "commonest code after the end is 9" in render(result)


def test_evenly_spaced() -> None:
    assert evenly(10, 2) == [2, 7] and evenly(3, 5) == [0, 1, 2] and evenly(4, 0) == []


# --- a model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    data = make_data(folder)
    make_student(data, folder / "student.pt")
    make_student(data, folder / "padded.pt", "--latent-length", "source")
    return folder


def run(folder: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    command.register(parser.add_subparsers())
    arguments = parser.parse_args(["codes", "--data", str(folder / "data"), *words])
    status: int = arguments.run(arguments)
    return status


def test_codes_are_the_posteriors_in_the_order_of_the_data(folder: Path) -> None:
    found = encode_split(str(folder / "student.pt"), folder / "data", "test", examples=2)
    assert [words_of(target) for _, target in SPLITS["test"]] == [
        [word.text for word in each.words[:-1]] for each in found.sentences
    ]
    assert [each.source for each in found.examples] == [SPLITS["test"][n][0] for n in (1, 3)]
    assert found.examples[0].posterior == found.sentences[1].codes and found.pad_code is None
    for each in found.sentences:
        assert len(each.codes) == -(-each.positions // 4)
        assert max(word.last for word in each.words) == each.positions - 1
    for _, model, sample in posterior_batches(
        str(folder / "student.pt"), folder / "data", "test", "cpu"
    ):
        with torch.no_grad():
            output = model(**sample["net_input"], target=sample["target"])
        expected = output.latent_tokens[:, :-1][output.latent_mask] - model.latent_dictionary.offset
        rows = [code for n in sample["id"].tolist() for code in found.sentences[n].codes]
        assert rows == expected.tolist()


class Resources(HTMLParser):
    """Collects tags that would load something, and counts rows of the table of codes."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.rows += tag == "tr"
        given = dict(attrs)
        if tag in ("link", "img", "iframe", "object") or "src" in given or "href" in given:
            self.loads.append(tag)


def test_command_writes_a_signed_result_and_a_page_of_its_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--checkpoint", str(folder / "student.pt"), "--out", str(tmp_path))
    assert run(folder, *words, "--split", "train", "--permutations", "20") == 0
    result = read_result(tmp_path / "codes.json")
    assert result["sentences"] == len(PAIRS) and len(result["codes"]) == result["used"]
    uses = [code["uses"] for code in result["codes"]]
    assert sum(uses) == result["latents"] and uses == sorted(uses, reverse=True)
    assert sum(code["words"] for code in result["codes"]) == result["pairs"]
    assert result["signature"]["data_checksum"] and result["ending"] is None
    page = (tmp_path / "codes.html").read_text("utf-8")
    parser = Resources()
    parser.feed(page)
    assert not parser.loads and not re.search(r"url\(|@import|https?://", page)
    # three headings, four lines on bits shared
    assert parser.rows == 3 + 4 + len(result["places"]) + result["used"]
    printed = capsys.readouterr().out
    assert "explicit symbol" in printed
    for example in result["examples"]:
        assert f"posterior   {' '.join(map(str, example['posterior']))}" in printed
    assert len(result["examples"]) == 8


def test_padding_model_reports_its_pad_latent(folder: Path, tmp_path: Path) -> None:
    words = ("--checkpoint", str(folder / "padded.pt"), "--out", str(tmp_path))
    assert run(folder, *words, "--permutations", "20", "--examples", "1") == 0
    result = read_result(tmp_path / "codes.json")
    after = result["ending"]["windows_after_end"]
    found = encode_split(str(folder / "padded.pt"), folder / "data", "test")
    lengths = [(len(each.codes), -(-each.positions // 4)) for each in found.sentences]
    assert after == sum(codes - real for codes, real in lengths) > 0
    assert result["ending"]["code"] == found.pad_code


def test_mistakes_are_user_errors(folder: Path, tmp_path: Path) -> None:
    words = ("--checkpoint", str(folder / "student.pt"), "--out", str(tmp_path))
    with pytest.raises(UserError, match="no tset split"):
        run(folder, *words, "--split", "tset")
    with pytest.raises(UserError, match="--permutations must be"):
        run(folder, *words, "--permutations", "19")
    with pytest.raises(UserError, match="does not exist"):
        run(folder, "--checkpoint", "none.pt", "--out", str(tmp_path))
    state = torch.load(folder / "student.pt", weights_only=False)
    state["cfg"]["task"] |= {"source_lang": "de", "target_lang": "en"}
    torch.save(state, folder / "reverse.pt")
    with pytest.raises(UserError, match=r"reverse\.pt translates de-en and .* is en-de"):
        run(folder, "--checkpoint", str(folder / "reverse.pt"), "--out", str(tmp_path))
    assert not list(tmp_path.iterdir())
