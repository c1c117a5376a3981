"""Registered models."""

import fairseq_vqem.models.architectures  # noqa: F401  (registers their names)
from fairseq_vqem.models.vqem_transformer import VQEMOutput, VQEMTransformer

__all__ = ["VQEMOutput", "VQEMTransformer"]
