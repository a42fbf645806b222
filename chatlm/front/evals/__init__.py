"""Judging checkpoints as nanochat does: tasks on disk, their items as prompts, answers that are kept.

Never a socket, a tokenizer of its own or a data set from the network: who scores is passed in."""
