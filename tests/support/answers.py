"""What a client asks and a worker tells of an answer, for tests that play them, and what a reader makes of it."""

import dataclasses

from chatlm.common.messages.requests import AnswerParams, Delta, Ended, Piece, Request, Usage


def said(*what, tokens=(), **fields):
    """A Piece with these deltas; a string is text, "" nothing."""
    return Piece(tokens, tuple(Delta("text", each) if isinstance(each, str) else each for each in what if each), **fields)


def thought(text):
    return Delta("reasoning", text)


def ending(name, piece, reason="stop", cause="eos"):
    """The events that end an answer, of which `piece` is the last."""
    return [(name, piece), (name, Ended(reason, cause, Usage(), 0.0))]


def calls_of(pieces):
    return [delta for piece in pieces for delta in piece.deltas if delta.kind == "call"]


def together(deltas):
    """[[kind, text, name]] of an answer: a delta belongs to the last one if it is of its kind and begins no call."""
    parts = []
    for kind, text, name in deltas:
        if name or not parts or parts[-1][0] != kind:
            parts.append([kind, "", name])
        parts[-1][1] += text
    return parts


PARAMS = {field.name for field in dataclasses.fields(AnswerParams)}


def asked(id="", messages=None, prompts=(), prompt_ids=None, **fields):
    """A Request; `fields` are its own or those of its AnswerParams."""
    params = {name: fields.pop(name) for name in PARAMS & fields.keys()}
    return Request(id, messages, prompts, prompt_ids, AnswerParams(**params), **fields)


def encoded(encoder, event):
    """The frames of an event, which is folded into the answer's state first."""
    encoder.state.fold(event)
    return encoder.encode(event)


def collected(encoder, event):
    """The bytes that an event takes of an answer that is sent whole, the same."""
    encoder.state.fold(event)
    return encoder.collect(event)
