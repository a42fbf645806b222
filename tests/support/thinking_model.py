"""The default model with a chat template that lets it think: its file is copied, and the template replaced in place."""

from pathlib import Path

from chatlm.common.hub.default_model import fetch_default_model
from chatlm.worker.weights.formats.gguf.file import read_gguf
from tiny_gguf import packed_text

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}<|im_start|>assistant
{{ '<think>\n\n</think>\n\n' if enable_thinking is false else '<think>\n' }}"""


def thinking_model(folder):
    """The path of a copy in `folder`, which says <think> before each answer unless `enable_thinking` is false."""
    source = fetch_default_model()
    template = read_gguf(source)[0]["tokenizer.chat_template"]
    size = len(template.encode()) - len(TEMPLATE.encode()) - len("{##}")
    assert size >= 0, "the file has too little room for the template"
    data = source.read_bytes()
    assert data.count(packed_text(template)) == 1
    path = Path(folder) / "thinking.gguf"
    path.write_bytes(data.replace(packed_text(template), packed_text(TEMPLATE + "{#" + "x" * size + "#}")))
    return path
