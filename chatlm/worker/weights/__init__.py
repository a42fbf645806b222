"""A model's files become a spec, tensors that are read one by one, and a tokenizer. Each family is a row of a
table; as tensors are read, adapters are merged and each rank takes its shard."""
