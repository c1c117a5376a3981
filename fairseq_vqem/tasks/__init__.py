"""Registered tasks."""

from fairseq_vqem.tasks.translation_vqem import TranslationVQEMTask

__all__ = ["TranslationVQEMTask"]
