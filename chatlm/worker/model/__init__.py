"""What a model is (`Model`), one forward for every family (`Transformer`), and which kernels compute
it."""
