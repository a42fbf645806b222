"""The annex exports."""
