"""The comparison table: every system trained, decoded, scored and timed alike, in one run."""
