"""The vectors of vector stores, and the search of the nearest: the role `vectors`."""
