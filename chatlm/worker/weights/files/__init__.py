"""Files by themselves, whatever a model makes of their tensors: which there are, safetensors, torch.save."""
