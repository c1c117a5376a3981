"""Parallel text: the embedded sample, corpora built from packages or archives, subwords, splits.

Modules that need fairseq (``binarise``) run it in a child process, so that nothing here imports it.
"""
