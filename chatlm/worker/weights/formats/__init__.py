"""What depends on the kind of a model's files: each kind becomes a `StoredModel`. A format knows families by
their table alone. Trainers' formats (nanochat, nanoGPT, litgpt) use those of files and folders."""
