"""What computes each op: references, or decode_core's compiled kernels and how they are called."""
