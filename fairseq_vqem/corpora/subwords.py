"""Subword models behind one small interface: SentencePiece (default) and subword-nmt."""

from __future__ import annotations

import io
import itertools
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

from fairseq_vqem.corpora.files import file_sha256, read_lines, replacing, write_lines
from fairseq_vqem.errors import UserError

SENTENCEPIECE = "sentencepiece"
SUBWORD_NMT = "subword-nmt"
KINDS = (SENTENCEPIECE, SUBWORD_NMT)

MAX_TRAINING_LINES = 2_000_000
LINES_AT_ONCE = 20_000
# SentencePiece sums expected counts per thread, so another number of threads gives another model.
TRAINING_THREADS = 2
RANDOM_SEED = 1
WORD_START = "\u2581"
JOINER = "@@"
RARE = 0.01  # share of a dictionary's symbols
FAIRSEQ_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
# A piece list has <unk>, <s> and </s>; a fairseq dictionary has <s>, <pad>, </s> and <unk>.
SENTENCEPIECE_TO_FAIRSEQ_SPECIALS = 1


class SubwordModel(ABC):
    """Splits lines into space-separated pieces and joins them again.

    White space is not kept exactly: runs of it become one space, and it is removed at both ends.
    All else comes back unchanged, except for the mark of the model itself (U+2581 for
    SentencePiece, a word ending in ``@@`` for subword-nmt). An empty line gives an empty line.
    """

    kind: str
    file_name: str
    post_process: str
    """fairseq's ``--post-process`` that joins the pieces."""
    mark: str
    """What marks a piece that goes on a word, or begins one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def path(self) -> Path:
        """The one file that holds the model."""
        return self.directory / self.file_name

    @property
    def checksum(self) -> str:
        """Hexadecimal SHA-256 of the model file."""
        return file_sha256(self.path)

    @property
    def dictionary_limit(self) -> int | None:
        """Most symbols a fairseq dictionary needs, its four special ones included; None: no limit.

        With a character coverage below 1.0 the pieces of encoded text include characters that the
        model does not know; the limit keeps them out of the dictionary.
        """
        return None

    @abstractmethod
    def encode(self, line: str) -> str:
        """Return the pieces of `line`, joined by single spaces."""

    @abstractmethod
    def decode(self, pieces: str) -> str:
        """Return the line that `pieces` came from."""

    @classmethod
    def joined_by(cls, symbol: str) -> bool:
        """Whether ``symbol``, as fairseq's ``--post-process``, joins the pieces."""
        return symbol.strip() in (cls.post_process, cls.mark)

    def encode_lines(self, lines: Iterable[str]) -> Iterator[str]:
        """Encode line by line; one output line for each input line."""
        return map(self.encode, lines)


class SentencePieceModel(SubwordModel):
    """A joint unigram model; unknown characters stay visible as pieces of their own."""

    kind = SENTENCEPIECE
    file_name = "sentencepiece.model"
    post_process = "sentencepiece"
    mark = WORD_START

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self.path} is not a SentencePiece model; train it again.") from error

    @property
    def dictionary_limit(self) -> int | None:
        return self._processor.get_piece_size() + SENTENCEPIECE_TO_FAIRSEQ_SPECIALS

    def encode(self, line: str) -> str:
        return " ".join(self._processor.encode(" ".join(line.split()), out_type=str))

    def encode_lines(self, lines: Iterable[str]) -> Iterator[str]:
        """As `encode`, on all processors."""
        texts = (" ".join(line.split()) for line in lines)
        while chunk := list(itertools.islice(texts, LINES_AT_ONCE)):
            yield from map(" ".join, self._processor.encode(chunk, out_type=str, num_threads=-1))

    def decode(self, pieces: str) -> str:
        # The same rule as fairseq's `--post-process sentencepiece`.
        return pieces.replace(" ", "").replace(WORD_START, " ").strip()


