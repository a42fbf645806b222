"""Models that do not chat: what their files say of pooling, dense layers, labels and scores."""
