"""The annex usage."""
