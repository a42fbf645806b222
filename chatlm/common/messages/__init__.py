"""What a client asked and what answers it, as frozen dataclasses, and how these cross a pipe: frames of plain
data, so that reading one cannot run code."""
