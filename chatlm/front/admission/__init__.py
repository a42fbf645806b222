"""A request becomes prompts of token ids that fit, or a refusal; and the front's side of the sandboxes."""
