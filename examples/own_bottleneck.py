"""A bottleneck of one's own, from a package of one's own: finite scalar quantisation.

Each of d numbers is squashed to (-1, 1) and rounded to one of L levels; K = L^d codes, and no
codebook that could collapse (Mentzer et al., 2023). Nothing of fairseq_vqem changes:

    PYTHONPATH=examples fairseq-train DATA --user-dir $(fairseq-vqem user-dir) \
        --task translation_vqem --arch vqem_transformer_small --criterion vqem_loss \
        --bottleneck own_bottleneck:FiniteScalar --codebook-size 512 …

fairseq-generate and the Python API need the same PYTHONPATH, since the checkpoint names the class.
"""

import torch
from torch import Tensor, nn

from fairseq_vqem import UserError
from fairseq_vqem.bottlenecks import Bottleneck, BottleneckOptions, BottleneckOutput
from fairseq_vqem.bottlenecks.base import straight_through

LEVELS = 8


class FiniteScalar(Bottleneck):
    """K = 8^d codes: d numbers of 8 levels each between two linear maps."""

    straight_through = False  # `widen` learns: the latents' gradient is not that of the input
    places: Tensor

    def __init__(self, options: BottleneckOptions) -> None:
        super().__init__(options)
        self.numbers = round(torch.tensor(float(options.codebook_size)).log2().item() / 3)
        if LEVELS**self.numbers != options.codebook_size:
            raise UserError(f"--codebook-size {options.codebook_size} is not a power of {LEVELS}")
        self.squeeze = nn.Linear(options.dimension, self.numbers)
        self.widen = nn.Linear(self.numbers, options.dimension)
        self.register_buffer("places", LEVELS ** torch.arange(self.numbers))

    def forward(self, vectors: Tensor) -> BottleneckOutput:
        """Discretise ``vectors`` ``[N, D]``."""
        inside = torch.tanh(self.squeeze(vectors))
        levels = ((inside.detach() + 1) / 2 * LEVELS).floor().clamp(0, LEVELS - 1)
        codes = (levels.long() * self.places).sum(1)
        latents = self.widen(straight_through(inside, self.centres(levels)))
        no_loss = vectors.new_zeros(vectors.size(0), dtype=torch.float32)
        return BottleneckOutput(latents, codes.unsqueeze(1), codes, no_loss)

    def lookup(self, codes: Tensor) -> Tensor:
        """Latents ``[..., D]`` of code ids ``[...]``."""
        levels = codes.unsqueeze(-1) // self.places % LEVELS
        return self.widen(self.centres(levels.to(self.widen.weight.dtype)))

    @staticmethod
    def centres(levels: Tensor) -> Tensor:
        return (2 * levels + 1) / LEVELS - 1
