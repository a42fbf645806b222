"""What a client asked and what answers it, as frozen dataclasses, and how these cross a pipe: as plain
data, so that reading one cannot run code."""