class SubwordNmtModel(SubwordModel):
    """Joint byte-pair encoding of text whose tokens are separated by white space."""

    kind = SUBWORD_NMT
    file_name = "bpe.codes"
    post_process = "subword_nmt"
    mark = JOINER

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        with self.path.open(encoding="utf-8") as codes:
            try:
                self._bpe = BPE(codes, separator=JOINER)
            # subword-nmt leaves the process when a line of the codes file is malformed.
            except (ValueError, IndexError, SystemExit) as error:
                raise UserError(f"{self.path} is not a BPE codes file; train it again.") from error

    def encode(self, line: str) -> str:
        pieces = self._bpe.segment(" ".join(line.split())).split()
        # written out in a text, they would become fairseq's own ends of sentences and padding
        return " ".join(
            f"{piece[0]}{JOINER} {piece[1:]}" if piece in FAIRSEQ_SPECIALS else piece
            for piece in pieces
        )

    def decode(self, pieces: str) -> str:
        # The same rule as fairseq's `--post-process subword_nmt`.
        return (pieces + " ").replace(JOINER + " ", "").rstrip()


_MODELS: dict[str, type[SubwordModel]] = {
    SENTENCEPIECE: SentencePieceModel,
    SUBWORD_NMT: SubwordNmtModel,
}
SUBWORD_FILES = tuple(model.file_name for model in _MODELS.values())


def post_process_of(symbols: Sequence[str], data: str | None = None) -> str | None:
    """fairseq's ``--post-process`` that joins subwords, None for whole words.

    Args:
        symbols: of the dictionary. Where no subword model lies in the data's folder, they tell: a
            few marks prove nothing, for texts may have the mark of sentencepiece, too, but a
            vocabulary of characters has one mark alone.
        data: fairseq's ``DATA``: folders, separated by colons.
    """
    folder = Path(data.split(os.pathsep)[0]) if data else Path()
    found = [model for model in _MODELS.values() if data and (folder / model.file_name).is_file()]
    if len(found) == 1:
        return found[0].post_process
    fillers = ("madeupword", *FAIRSEQ_SPECIALS)  # fairseq's own
    own = [symbol for symbol in symbols if not symbol.startswith(fillers)]
    marked = sum(symbol.startswith(WORD_START) or symbol.endswith(WORD_START) for symbol in own)
    joined = sum(symbol.endswith(JOINER) for symbol in own)
    characters = WORD_START in own and all(len(symbol) == 1 for symbol in own)
    if characters or (marked > joined and marked >= RARE * len(own)):
        return SentencePieceModel.post_process
    return SubwordNmtModel.post_process if joined and joined >= RARE * len(own) else None


def checked_post_process(given: str | None, symbols: Sequence[str], data: str) -> str | None:
    """``given``, what --eval-bleu-remove-bpe says, or else `post_process_of` the data.

    Raises:
        UserError: ``given`` joins the other kind of subwords, so that scores would be of nothing.
    """
    own = post_process_of(symbols, data)
    if not given:
        return own
    kinds = [model.post_process for model in _MODELS.values() if model.joined_by(given)]
    if own is not None and kinds and own not in kinds:
        raise UserError(
            f"--eval-bleu-remove-bpe {given} does not join the subwords of {data}, which are those"
            f" of {own}: leave it out"
        )
    return given


def load_subwords(directory: Path) -> SubwordModel:
    """Load whichever model lies in `directory` (also a binarised data directory).

    Raises:
        UserError: there is none, there is more than one, or it is damaged.
    """
    found = [model for model in _MODELS.values() if (directory / model.file_name).is_file()]
    if len(found) != 1:
        names = " or ".join(model.file_name for model in _MODELS.values())
        problem = "has several subword models" if found else "has no subword model"
        raise UserError(f"{directory} {problem}; it must hold exactly one of {names}.")
    return found[0](directory)


