"""Assignments of an engine, told as one list of parameters."""

import dataclasses

from chatlm.common.messages.requests import AnswerParams
from chatlm.worker.engine.scheduler import Assignment

PARAMS = {each.name for each in dataclasses.fields(AnswerParams)}


def assignment(id, prompt_ids, sampling, max_tokens, **more):
    """An Assignment with parameters of its own; `more` may name fields of either class."""
    params = {name: more.pop(name) for name in PARAMS & more.keys()}
    return Assignment(id, prompt_ids, AnswerParams(sampling=sampling, **params), max_tokens, **more)


def changed(work, **more):
    """The assignment with other fields, of its own or of its parameters."""
    params = {name: more.pop(name) for name in PARAMS & more.keys()}
    return dataclasses.replace(work, params=dataclasses.replace(work.params, **params), **more)
