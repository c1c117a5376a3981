"""A bottleneck of one's own, from a package of one's own: finite scalar quantisation.

Each of d numbers is squashed to (-1, 1) and rounded to one of L levels; K = L^d codes, and no
codebook that could collapse (Mentzer et al., 2023). Nothing of fairseq_vqem changes:

    PYTHONPATH=examples fairseq-train DATA --user-dir $(fairseq-vqem user-dir) \
        --task translation_vqem --arch vqem_transformer_small --criterion vqem_loss \
        --bottleneck own_bottleneck:FiniteScalar --bottleneck-args '{"levels": 8}' \
        --codebook-size 512 …

fairseq-generate and the Python API need the same PYTHONPATH, since the checkpoint names the class.
"""

import math

import torch
from torch import Tensor, nn

from fairseq_vqem import UserError
from fairseq_vqem.bottlenecks import Bottleneck, BottleneckOptions, BottleneckOutput
from fairseq_vqem.bottlenecks.base import straight_through


class FiniteScalar(Bottleneck):
    """K = L^d codes: d numbers of L levels (8) each between two linear maps."""

    straight_through = False  # `widen` learns: the latents' gradient is not that of the input
    places: Tensor

    def __init__(self, options: BottleneckOptions) -> None:
        super().__init__(options)
        self.levels = int(options.arguments.get("levels", 8))
        self.numbers = round(math.log(options.codebook_size, max(2, self.levels)))
        if self.levels**self.numbers != options.codebook_size:
            raise UserError(f"--codebook-size {options.codebook_size} is no power of {self.levels}")
        self.squeeze = nn.Linear(options.dimension, self.numbers)
        self.widen = nn.Linear(self.numbers, options.dimension)
        self.register_buffer("places", self.levels ** torch.arange(self.numbers))

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        """Discretise ``vectors`` ``[N, D]``."""
        inside = torch.tanh(self.squeeze(vectors))
        levels = ((inside.detach() + 1) / 2 * self.levels).floor().clamp(0, self.levels - 1)
        codes = (levels.long() * self.places).sum(1)
        latents = self.widen(straight_through(inside, self.centres(levels)))
        no_loss = vectors.new_zeros(vectors.size(0), dtype=torch.float32)
        return BottleneckOutput(latents, codes.unsqueeze(1), codes, no_loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """Latents ``[..., D]`` of code ids ``[...]``."""
        levels = codes.unsqueeze(-1) // self.places % self.levels
        return self.widen(self.centres(levels.to(self.widen.weight.dtype)))

    def centres(self, levels: Tensor) -> Tensor:
        return (2 * levels + 1) / self.levels - 1
