"""Matrices that files have packed: in which formats of safetensors, with what arithmetic, as rows of
blocks."""
