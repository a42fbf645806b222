"""Limits on batches and files."""

MOST_BYTES = 200 << 20  # of an uploaded file
MOST_LINES = 50_000     # of an uploaded file
MOST_UNFINISHED = 100   # batches of one key or address
