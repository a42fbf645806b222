"""Starting our own processes and connecting with them: socket pairs here, TCP under torchrun and on Ray."""
