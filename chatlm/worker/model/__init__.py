"""What a model is made of (`Model`), one forward for every family (`Transformer`), and which kernels compute
it."""
