"""GGUF files: header, metadata, tensors, and the model that they are."""
