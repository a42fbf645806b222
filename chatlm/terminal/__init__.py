"""The commands `chat` and `generate`: what a person types and sees.

They use a pool as the server does, so the same request has the same answer; a server at --url is one more
pool (`RemotePool`). Never in here: tensors, routes, or anything that the server needs too. prompt_toolkit and
rich are imported where they are used; without them, and in a pipe, lines are plain."""
