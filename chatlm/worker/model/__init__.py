"""What a model is (`ModelSpec`), one forward for every family (`Transformer`), and which kernels compute
it."""
