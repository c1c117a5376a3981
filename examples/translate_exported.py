"""Translate the lines of standard input: python examples/translate_exported.py EXPORTED < text

EXPORTED is a folder that `fairseq-vqem export` has written. The program in it is a Python package
as well, so that neither fairseq nor torch nor this plugin is needed.
"""

import sys

sys.path.insert(0, f"{sys.argv[1]}/standalone.pyz")
from standalone import StandaloneTranslator

translator = StandaloneTranslator(sys.argv[1])
sys.stdin.reconfigure(encoding="utf-8-sig", newline="\n")  # without a byte order mark
sys.stdout.reconfigure(encoding="utf-8")
for translation in translator.translate([line.rstrip("\n") for line in sys.stdin]):
    print(translation)
