"""The requests of OpenResponses' suite over HTTP, but for the picture; every answer and event is read by the classes of openresponses-types (specification of 2026-04-24)."""

import json
import sys
import urllib.request

import openresponses_types as types


def user(text):
    return {"type": "message", "role": "user", "content": text}


def assistant(text, **more):
    return {"type": "message", "role": "assistant", "content": text, **more}


WEATHER = {"type": "function", "name": "get_weather", "description": "Get the current weather for a location", "parameters": {
    "type": "object", "properties": {"location": {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}}, "required": ["location"]}}
ASKED = [user("What's the weather like in San Francisco?")]
BODIES = {
    "basic-response": {"input": [user("Say hello in exactly 3 words.")]}, "streaming-response": {"input": [user("Count from 1 to 5.")]},
    "system-prompt": {"input": [{"type": "message", "role": "system", "content": "You are a pirate. Always respond in pirate speak."}, user("Say hello.")]},
    "multi-turn": {"input": [user("My name is Alice."), assistant("Hello Alice! Nice to meet you."), user("What is my name?")]},
    "assistant-phase": {"input": [assistant("I should answer with the saved number.", phase="commentary"), assistant("The number is four.", phase="final_answer"), user("Repeat it.")]},
    "tool-calling": {"input": ASKED, "tools": [WEATHER], "max_output_tokens": 64}, "required call": {"input": ASKED, "tools": [WEATHER, {"type": "function", "name": "bare"}], "tool_choice": "required"}}
CLASSES = {name.removesuffix("StreamingEvent").lower(): kind for name, kind in vars(types).items() if name.endswith("StreamingEvent")}


def post(url, body):
    request = urllib.request.Request(url + "/v1/responses", json.dumps({"temperature": 0, **body}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=150) as response:
        return response.read().decode()


def main(url):
    found = {}
    for name, body in BODIES.items():
        response = json.loads(post(url, body))
        types.ResponseResource.model_validate(response)
        events = [json.loads(line[6:]) for line in post(url, body | {"stream": True}).splitlines() if line.startswith("data: ")]
        for event in events:
            CLASSES[event["type"].replace(".", "").replace("_", "")].model_validate(event)
        found[name] = response["status"], [item["type"] for item in response["output"]], events[-1]["type"]
    print(json.dumps(found))


main(sys.argv[1])
