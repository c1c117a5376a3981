"""Translate standard input with an exported student."""

from __future__ import annotations

import argparse
import codecs
import os
import signal
import sys
from collections.abc import Sequence
from itertools import islice

from .manifest import StandaloneError
from .translator import StandaloneTranslator

BUFFER_SIZE = 10_000


def main(words: Sequence[str] | None = None) -> int:
    """Translate standard input to standard output, line by line."""
    parser = argparse.ArgumentParser(description="Translate lines with an exported student.")
    parser.add_argument("model", help="folder that fairseq-vqem export has written")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--latent-beam", type=int, help="beam of the latent search")
    parser.add_argument(
        "--buffer-size",
        type=int,
        default=BUFFER_SIZE,
        help="lines that are read before they are translated; 1 answers each line at once"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="answer a line that is too long or not UTF-8 with an empty one instead of stopping",
    )
    arguments = parser.parse_args(words)
    try:
        _translate(arguments)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (StandaloneError, OSError) as error:
        print(f"standalone: error: {error}", file=sys.stderr)
        return 1
    return 0


def _translate(arguments: argparse.Namespace) -> None:
    if arguments.buffer_size < 1:
        raise StandaloneError(f"--buffer-size is {arguments.buffer_size}: it must be positive")
    if arguments.threads is not None and arguments.threads < 1:
        raise StandaloneError(f"--threads is {arguments.threads}: it must be positive")
    translator = StandaloneTranslator(
        arguments.model, arguments.threads, latent_beam=arguments.latent_beam
    )
    numbered = enumerate(sys.stdin.buffer, start=1)
    while buffer := list(islice(numbered, arguments.buffer_size)):
        sources = [_encoded(translator, *line, arguments.skip_bad_lines) for line in buffer]
        output = "".join(f"{line}\n" for line in translator.translate_encoded(sources))
        sys.stdout.buffer.write(output.encode("utf-8"))
        sys.stdout.buffer.flush()


def _encoded(translator: StandaloneTranslator, number: int, line: bytes, skip: bool) -> list[int]:
    """Source ids of a line; a bad one is as an empty one where such are to be skipped."""
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)  # it is no part of the first word
    try:
        text = line.removesuffix(b"\n").decode("utf-8")
        return translator.encode([text], first_line=number)[0]
    except UnicodeDecodeError:
        problem = f"Line {number} is not UTF-8 text."
    except StandaloneError as error:
        problem = str(error)
    if not skip:
        raise StandaloneError(problem)
    print(f"standalone: warning: {problem}", file=sys.stderr)
    return translator.encode([""])[0]
