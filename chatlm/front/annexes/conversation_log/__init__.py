"""The annex conversation_log."""
