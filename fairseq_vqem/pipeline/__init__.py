"""A recipe from corpus to table: every stage resumable, every number signed."""
