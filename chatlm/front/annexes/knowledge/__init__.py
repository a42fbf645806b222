"""Knowledge: OpenAI's vector stores, whose files answers can be asked about; how files become passages."""
