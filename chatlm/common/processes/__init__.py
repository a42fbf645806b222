"""Starting our own processes and connecting to them: socket pairs here, TCP under torchrun and on Ray."""
