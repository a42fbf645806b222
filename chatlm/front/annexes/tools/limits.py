"""Limits on calls of tools."""

MOST_CALL_BYTES = 1 << 20  # of the body of a call that runs here: an argument may be a file
