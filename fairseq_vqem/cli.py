"""``fairseq-vqem COMMAND``: everything around fairseq-train and fairseq-generate."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import fairseq_vqem
from fairseq_vqem.analysis import codes, diagnosis, planted, posterior
from fairseq_vqem.benchmark import command as bench
from fairseq_vqem.benchmark import latency, scoring, tables
from fairseq_vqem.compare import command as compare
from fairseq_vqem.compare import pairs
from fairseq_vqem.corpora import distill, prepare
from fairseq_vqem.errors import UserError
from fairseq_vqem.export import command as export
from fairseq_vqem.images import command as images
from fairseq_vqem.peers import alignments
from fairseq_vqem.pipeline import command as pipeline

COMMANDS = (
    *(prepare, alignments, distill, pipeline, compare, pairs, export, images),
    *(posterior, codes, diagnosis, scoring, latency, bench, tables, planted),
)


def user_dir() -> str:
    """The folder to pass to fairseq's ``--user-dir``."""
    return str(Path(fairseq_vqem.__file__).parent)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fairseq-vqem", description=fairseq_vqem.__doc__)
    parser.add_argument("--version", action="version", version=fairseq_vqem.__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    folder = subparsers.add_parser("user-dir", help="print the folder for fairseq's --user-dir")
    folder.set_defaults(run=_print_user_dir)
    for module in COMMANDS:
        module.register(subparsers)
    return parser


def _print_user_dir(arguments: argparse.Namespace) -> int:
    print(user_dir())
    return 0


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; a ``UserError`` becomes one line and exit status 1."""
    arguments = build_parser().parse_args(words)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"fairseq-vqem: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read the output has gone; what had to be written is written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"fairseq-vqem: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fairseq-vqem: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _end(number: int, frame: FrameType | None) -> None:
    # By default the process would vanish and the training that it had started go on, unlogged.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
