"""The annex tools."""