def adopt_subwords(path: Path, directory: Path) -> SubwordModel:
    """Copy a model that was trained elsewhere into ``directory``, the only one there.

    Raises:
        UserError: ``path`` is neither a SentencePiece model nor codes of subword-nmt.
    """
    if not path.is_file():
        raise UserError(f"The subword model {path} does not exist; check the path.")
    content = path.read_bytes()
    if re.fullmatch(rb"(\S+ \d+\n)+", content):
        raise UserError(f"{path} is a dictionary, no subword model: give it as --dictionary.")
    kind = _kind_of(content)
    if kind is None:
        raise UserError(
            f"{path} is neither a SentencePiece model nor BPE codes as subword-nmt writes them."
        )
    if kind is SentencePieceModel and _has_bytes(content):
        raise UserError(
            f"{path} writes unknown characters as bytes (byte_fallback), which neither fairseq's"
            " --post-process nor anything here puts together again: give one without."
        )
    directory.mkdir(parents=True, exist_ok=True)
    for name in SUBWORD_FILES:
        (directory / name).unlink(missing_ok=True)
    with replacing(directory / kind.file_name) as temporary:
        temporary.write_bytes(content)
    return kind(directory)


def _has_bytes(content: bytes) -> bool:
    """Whether a SentencePiece model has pieces that stand for a byte."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    return any(processor.is_byte(piece) for piece in range(processor.get_piece_size()))


def _kind_of(content: bytes) -> type[SubwordModel] | None:
    for kind in _MODELS.values():
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / kind.file_name).write_bytes(content)
            try:
                kind(Path(folder))
            except UserError:
                continue
            return kind
    return None


def train_subwords(
    kind: str,
    files: Sequence[Path],
    size: int,
    directory: Path,
    *,
    character_coverage: float = 1.0,
) -> SubwordModel:
    """Train one joint model on all `files`; the same input always gives the same model.

    Args:
        kind: ``sentencepiece`` (unigram) or ``subword-nmt`` (byte-pair encoding).
        files: plain text, one sentence a line; at most 2 million lines are used, evenly spaced.
        size: number of pieces for SentencePiece, of merge operations for subword-nmt.
        directory: receives ``sentencepiece.model`` or ``bpe.codes``.
        character_coverage: share of characters SentencePiece must know; 1.0 keeps all of them.

    Raises:
        UserError: unknown kind, missing or empty files, or a size that the text cannot fill.
    """
    if kind not in _MODELS:
        raise UserError(f"Unknown subword kind {kind!r}; choose one of {', '.join(KINDS)}.")
    lines = list(_training_lines(files))
    if not lines:
        raise UserError(f"There is no text to train subwords on in {', '.join(map(str, files))}.")
    path = directory / _MODELS[kind].file_name
    if kind == SENTENCEPIECE:
        _train_sentencepiece(lines, size, path, character_coverage)
    else:
        _train_subword_nmt(lines, size, path)
    return _MODELS[kind](directory)


def _training_lines(files: Sequence[Path]) -> Iterator[str]:
    total = sum(1 for path in files for _ in read_lines(path))
    step = max(1, -(-total // MAX_TRAINING_LINES))
    number = 0
    for path in files:
        for line in read_lines(path):
            words = line.split()
            if words and number % step == 0:
                yield " ".join(words)
            number += 1


def _train_sentencepiece(lines: list[str], size: int, path: Path, coverage: float) -> None:
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(RANDOM_SEED)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            character_coverage=coverage,
            byte_fallback=False,
            # Text must come back unchanged, so that scores compare with the raw references.
            normalization_rule_name="identity",
            shuffle_input_sentence=False,
            num_threads=TRAINING_THREADS,
            max_sentence_length=16384,
            minloglevel=1,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise UserError(
            f"SentencePiece cannot make {size} pieces from this text ({reason}); "
            "choose another vocabulary size."
        ) from error
    with replacing(path) as temporary:
        temporary.write_bytes(model.getvalue())


def _train_subword_nmt(lines: list[str], size: int, path: Path) -> None:
    codes = io.StringIO()
    try:
        learn_bpe(_NamedLines("\n".join(lines)), codes, size)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"subword-nmt cannot learn {size} merges from this text; choose a smaller number."
        ) from error
    write_lines(path, codes.getvalue().rstrip("\n").split("\n"))


class _NamedLines(io.StringIO):
    # subword-nmt looks at the name of its input to recognise standard input.
    name = "lines"
