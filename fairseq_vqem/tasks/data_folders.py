"""What every translation task checks before fairseq looks into its data."""

from __future__ import annotations

from pathlib import Path

from fairseq import utils

from fairseq_vqem.errors import UserError


def check_data_folders(data: str | None) -> None:
    """Raise ``UserError`` where a folder of fairseq's argument ``data`` does not exist."""
    for folder in utils.split_paths(data or ""):
        if not folder or not Path(folder).is_dir():
            raise UserError(
                f"the data folder {folder} does not exist: give the output folder of"
                " fairseq-vqem prepare or fairseq-preprocess"
            )
