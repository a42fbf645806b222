"""MODEL becomes a `ModelSource`: files on this machine, from the Hugging Face hub, or the default model."""
