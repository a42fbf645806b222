"""The intake turns the bytes of a request's body into a ParsedBody, or refuses it.

Small bodies are read in the event loop and large ones in a sandbox, by the same functions (tasks.py). Nothing
here knows about HTTP."""
