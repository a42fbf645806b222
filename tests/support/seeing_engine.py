"""Engines that see: questions with pictures, answers, and the logits of a prompt."""

import numpy as np

from chatlm.common.config import Settings
from chatlm.common.core import installed_core
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import AnswerParams, Failed, Message, Piece, SamplingParams
from chatlm.common.text.load import open_tokenizer
from chatlm.common.vision.pictures import rows_in
from chatlm.worker.arrays.kinds import Device
from chatlm.worker.build import build_engine
from chatlm.worker.engine.batching import pad_ids
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.sequence import Assignment
from chatlm.worker.model.batch import Batch
from chatlm.worker.tower import tiles_of
from image_conversations import picture_of_size


def chosen_kernels(request, monkeypatch):
    """What a fixture yields from: the kernels of its parameter compute in this process, though it may know decode_core already."""
    monkeypatch.setenv("CHAT_SERVER_KERNELS", "" if request.param == "decode_core" else request.param)
    installed_core.cache_clear()
    yield request.param
    monkeypatch.undo()
    installed_core.cache_clear()


def open_engine(folder, **more):
    settings = Settings(**({"model": str(folder), "dtype": "float32", "prefill_chunk": 32, "kv_cache_memory": 8 << 20} | more))
    model, engine = build_engine(resolve_model(settings), settings, Device("cpu"))
    engine.full_text = model.text
    return engine


def asking(engine, *pictures, text="What is this?"):
    tokenizer = open_tokenizer(engine.full_text)
    parts = tuple(part for number in range(len(pictures)) for part in (f"Look {number}: ", number)) + (text,)
    content = "".join(part for part in parts if isinstance(part, str))
    return tuple(tokenizer.render([Message("user", content, None, pictures, parts if pictures else ())]))


def answer(engine, ids, pictures, name="a", tokens=8, **params):
    engine.add(Assignment(name, ids, AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True, **params), tokens, pictures=tuple(pictures)))
    return collect(engine)[name]


def collect(engine):
    found, scores = {}, []
    while engine.busy:
        for name, event in engine.step():
            assert not isinstance(event, Failed), event
            if isinstance(event, Piece):
                found.setdefault(name, []).extend(event.tokens)
    check_integrity(engine)
    return found


def run(generator):
    while True:
        try:
            next(generator)
        except StopIteration as done:
            return done.value


def logits_of(engine, ids, pictures, rows=16):
    """The logits of a prompt's last rows, computed in one step."""
    transformer = engine.transformer
    placeholders, _ = engine.pictures.placeholders_of(Assignment("x", ids, AnswerParams(), 1, pictures=pictures))
    for seen in placeholders.pictures:
        seen.rows = run(engine.pictures.tower.encode(tiles_of(seen.picture, seen.layout, engine.pictures.tower.stored.filter)))
    shown = placeholders.as_one_id(ids)
    transformer.show_pictures(placeholders.rows(0, len(ids)))
    ahead = [0] * len(ids)
    for begin, end in placeholders.spans(0, len(ids)) if placeholders.two_sided else ():
        ahead[begin:end] = [end] * (end - begin)
    model, previous = transformer.model, [-1, *shown[:-1]]
    if model.picture_pad is not None:
        previous = pad_ids(shown, model.picture_pad, model.vocab_size)
    batch = Batch(shown, previous, [0, len(ids)], [len(ids)], [list(range(-(-len(ids) // 16) * len(transformer.groups.windows)))], list(range(len(ids) - rows, len(ids))), state_reads=[0] * bool(transformer.model.state_bytes), ahead=ahead if any(ahead) else [], turns=placeholders.turned(0, len(ids), 0) if placeholders.turns else [])
    made = engine.transformer.arrays.numpy(engine.runner.forward(batch)).copy()
    transformer.show_pictures(())
    return made


def check_logits(engine, kernels, size, expected):
    """Of a prompt about two pictures, the first of this size. expected: (ids, pictures) -> transformers' (n, V)."""
    assert kernels in engine.transformer.kernels.names["linear"]
    pictures = (picture_of_size(*size), picture_of_size(20, 50, seed=1))
    ids = asking(engine, *pictures)
    assert len(rows_in(engine.full_text.vision, ids)) > 8
    wanted = expected(ids, pictures)[-16:]
    assert np.abs(logits_of(engine, ids, pictures) - wanted).max() < 1e-4
    other = (picture_of_size(*size, seed=7), pictures[1])       # the logits depend on the pixels
    assert np.abs(expected(ids, other)[-16:] - wanted).max() > 1e-3


def checked_answer(engine, ids, pictures, expected):
    """The answer, which is transformers' greedy tokens, and the same from the prefix cache and from the rows that are kept."""
    first, greedy = answer(engine, ids, pictures), list(ids)
    for _ in first:
        greedy.append(int(expected(greedy, pictures)[-1].argmax()))
    assert first == greedy[len(ids):]
    assert engine.pictures.encoded == len(pictures)
    assert answer(engine, ids, pictures) == first and engine.pictures.encoded == len(pictures)
    engine.pool.forget_cached()
    assert answer(engine, ids, pictures) == first and engine.pictures.encoded == len(pictures)
    return first
