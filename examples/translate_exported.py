"""Translate the lines of standard input: python examples/translate_exported.py EXPORTED < text

EXPORTED is a folder that `fairseq-vqem export` has written. The standalone.pyz in it does the same
where neither fairseq nor this plugin is installed.
"""

import sys

from fairseq_vqem.export.standalone import StandaloneTranslator

translator = StandaloneTranslator(sys.argv[1])
sys.stdin.reconfigure(encoding="utf-8-sig")  # without a byte order mark
for translation in translator.translate([line.rstrip("\n") for line in sys.stdin]):
    print(translation)
