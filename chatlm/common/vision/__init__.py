"""How a model's pictures are laid out: what they are resized to, the text around them, their token ids.

Pure functions of sizes and digests, which front and worker both use. No pixel is computed here."""
