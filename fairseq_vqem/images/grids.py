"""Pictures of pictures: grids of originals above reconstructions, of samples, of several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fairseq_vqem.corpora.files import replacing

MARGIN = 2
GAP = 8
ZOOM = 2
BACKGROUND = 255
TEXT_SIZE = 14
GROUPS_PER_BAND = 4


def tile(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Lay ``pictures`` ``[N, C, H, W]`` out by rows on white.

    Returns:
        ``[rows·(H + 2) + 2, columns·(W + 2) + 2, 3]`` uint8; C is 1 (grey) or 3.
    """
    count, channels, height, width = pictures.shape
    rows = -(-count // columns)
    size = (rows * (height + MARGIN) + MARGIN, columns * (width + MARGIN) + MARGIN, 3)
    canvas = np.full(size, BACKGROUND, np.uint8)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        top, left = row * (height + MARGIN) + MARGIN, column * (width + MARGIN) + MARGIN
        colour = np.broadcast_to(picture, (3, height, width)) if channels == 1 else picture
        canvas[top : top + height, left : left + width] = colour.transpose(1, 2, 0)
    return canvas


def write_comparison(
    path: Path, originals: np.ndarray, reconstructions: np.ndarray, columns: int = 16
) -> None:
    """Originals, and under each row of them its reconstructions, as a PNG (Figure 4)."""
    bands = []
    for start in range(0, len(originals), columns):
        part = slice(start, start + columns)
        both = np.concatenate([_filled(originals[part], columns), reconstructions[part]])
        bands.append(tile(both, columns))
    write_png(path, _stack(bands))


def write_grid(path: Path, pictures: np.ndarray, columns: int) -> None:
    """``pictures`` ``[N, C, H, W]`` by rows, as a PNG."""
    write_png(path, tile(pictures, columns))


def write_page(
    path: Path, originals: np.ndarray, runs: Mapping[str, Sequence[tuple[str, np.ndarray]]]
) -> None:
    """Reconstructions of the same pictures by several runs, side by side, as a PNG (Figure 5).

    Each group of ``runs`` becomes a column, four of them beside each other: the originals, then,
    for each run of the group, a caption and its reconstructions.

    Args:
        originals: ``[N, C, H, W]``.
        runs: group -> captions and reconstructions ``[N, C, H, W]`` of its runs.
    """
    columns = []
    for group, members in runs.items():
        blocks = [_captioned(f"{group}: originals", tile(originals, len(originals)))]
        blocks += [_captioned(text, tile(made, len(made))) for text, made in members]
        columns.append(_stack(blocks))
    height, width = max(column.shape[0] for column in columns), columns[0].shape[1]
    columns = [_extended(column, height, width + GAP) for column in columns]
    bands = [columns[i : i + GROUPS_PER_BAND] for i in range(0, len(columns), GROUPS_PER_BAND)]
    wide = (width + GAP) * len(bands[0])
    rows = [_extended(np.concatenate(band, 1), height, wide) for band in bands]
    write_png(path, _stack(rows), zoom=1)


def write_png(path: Path, canvas: np.ndarray, zoom: int = ZOOM) -> None:
    """``canvas`` ``[H, W, 3]`` uint8, every pixel as ``zoom`` × ``zoom``."""
    enlarged = canvas.repeat(zoom, 0).repeat(zoom, 1)
    with replacing(path) as temporary:
        Image.fromarray(enlarged).save(temporary, format="PNG", optimize=True)


def _filled(pictures: np.ndarray, columns: int) -> np.ndarray:
    """A whole row: white pictures follow where there are fewer than ``columns``."""
    missing = (columns - len(pictures), *pictures.shape[1:])
    return np.concatenate([pictures, np.full(missing, BACKGROUND, np.uint8)])


def _captioned(text: str, canvas: np.ndarray) -> np.ndarray:
    """``canvas``, enlarged, under a line of ``text``."""
    enlarged = canvas.repeat(ZOOM, 0).repeat(ZOOM, 1)
    line = Image.new("RGB", (enlarged.shape[1], TEXT_SIZE + 6), (BACKGROUND,) * 3)
    font = ImageFont.load_default(TEXT_SIZE)
    ImageDraw.Draw(line).text((2 * MARGIN, 2), text, fill=(0, 0, 0), font=font)
    return np.concatenate([np.asarray(line), enlarged])


def _extended(canvas: np.ndarray, height: int, width: int) -> np.ndarray:
    """``canvas`` with white below and on the right."""
    result = np.full((height, width, 3), BACKGROUND, np.uint8)
    result[: canvas.shape[0], : canvas.shape[1]] = canvas
    return result


def _stack(bands: Sequence[np.ndarray]) -> np.ndarray:
    """Canvases of one width under each other, with white between them."""
    gap = np.full((GAP, bands[0].shape[1], 3), BACKGROUND, np.uint8)
    parts: list[np.ndarray] = []
    for band in bands:
        parts += [band, gap]
    return np.concatenate(parts[:-1])
