"""LoRA adapters: read as peft saves them, merged into a model at its load, or served beside it."""
