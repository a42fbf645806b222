"""The commands `chat`, `generate`, `compare` and `score`: what a person types and sees.

They use the same pool as the server, so the same request gets the same answer; a server at --url is another
kind of pool (`RemotePool`). Never in here: tensors, routes, or anything that the server needs too.
prompt_toolkit and rich are imported where they are used; without them, and in a pipe, lines are plain."""
