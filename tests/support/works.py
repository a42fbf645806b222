"""Assignments of an engine, told as one list of parameters."""

import dataclasses

from chatlm.common.messages.requests import AnswerParams, SamplingParams
from chatlm.worker.engine.answer import Answer
from chatlm.worker.engine.sequence import Assignment

PARAMS = {each.name for each in dataclasses.fields(AnswerParams)}


def assignment(id, prompt_ids, sampling, max_tokens, **more):
    """An Assignment with parameters of its own; `more` may name fields of either class."""
    params = {name: more.pop(name) for name in PARAMS & more.keys()}
    return Assignment(id, prompt_ids, AnswerParams(sampling=sampling, **params), max_tokens, **more)


def changed(work, **more):
    """The assignment with other fields, of its own or of its parameters."""
    params = {name: more.pop(name) for name in PARAMS & more.keys()}
    return dataclasses.replace(work, params=dataclasses.replace(work.params, **params), **more)


def told_with_types(types, tokenizer, ids, resumed=0, reason="stop"):
    """What an answer that may call `trip` and `time`, whose parameters have these types, tells after each token that follows the
    first `resumed`, which a worker that died had drawn, and at its end."""
    work = assignment("a", (1,), SamplingParams(), 9999, resumed_ids=tuple(ids[:resumed]), chat=True, tool_names=("trip", "time"), tool_types=types)
    answer, told = Answer(work, tokenizer), []
    for number, token in enumerate(ids[resumed:], resumed + 1):
        answer.push(token, number, 9999)
        told.append(answer.take())
    answer._end(reason, "eos")
    return [*told, answer.take()]
