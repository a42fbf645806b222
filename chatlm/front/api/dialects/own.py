"""Bodies that only this program has: comparisons of models, and names of models to load and unload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence as Seq
from dataclasses import replace
from typing import Any, TYPE_CHECKING

from chatlm.common.config import LIMITS, Settings
from chatlm.common.errors import RequestError, invalid
from chatlm.common.jsontext import dump, is_text
from chatlm.common.messages.protocol import ParsedBody
from chatlm.common.messages.requests import AnswerParams
from chatlm.front.api.dialect import Dialect, TextForm
from chatlm.front.api.field_types import TEXT, thinking_budget
from chatlm.front.api.fields import A_TEXT, Field, FieldType, list_schema, names_in, parse_fields
from chatlm.front.api.message_readers import openai_messages, template_options
from chatlm.front.api.readers import (
    openai_request, parse_answer, parse_openai_request, pick, sampling_params)
from chatlm.front.api.tables import (
    CONVERSATION, IGNORE_EOS, LOW, MIN_TOKENS, MODEL, SAMPLED, SAMPLING_FIELDS, STOPS, STOP_IDS,
    TEMPLATE_OPTIONS, TEMPORARY, TOKEN_CAPS, TRUNCATE)

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import Known
    from chatlm.front.api.dialect import TextTerms


# fields

MANAGED_FIELDS = (MODEL,)

WHO = "who answers"       # a group: the fields of a variant that choose its model
SOME = "several answers"  # a group: the fields that name several answers; one of them must be there
STEP = Field("step", FieldType('a number of a step, or "latest"',
                               {"anyOf": [{"type": "integer", "minimum": 0}, {"enum": ["latest"]}]}),
             "one of the checkpoints of the run of `model`", group=WHO)
DRAWING_FIELDS = (  # how tokens are drawn, and what ends an answer
    *(field for field in SAMPLING_FIELDS
      if field in (*SAMPLED.values(), STOPS, STOP_IDS, MIN_TOKENS, IGNORE_EOS)),
    *TOKEN_CAPS)
VARIANT_FIELDS = (
    Field("model", TEXT, "one of the served models; absent: the default one", group=WHO),
    Field("adapter", TEXT, "one of the model's adapters", group=WHO),
    STEP, *DRAWING_FIELDS,
)
SOME_ANSWERS = {"minItems": 2, "maxItems": LIMITS.compared}
COMPARE_FIELDS = (
    CONVERSATION._replace(required=False, doc="the conversation; one of it and prompt"),
    Field("prompt", TEXT, "a text that the models continue, instead of messages"), MODEL,
    Field("models", FieldType(f"a list of 2 to {LIMITS.compared} names of models",
                              list_schema(A_TEXT, **SOME_ANSWERS)), "the models that answer",
          group=SOME),
    Field("steps", FieldType(
        f'a list of 2 to {LIMITS.compared} numbers of steps, or "latest"',
        list_schema(STEP.schema, **SOME_ANSWERS)),
        "the checkpoints that answer, of the run of `model`", group=SOME),
    Field("variants", FieldType(
        f"a list of 2 to {LIMITS.compared} objects", list_schema({"type": "object"}, **SOME_ANSWERS),
        details=list_schema({"type": "object", "properties": {
            field.name: field.described for field in VARIANT_FIELDS}})),
        "what differs from answer to answer; each may have a model of its own", group=SOME),
    *DRAWING_FIELDS, LOW, TRUNCATE, TEMPORARY,
    *TEMPLATE_OPTIONS,
)


# readers

async def read_managed(body: dict, terms: TextTerms) -> bytes:
    """Nothing: the body only names the model to load or unload."""
    parse_fields(body, MANAGED_FIELDS)
    return b""


async def read_compare(body: dict, terms: TextTerms) -> bytes:
    """Who answers a comparison, as JSON. `variants` has an object for each answer; its `step`, or
    its `model` and `adapter`, choose the model. `seed` is for the answers that have none of their own.

    The questions are read later by `read_variants`, for each model."""
    values = parse_fields(body, COMPARE_FIELDS)
    thinking_budget(body, COMPARE_FIELDS)
    if "prompt" in values and "messages" in values:
        raise invalid("prompt", "prompt and messages exclude each other: the models continue a text, or "
                                "answer a conversation")
    if "prompt" not in values and "messages" not in values:
        raise RequestError("messages is missing, or prompt, a text to continue",
                           code="missing_required_parameter", param="messages")
    chosen = [name for name in names_in(COMPARE_FIELDS, SOME) if name in values]
    if len(chosen) != 1:
        raise invalid(chosen[1] if chosen else "models", "one of models, steps and variants must say who "
                      f"answers, and {' and '.join(chosen) or 'none of them'} is here")
    variants = [dict(variant) for variant in values.get("variants", ())]
    for index, variant in enumerate(variants):
        parse_fields({f"variants[{index}].{name}": value for name, value in variant.items()},
                     [field._replace(name=f"variants[{index}].{field.name}") for field in VARIANT_FIELDS])
    variants = variants or [{"model": name} for name in values.get("models", ())]
    variants = variants or [{"step": step} for step in values.get("steps", ())]
    seed = sampling_params(values, Settings()).seed
    return dump({"seed": seed, "variants": list(map(who_answers, variants))})


def who_answers(variant: Mapping) -> dict:
    """The fields of a variant that choose its model. A very long name is cut: its start is as unknown."""
    who = pick(variant, *names_in(VARIANT_FIELDS, WHO))
    return {name: value[:1000] if is_text(value) else value for name, value in who.items()}


def read_variants(body: dict, indices: Seq[int], seed: int, known: Known) -> list[ParsedBody]:
    """The questions of a comparison to one model, which gives the answers with these `indices`.
    They share the messages, which are read once. Log-probabilities are requested to show how likely a token
    was that differs."""
    values: dict[str, Any] = {"seed": seed, **parse_answer(body, COMPARE_FIELDS, known)}
    text = values.get("prompt")
    messages = ()
    if text is None:
        messages = openai_messages(values["messages"], known.tool_format is not None)
        values["template_options"] = template_options(values)
    variants = values.get("variants", ())
    read = []
    for index in indices:
        own = values | parse_fields(variants[index] if variants else {}, DRAWING_FIELDS)
        if text is None:
            request = parse_openai_request(own, known.settings, known.tool_format, messages)
        else:
            request = openai_request(own, known.settings, AnswerParams(), prompts=(text,))
        read.append(ParsedBody(replace(request, params=replace(request.params, logprobs=0)), kind="chat"))
    return read


MANAGED = TextForm(MANAGED_FIELDS, read_managed)
DIALECT = Dialect({
    "/v1/compare": TextForm(COMPARE_FIELDS, read_compare),
    "/models/load": MANAGED, "/models/unload": MANAGED})
