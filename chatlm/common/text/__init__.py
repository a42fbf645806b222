"""Tokens and text: tokenizers, chat templates, and how families of models mark reasoning and calls. The front
renders prompts with it, a worker reads answers with it."""
