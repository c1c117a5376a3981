"""Translate the lines of standard input: python examples/translate.py CHECKPOINT DATA < text"""

import sys

from fairseq_vqem import Translator

translator = Translator.from_checkpoint(sys.argv[1], data=sys.argv[2])
sys.stdin.reconfigure(encoding="utf-8-sig", newline="\n")  # without a byte order mark
sys.stdout.reconfigure(encoding="utf-8")
for translation in translator.translate([line.rstrip("\n") for line in sys.stdin]):
    print(translation)
