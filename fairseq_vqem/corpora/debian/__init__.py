"""A sentence-parallel corpus, English and another language, out of Debian packages alone."""
