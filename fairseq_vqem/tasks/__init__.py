"""Registered tasks."""

from fairseq_vqem.tasks.translation_nat import TranslationNATTask
from fairseq_vqem.tasks.translation_vqem import TranslationVQEMTask

__all__ = ["TranslationNATTask", "TranslationVQEMTask"]
