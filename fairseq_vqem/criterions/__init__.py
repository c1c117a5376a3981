"""Registered criterions."""

from fairseq_vqem.criterions.vqem_loss import VQEMLoss

__all__ = ["VQEMLoss"]
