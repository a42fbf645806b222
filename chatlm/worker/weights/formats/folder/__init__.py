"""Hugging Face folders: config.json, tensors, and the model that they are."""
