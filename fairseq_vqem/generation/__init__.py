"""Decoding: codes by search, words in one parallel pass."""
