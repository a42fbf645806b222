"""The annex batches."""
