"""The annex downloads."""
