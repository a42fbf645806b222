"""Tokenizers: what files say of a vocabulary becomes a tokenizer.json."""
