"""The intake: the bytes of a body, for a route and from a caller, become a ParsedBody or a refusal.

Small bodies are read in the event loop, large ones in a sandbox, by the same functions (tasks.py). It knows
nothing of HTTP."""
