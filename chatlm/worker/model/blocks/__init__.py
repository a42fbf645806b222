"""What a model is made of: an input, layers of two blocks each, and a head."""
