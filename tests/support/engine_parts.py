"""The parts of engines that tests make without a worker's settings: all that requests may ask for."""

from chatlm.common.config import Settings
from chatlm.worker.arrays.kinds import Device
from chatlm.worker.engine.grammars import Grammars
from chatlm.worker.parts import Making, make_parts
from chatlm.worker.weights.loaded.model import LoadedModel

SERVING = Settings(adapter=("served",))


def parts_of(transformer, tokenizer, model=None, settings=SERVING, rows=None):
    """Of an engine of this transformer; adapters may be loaded, and drafts come from texts."""
    model = model or LoadedModel(None, {}, tokenizer.spec, "", "", None)
    return make_parts(Making(settings, model, transformer, tokenizer, Device("cpu"), 64), rows)


def use_tokenizer(engine, tokenizer):
    """Have answers from now on be of another tokenizer."""
    engine.tokenizer = engine.answers.tokenizer = tokenizer
    engine.answers.grammars = Grammars(tokenizer)
    return tokenizer
