"""Ids that sentencepiece and tiktoken give the texts of a JSON list on stdin, by a vocabulary file -> JSON on stdout."""

import base64
import json
import sys
from pathlib import Path


def tekken_ids(path, texts):
    import tiktoken
    content = json.loads(path.read_text())
    config = content["config"]
    specials = config["default_num_special_tokens"]
    words = content["vocab"][:config["default_vocab_size"] - specials]
    ranks = {base64.b64decode(word["token_bytes"]): word["rank"] for word in words}
    encoding = tiktoken.Encoding("tekken", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})
    return [[token + specials for token in encoding.encode(text, disallowed_special=())] for text in texts]


def sentencepiece_ids(path, texts):
    import sentencepiece
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(texts)


path = Path(sys.argv[1])
ids = tekken_ids if path.suffix == ".json" else sentencepiece_ids
json.dump(ids(path, json.load(sys.stdin)), sys.stdout)
