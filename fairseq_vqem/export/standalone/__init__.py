"""Translate with a student that ``fairseq-vqem export`` has written, without fairseq and torch.

An export has this package in it as ``standalone.pyz``. That one file is enough; it may be copied
anywhere. It needs numpy, onnxruntime and the package of the corpus's subword model (sentencepiece
or subword-nmt).

    python standalone.pyz MODEL < source.txt > translation.txt

From Python, with ``standalone.pyz`` on the path, or with fairseq_vqem installed and its name before
``standalone``: ``StandaloneTranslator("MODEL").translate(["A sentence."])``.

Imports are relative, since the package has two names.
"""

from .manifest import StandaloneError
from .translator import StandaloneTranslator

__all__ = ["StandaloneError", "StandaloneTranslator"]
