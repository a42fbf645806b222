"""The annex kept."""
