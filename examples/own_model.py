"""A model of one's own beside this project's, from a package of one's own: CTC without a decoder.

Each state of the encoder is split into frames, and further layers without attention to the source
read them (Libovický and Helcl, 2018). Nothing of fairseq_vqem changes:

    export PYTHONPATH=examples FAIRSEQ_VQEM_PLUGINS=own_model
    fairseq-train DATA --user-dir $(fairseq-vqem user-dir) \
        --task translation_nat --arch split_ctc --criterion ctc_nat_loss …

and so with fairseq-generate, ``fairseq-vqem latency`` and the Python API. In a recipe, whose
students then train, decode and stand in the tables like all others:

    plugins: [own_model]
    students: {Split: {task: translation_nat, arch: split_ctc, criterion: ctc_nat_loss, …}}

A class that is derived from none of the parallel models of fairseq and of this project, or whose
loss is another, says what it is trained and decoded with in an attribute ``rules``
(fairseq_vqem/peers/rules.py). Autoregressive ones (``--task translation``) need nothing.
"""

from argparse import Namespace
from typing import Any

from fairseq.models import register_model, register_model_architecture
from torch import Tensor, nn

from fairseq_vqem.modules.ctc import frame_mask, left_packed
from fairseq_vqem.peers import CTCNAT
from fairseq_vqem.peers.config import CTCNATConfig, small_sizes


@register_model("split_ctc", dataclass=CTCNATConfig)
class SplitCTC(CTCNAT):
    """``--upsample-scale`` frames from each state of the encoder, and no cross-attention."""

    attend_source = False

    def __init__(self, cfg: CTCNATConfig, encoder: Any, decoder: Any) -> None:
        super().__init__(cfg, encoder, decoder)
        self.split = nn.Linear(cfg.embed_dim, cfg.upsample_scale * cfg.embed_dim)

    def frames(self, encoder_out: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
        """``[B, T, D]`` and the mask ``[B, T]`` of real frames, from states ``[S, B, D]``."""
        states = encoder_out["encoder_out"][0].transpose(0, 1)
        packed, _ = left_packed(states, ~encoder_out["encoder_padding_mask"][0])
        split = self.split(packed).unflatten(-1, (self.scale, -1)).flatten(1, 2)
        return split, frame_mask(encoder_out, self.scale)


@register_model_architecture("split_ctc", "split_ctc_small")
def small(args: Namespace) -> None:
    small_sizes(args)
