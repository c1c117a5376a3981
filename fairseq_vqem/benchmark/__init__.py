"""Scores, latency, and result files that say how each number was made."""
