"""Answers of declared types: OpenAI's two parse helpers, instructor in its mode of JSON schemas and in its older
one (where the schema is in the prompt alone, and the answer is any object), a pydantic-ai agent and Anthropic's tools, against the server at argv[1] with
each of the seeds after it. Prints the errors of each as JSON, by their seeds."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import anthropic
import instructor
import openai
from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

URL, SEEDS = sys.argv[1], [*map(int, sys.argv[2:])]
MOST = 2000     # tokens: an answer that does not end is cut here
QUESTION = "Alice and Bob meet on Friday for a science fair. Tickets cost 4.50."


class Event(BaseModel):
    """An event."""
    name: str = Field(max_length=80)
    hour: int
    price: float
    participants: list[Annotated[str, Field(max_length=20)]]
    online: bool | None = None


class AnyEvent(BaseModel):
    """An event, of which the prompt alone says what its values should be."""
    model_config = ConfigDict(extra="allow")
    name: Any = None
    hour: Any = None
    participants: Any = None


def typed(asked, wanted=Event):
    """What comes of a question with each seed, some at once: the errors by their seeds."""
    def error(seed):
        try:
            assert isinstance(asked(seed), wanted)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:900]
    with ThreadPoolExecutor(10) as threads:
        return {seed: said for seed, said in zip(SEEDS, threads.map(error, SEEDS)) if said}


def main():
    asked = {"messages": [{"role": "user", "content": QUESTION}], "model": "default"}
    client = openai.OpenAI(base_url=URL + "/v1", api_key="none", max_retries=0)
    shaped, loose = (instructor.from_openai(client, mode=mode) for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON))
    claude = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
    tools = [{"name": "event", "description": "notes an event", "input_schema": Event.model_json_schema()}]

    def by_agent(seed):
        """Each thread has an event loop of its own, and so a client of its own."""
        provider = OpenAIProvider(openai_client=openai.AsyncOpenAI(base_url=URL + "/v1", api_key="none", max_retries=0))
        agent = Agent(OpenAIChatModel("default", provider=provider), output_type=Event, retries=0)
        return agent.run_sync(QUESTION, model_settings={"seed": seed, "max_tokens": MOST}).output

    def called(seed):
        message = claude.messages.create(**asked, max_tokens=MOST, tools=tools, tool_choice={"type": "any"}, extra_body={"seed": seed})
        assert message.stop_reason == "tool_use" and len(message.content) == 1, message
        return Event.model_validate(message.content[0].input)

    found = {
        "chat.completions.parse": typed(lambda seed: client.chat.completions.parse(
            **asked, response_format=Event, seed=seed, max_tokens=MOST).choices[0].message.parsed),
        "responses.parse": typed(lambda seed: client.responses.parse(
            input=QUESTION, model="default", text_format=Event, max_output_tokens=MOST, extra_body={"seed": seed}).output_parsed),
        "instructor": typed(lambda seed: shaped.chat.completions.create(
            **asked, response_model=Event, seed=seed, max_tokens=MOST, max_retries=0)),
        "instructor, JSON": typed(lambda seed: loose.chat.completions.create(
            **asked, response_model=AnyEvent, seed=seed, max_tokens=512, max_retries=0), AnyEvent),
        "pydantic-ai": typed(by_agent),
        "anthropic": typed(called)}
    print(json.dumps(found))


main()
