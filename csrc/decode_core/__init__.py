"""decode_core's compiled library is `decode_core._core`; chatlm/worker/kernels uses it, and checks what it passes to it."""
