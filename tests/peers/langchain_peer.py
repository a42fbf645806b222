"""LangChain's ChatOpenAI against the server at argv[1]; prints what it got as JSON."""

import asyncio
import json
import sys

import openai
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

QUESTION = "What is the capital of Japan?"


class City(BaseModel):
    """A city."""

    city: str
    big: bool


def model(**more):
    return ChatOpenAI(base_url=sys.argv[1] + "/v1", api_key="none", model="default", temperature=0, max_tokens=60, max_retries=0, **more)


async def main():
    whole = model(seed=1).invoke([("system", "Be brief."), ("human", QUESTION)])
    plain = model().invoke(QUESTION)
    pieces = [piece async for piece in model(stream_usage=True).astream(QUESTION)]
    joined = pieces[0]
    for piece in pieces[1:]:
        joined += piece
    scored = model().bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
    city = model().with_structured_output(City, method="json_schema").invoke("Tokyo as JSON, please.")
    batch = await model().abatch([QUESTION, QUESTION])
    try:
        model().bind_tools([City]).invoke(QUESTION)
        refusal = None
    except openai.BadRequestError as error:
        refusal = error.code
    print(json.dumps({
        "text": plain.content, "finish_reason": plain.response_metadata["finish_reason"], "usage": plain.usage_metadata["output_tokens"],
        "with_system": bool(whole.content), "streamed": joined.content, "streamed_usage": joined.usage_metadata["output_tokens"],
        "batch": [answer.content for answer in batch], "logprobs": len(scored.response_metadata["logprobs"]["content"]),
        "city": city.model_dump() if city else None, "tools": refusal}))


asyncio.run(main())
