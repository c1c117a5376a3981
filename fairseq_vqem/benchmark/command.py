"""``fairseq-vqem bench``: time parts of the model by themselves."""

from __future__ import annotations

import argparse

from fairseq_vqem.benchmark import bottleneck, decoding


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``fairseq-vqem bench`` with its parts."""
    bench = subparsers.add_parser("bench", help="time parts of the model by themselves")
    parts = bench.add_subparsers(dest="part", required=True, metavar="PART")
    for module in (bottleneck, decoding):
        module.register(parts)
