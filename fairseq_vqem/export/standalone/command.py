"""Translate standard input with an exported student."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .manifest import StandaloneError
from .translator import StandaloneTranslator


def main(words: Sequence[str] | None = None) -> int:
    """Translate standard input to standard output, line by line."""
    parser = argparse.ArgumentParser(description="Translate lines with an exported student.")
    parser.add_argument("model", help="folder that fairseq-vqem export has written")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--latent-beam", type=int, help="beam of the latent search")
    arguments = parser.parse_args(words)
    try:
        translator = StandaloneTranslator(
            arguments.model, arguments.threads, latent_beam=arguments.latent_beam
        )
        # a byte order mark is no part of the first word
        lines = sys.stdin.buffer.read().decode("utf-8-sig").split("\n")
        lines = lines if lines[-1] else lines[:-1]  # the last line end ends a line
        output = "".join(f"{line}\n" for line in translator.translate(lines))
    except UnicodeDecodeError:
        print("standalone: error: the input is not UTF-8 text", file=sys.stderr)
        return 1
    except StandaloneError as error:
        print(f"standalone: error: {error}", file=sys.stderr)
        return 1
    try:
        sys.stdout.buffer.write(output.encode("utf-8"))
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"standalone: error: {error}", file=sys.stderr)
        return 1
    return 0
