"""The package `ollama` pulls a model from the server at argv[1], uses it and deletes it; prints what it got as JSON."""

import json
import sys

import ollama

client = ollama.Client(host=sys.argv[1])
steps = [(part.status, part.completed, part.total) for part in client.pull("org/large", stream=True)]
again = client.pull("org/large").status
pulled = [model.model for model in client.list().models]
tokens = client.chat("org/large", messages=[{"role": "user", "content": "hello"}], options={"num_predict": 3}).eval_count
deleted, left, missing = client.delete("org/large").status, [model.model for model in client.list().models], []
for act in client.delete, client.pull:
    try:
        act("org/nothing")
    except ollama.ResponseError as error:
        missing.append(error.status_code)
print(json.dumps({"steps": steps, "again": again, "pulled": pulled, "tokens": tokens, "deleted": deleted, "left": left, "missing": missing}))
