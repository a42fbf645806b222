"""The annex runs."""
