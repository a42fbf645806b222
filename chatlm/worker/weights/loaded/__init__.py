"""A model that is loaded but for its weights: what it is, the shares of ranks and stages, its bytes, its
digest."""
