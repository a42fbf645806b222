"""The annex metrics."""
