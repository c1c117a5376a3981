"""What an artefact says of itself, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "fairseq_vqem-export"
FORMAT_VERSION = 6  # which knows directed acyclic graphs
EARLIER_VERSIONS = (5,)
VERSIONS_WITHOUT_CODES = (3, 4)  # are read where there are no codes: one graph made each code
MANIFEST = "manifest.json"
GREEDY, BEAM = "greedy", "beam"  # the searches for codes
SCORE = "score"  # the teacher's graph, where candidates are re-scored
PROBE = "probe"  # tells whether the processor multiplies integers exactly
READ_CHUNK = 1 << 20
NO_LIMIT = 2**30  # more tokens than any text has, and still an integer of the graphs


class StandaloneError(Exception):
    """The artefact, the installation or a sentence is unfit; the message says what to do."""


@dataclass(frozen=True)
class Options:
    """How an artefact decodes; written by the export, see its manifest.

    Attributes:
        latent_beam: code sequences kept per sentence; 1 is greedy.
        marginal_end: end where that is likelier than all codes together, not only than the best.
        fixed_length: the number of codes follows from the source length; no end is predicted.
        max_ratio, max_offset: a hypothesis covers at most ``ratio·|x| + offset`` positions.
        stop_code: a code that ends the hypothesis (the EOS/PAD latent), or None.
        remove_repeats: collapse runs of one token.
        positions_per_code: output positions that one code covers.
        codes: size of the codebook; 0 for a model without latents.
        max_source_tokens, max_target_tokens: positions the model has.
        collapse: words come from CTC frames: merge runs, then drop the blank, which is 0.
        candidates: code sequences decoded, or sentences found by the frame beam, of which the
            teacher chooses; 1 without a teacher.
        source_start: sources begin with the beginning-of-sentence symbol.
        frame_beam: sentences kept by the prefix beam search over CTC frames, or lengths of paths
            through a graph; 1 takes the words of the best frames, or of the path that looks ahead.
        length_reward: added to a beam's log-probability for each code.
        graph: words come from the vertices of a directed acyclic graph.

    Raises:
        StandaloneError: the latent beam is not between the candidates and the number of codes.
    """

    latent_beam: int
    marginal_end: bool
    fixed_length: bool
    max_ratio: float
    max_offset: int
    stop_code: int | None
    remove_repeats: bool
    positions_per_code: int
    codes: int
    max_source_tokens: int
    max_target_tokens: int
    collapse: bool = False
    candidates: int = 1
    source_start: bool = False
    frame_beam: int = 1
    length_reward: float = 0.0
    graph: bool = False

    def __post_init__(self) -> None:
        if not self.codes:
            if self.latent_beam != 1:
                raise StandaloneError("This model has no latents; leave out the latent beam.")
        elif not self.candidates <= self.latent_beam <= self.codes:
            raise StandaloneError(
                f"A latent beam of {self.latent_beam} is impossible with {self.codes} codes and"
                f" {self.candidates} candidates; choose {self.candidates} to {self.codes}."
            )

    def most_codes(self, source_tokens: int) -> int:
        """Codes that a hypothesis for a source of so many tokens may have."""
        if self.fixed_length:
            longest = 2 * source_tokens
        else:  # in float32, as the model computes it
            wanted = np.ceil(np.float32(self.max_ratio) * np.float32(source_tokens))
            longest = min(int(min(wanted, NO_LIMIT)) + self.max_offset, self.max_target_tokens)
        return max(1, -(-longest // self.positions_per_code))

    @property
    def table_codes(self) -> int:
        """Codes that the graphs' tables of positions are long enough for."""
        longest = 2 * self.max_source_tokens if self.fixed_length else self.max_target_tokens
        return -(-longest // self.positions_per_code)


def graph_names(options: Options) -> list[str]:
    """The graphs that an artefact consists of."""
    searches = [GREEDY, BEAM] if options.codes else []
    scores = [SCORE] if options.candidates > 1 else []
    return ["encode", *searches, "decode", *scores]


def search_name(options: Options) -> str:
    """The graph that searches for the codes."""
    return GREEDY if options.latent_beam == 1 else BEAM


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what the artefact says of itself, once every part has been found undamaged.

    Raises:
        StandaloneError: a part is missing or damaged, or the format is unknown.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise StandaloneError(
            f"{folder} is no exported model (it has no {MANIFEST}); give the folder that"
            " fairseq-vqem export has written."
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        checksum = manifest.pop("checksum")
    except (ValueError, KeyError, AttributeError) as error:
        raise StandaloneError(f"{path} is damaged; copy the folder again.") from error
    if checksum != manifest_checksum(manifest):
        raise StandaloneError(f"{path} is damaged; copy the folder again.")
    if not _is_readable(manifest):
        earlier = ", ".join(map(str, EARLIER_VERSIONS))
        oldest = " and ".join(map(str, VERSIONS_WITHOUT_CODES))
        raise StandaloneError(
            f"{folder} has format {manifest.get('format')} {manifest.get('version')}, but this"
            f" program reads {FORMAT} {FORMAT_VERSION}, {earlier}, and {oldest} without latents"
            " (3 without a teacher as well); use the standalone program in that folder or export"
            " again."
        )
    for name, expected in manifest["parts"].items():
        if not (folder / name).is_file():
            raise StandaloneError(f"{folder} lacks {name}; copy the folder again.")
        if file_sha256(folder / name) != expected:
            raise StandaloneError(f"{folder / name} is damaged; copy the folder again.")
    return manifest


def _is_readable(manifest: Mapping[str, Any]) -> bool:
    if manifest.get("format") != FORMAT:
        return False
    if manifest.get("version") in VERSIONS_WITHOUT_CODES:
        decoding = manifest["decoding"]
        fits = manifest["version"] > 3 or decoding["candidates"] == 1  # scored word by word then
        return fits and not decoding["codes"]
    return manifest.get("version") in (*EARLIER_VERSIONS, FORMAT_VERSION)


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own checksum."""
    text = json.dumps(manifest, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(READ_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
