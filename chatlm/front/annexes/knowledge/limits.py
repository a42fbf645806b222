"""Limits on vector stores."""

STORES_OF_OWNER = 100
MOST_WINDOWS = 200_000  # of a vector store: vectors that are searched
