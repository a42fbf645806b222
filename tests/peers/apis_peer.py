"""The packages `openai` (Responses), `anthropic` and `ollama` against the server at argv[1]; prints what they got as JSON."""

import json
import sys

import anthropic
import ollama
import openai
from pydantic import BaseModel

URL, QUESTION = sys.argv[1], "What is the capital of Japan?"
ADD = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


class City(BaseModel):
    big: bool


def responses():
    client = openai.OpenAI(base_url=URL + "/v1", api_key="none", max_retries=0)
    wanted = {"model": "default", "temperature": 0, "max_output_tokens": 60}
    whole = client.responses.create(input=QUESTION, instructions="Be brief.", **wanted)
    plain = client.responses.create(input=QUESTION, **wanted)
    events = list(client.responses.create(input=QUESTION, stream=True, **wanted))
    with client.responses.stream(input=QUESTION, **wanted) as stream:
        final = stream.until_done().get_final_response()
    shaped = client.responses.parse(input="Is Tokyo big?", text_format=City, **wanted)
    called = client.responses.create(input="Add 1.", tool_choice="required", **wanted, tools=[
        {"type": "function", "name": "add", "parameters": ADD, "strict": True}, {"type": "web_search"}])
    call = called.output[0]
    later = client.responses.create(**wanted, input=[
        {"role": "user", "content": "Add 1."}, call, {"type": "function_call_output", "call_id": call.call_id, "output": "2"}])
    try:
        client.responses.retrieve("resp_1")
    except openai.NotFoundError as error:
        missing = error.status_code
    scored = client.responses.create(input=QUESTION, include=["message.output_text.logprobs"], top_logprobs=2, **wanted)
    with client.responses.stream(input=QUESTION, include=["message.output_text.logprobs"], top_logprobs=2, **wanted) as stream:
        deltas = [entry for event in stream if event.type == "response.output_text.delta" for entry in event.logprobs]
        repeated = stream.get_final_response().output[0].content[0].logprobs
    searched = client.responses.with_raw_response.create(**wanted, input=[
        {"role": "user", "content": QUESTION}, {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}}])
    return {"logprobs": [len(scored.output[0].content[0].logprobs), len(deltas), len(repeated)], "skipped": searched.headers.get("X-Ignored-Tools"),
            "text": plain.output_text, "with_system": bool(whole.output_text), "streamed": final.output_text, "tokens": plain.usage.output_tokens,
            "deltas": "".join(event.delta for event in events if event.type == "response.output_text.delta"), "last": events[-1].type,
            "shaped": type(shaped.output_parsed.big).__name__, "call": [call.name, sorted(json.loads(call.arguments))],
            "later": later.status in ("completed", "incomplete"), "missing": missing}


def messages():
    client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
    wanted = {"model": "default", "max_tokens": 60, "extra_body": {"temperature": 0}}
    question = [{"role": "user", "content": QUESTION}]
    whole = client.messages.create(messages=question, **wanted)
    with client.messages.stream(messages=question, **wanted) as stream:
        streamed, final = "".join(stream.text_stream), stream.get_final_message()
    tools = [{"name": "add", "description": "adds", "input_schema": ADD}]
    ask = [{"role": "user", "content": "Add 1."}]
    with client.messages.stream(messages=ask, tools=tools, tool_choice={"type": "tool", "name": "add"}, **wanted) as stream:
        called = stream.get_final_message()
    (call,) = called.content
    later = client.messages.create(tools=tools, **wanted, messages=[
        *ask, {"role": "assistant", "content": called.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "2"}]}])
    counted = client.messages.count_tokens(model="default", messages=question, system=[{"type": "text", "text": "Be brief."}])
    try:
        client.messages.create(messages=question, **wanted | {"model": "claude-none"})
    except anthropic.NotFoundError as error:
        missing = error.body["error"]["type"]
    read = client.messages.create(**wanted, messages=[{"role": "user", "content": [
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Tokyo is big."}, "title": "Cities"},
        {"type": "search_result", "source": "x", "title": "y", "content": [{"type": "text", "text": "z"}]}, {"type": "text", "text": QUESTION}]}])
    return {"read": bool(read.content[0].text), "text": whole.content[0].text, "streamed": streamed, "final": final.content[0].text, "tokens": final.usage.output_tokens,
            "stop": [whole.stop_reason, called.stop_reason], "call": [call.name, sorted(call.input)], "later": bool(later.stop_reason),
            "counted": counted.input_tokens, "missing": missing}


def ollamas():
    client = ollama.Client(host=URL)
    wanted = {"model": "default", "options": {"temperature": 0, "num_predict": 60}}
    question = [{"role": "user", "content": QUESTION}]
    whole = client.chat(messages=question, **wanted)
    streamed = "".join(part.message.content for part in client.chat(messages=question, stream=True, **wanted))
    shaped = client.chat(messages=question, format=City.model_json_schema(), **wanted)
    try:
        client.show("llama3")
    except ollama.ResponseError as error:
        missing = error.status_code
    scored = client.chat(messages=question, logprobs=True, top_logprobs=2, **wanted).logprobs
    lines = client.generate(prompt=QUESTION, stream=True, logprobs=True, **wanted)
    return {"logprobs": [len(scored), len(scored[0].top_logprobs), sum(len(line.logprobs or ()) for line in lines)],
            "text": whole.message.content, "streamed": streamed, "generated": client.generate(prompt=QUESTION, **wanted).response,
            "tokens": whole.eval_count, "shaped": sorted(json.loads(shaped.message.content)), "models": len(client.list().models),
            "capabilities": client.show("default").capabilities, "missing": missing}


print(json.dumps({"responses": responses(), "messages": messages(), "ollama": ollamas()}))
