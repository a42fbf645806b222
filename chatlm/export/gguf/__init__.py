"""Writes a model to one GGUF file, of a smaller type if asked, and measures which weights matter."""
