"""A model's files become a recipe, tensors that are read one by one, and a tokenizer (docs/loading.md). Each
family is a row of a table. As tensors are read, adapters are merged into them, and each rank takes its
share."""
