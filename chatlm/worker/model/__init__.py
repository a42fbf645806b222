"""What a model is (`Model`), and one forward for every family (`Transformer`)."""
