"""Translate with a student that ``fairseq-vqem export`` has written, without fairseq and torch.

An export has this package in it as ``standalone.pyz``. That one file is enough; it may be copied
anywhere. It needs numpy, onnxruntime and the package of the corpus's subword model (sentencepiece
or subword-nmt).

    python standalone.pyz MODEL < source.txt > translation.txt

From Python, ``sys.path.insert(0, "MODEL/standalone.pyz")`` and

    from standalone import StandaloneTranslator     # or from fairseq_vqem.export.standalone
    StandaloneTranslator("MODEL").translate(["A sentence."])

Imports are relative, since the package has these two names.
"""

from .manifest import StandaloneError
from .translator import StandaloneTranslator

__all__ = ["StandaloneError", "StandaloneTranslator"]
