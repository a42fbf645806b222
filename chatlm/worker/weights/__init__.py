"""A model's files become blocks, tensors that are read one by one, and a tokenizer (docs/loading.md).

`load` calls a format, which asks the table of families what the names and values in its files mean. As
tensors are read, adapters are merged into them, and each rank takes its share."""
