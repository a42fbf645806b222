"""LiteLLM against the server at argv[1]; prints what it got as JSON."""

import asyncio
import json
import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"     # no look-up of prices
import litellm      # noqa: E402

HI = [{"role": "user", "content": "What is the capital of Japan?"}]
SERVER = {"model": "openai/default", "api_base": sys.argv[1] + "/v1", "api_key": "none", "temperature": 0, "num_retries": 0}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": {
    "type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"], "additionalProperties": False}}}


async def main():
    whole = litellm.completion(messages=HI, seed=3, stop=["!"], n=2, **SERVER)
    chunks = list(litellm.completion(messages=HI, stream=True, stream_options={"include_usage": True}, **SERVER))
    later = await litellm.acompletion(messages=HI, max_completion_tokens=3, logprobs=True, top_logprobs=1, **SERVER)
    shaped = litellm.completion(messages=HI, response_format=SCHEMA, max_tokens=30, **SERVER)
    raw = litellm.text_completion(prompt="The capital of Japan is", max_tokens=1,
                                  **SERVER | {"model": "text-completion-openai/default"})
    try:
        litellm.completion(messages=HI, **SERVER | {"model": "openai/gpt-none"})
        refusal = None
    except litellm.NotFoundError as error:
        refusal = error.status_code
    print(json.dumps({
        "text": whole.choices[0].message.content, "choices": len(whole.choices), "finish_reason": whole.choices[0].finish_reason,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "streamed_usage": [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)],
        "cut": later.choices[0].finish_reason, "logprobs": len(later.choices[0].logprobs.content),
        "shaped": json.loads(shaped.choices[0].message.content), "raw": raw.choices[0].text, "unknown_model": refusal}))


asyncio.run(main())
