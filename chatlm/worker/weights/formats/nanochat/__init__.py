"""nanochat's models, of every generation, as its trainer writes them and as GGUF files."""
