"""The annex compare."""
