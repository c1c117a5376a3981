"""Registered models."""

from fairseq_vqem.models.vqem_transformer import VQEMOutput, VQEMTransformer

__all__ = ["VQEMOutput", "VQEMTransformer"]
