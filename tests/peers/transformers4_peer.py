"""Computes folders with transformers 4: stdin has {"ids", "folders": {folder: kind of attention}}. Prints the
version, then for each folder the path of its logits, or what the library says of it."""

import json
import sys
from pathlib import Path

import numpy
import torch
import transformers

asked = json.load(sys.stdin)
print(transformers.__version__)
for folder, attention in asked["folders"].items():
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True,
            trust_remote_code=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits = model.eval()(torch.tensor([asked["ids"]])).logits[0].numpy()
        numpy.save(Path(folder, "logits.npy"), logits)
        print(json.dumps(str(Path(folder, "logits.npy"))))
    except Exception as error:
        print(json.dumps([str(error)]))
