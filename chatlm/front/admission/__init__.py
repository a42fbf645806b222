"""Turns a request into prompts of token ids that fit, or refuses it. Also has the front's side of the
sandboxes."""
