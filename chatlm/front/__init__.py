"""HTTP, admission, queue and supervision: the one process that clients reach, in an event loop.

It reads and checks bodies, makes prompts of them, chooses a worker for each answer, restarts workers that
die, and writes what they send in the format of each API. Never in here: torch, numpy or gguf, and any name of
the worker house, whose processes it starts by their role (`ROLES`). Work that a client can make slow does not
run in the event loop: it goes to a sandbox or a thread."""
