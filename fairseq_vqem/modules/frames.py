"""Decoder inputs for CTC: frames of the source's words with the codes as a plan."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fairseq_vqem.modules.ctc import upsample
from fairseq_vqem.modules.decoders import EncoderOut


class PlannedFrames(nn.Module):
    """``scale`` frames for each source token: its embedding plus a projection of the codes.

    The expanded codes lie along the target, the frames along the source. A frame reads the code
    at the same share of the way; CTC may put a word into any frame, so the decoder is free to put
    it where its code is.
    """

    def __init__(self, dimension: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.projection = nn.Linear(dimension, dimension)

    def forward(
        self, encoder_out: EncoderOut, plan: Tensor, plan_mask: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decoder inputs ``[B, T, D]`` and the mask ``[B, T]`` of real frames, which come first.

        Args:
            plan: expanded codes ``[B, P, D]`` under ``plan_mask`` ``[B, P]``, real ones first.
            hidden: ``[B]`` true for sentences whose frames are not shown the plan.
        """
        inputs, frames = upsample(encoder_out, self.scale)
        places = plan_places(frames, plan_mask.sum(1)).unsqueeze(-1)
        read = self.projection(plan).gather(1, places.expand(-1, -1, plan.size(-1)))
        shown = frames if hidden is None else frames & ~hidden.unsqueeze(1)
        return inputs + read * shown.unsqueeze(-1).to(read.dtype), frames


def plan_places(frames: Tensor, lengths: Tensor) -> Tensor:
    """For each frame of ``[B, T]`` the place of the plan at the same share of the way.

    Args:
        frames: mask of real frames, which come first.
        lengths: real places of each sentence's plan, ``[B]``.
    """
    frame = torch.arange(frames.size(1), device=frames.device)
    counts = frames.sum(1, keepdim=True).clamp(min=1)
    lengths = lengths.unsqueeze(1)
    return torch.minimum(frame * lengths // counts, (lengths - 1).clamp(min=0))
