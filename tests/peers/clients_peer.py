"""openai-agents, LangChain over Responses, and LiteLLM both ways against the server at argv[1]: as a client, and its
proxy between the server and the `openai` package. Prints what they got as JSON."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"     # no look-up of prices
import agents           # noqa: E402
import litellm          # noqa: E402
import openai           # noqa: E402
from langchain_openai import ChatOpenAI, OpenAIEmbeddings       # noqa: E402

URL, QUESTION = sys.argv[1], "What is the capital of Japan?"
HI = [{"role": "user", "content": QUESTION}]
PROXY_S = 120           # until the proxy listens


@agents.function_tool
def switch(on: bool) -> str:
    """Switches the light on or off."""
    return f"it is {on}"


async def with_agents():
    """It asks for /v1/responses unless it is told otherwise."""
    agents.set_default_openai_client(openai.AsyncOpenAI(base_url=URL + "/v1", api_key="none", max_retries=0), use_for_tracing=False)
    agents.set_tracing_disabled(True)
    settings = agents.ModelSettings(temperature=0, max_tokens=60)
    plain = agents.Agent(name="plain", model="default", model_settings=settings)
    whole = await agents.Runner.run(plain, QUESTION)
    running = agents.Runner.run_streamed(plain, QUESTION)
    kinds = [event.data.type async for event in running.stream_events() if event.type == "raw_response_event"]
    calling = agents.Agent(name="calling", model="default", tools=[switch], model_settings=agents.ModelSettings(
        temperature=0, max_tokens=60, tool_choice="required", parallel_tool_calls=False), tool_use_behavior="stop_on_first_tool")
    called = await agents.Runner.run(calling, "Switch the light on.")
    return {"text": whole.final_output, "streamed": running.final_output, "last": kinds[-1], "called": called.final_output}


def with_langchain():
    model = ChatOpenAI(base_url=URL + "/v1", api_key="none", model="default", temperature=0, max_tokens=60, max_retries=0,
                       use_responses_api=True)
    whole, pieces = model.invoke(QUESTION), list(model.stream(QUESTION))
    joined = pieces[0]
    for piece in pieces[1:]:
        joined += piece
    tool = {"type": "function", "function": {"name": "switch", "description": "switches the light", "parameters": {
        "type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"], "additionalProperties": False}}}
    [call] = model.bind_tools([tool], tool_choice="switch").invoke("Switch the light on.").tool_calls
    vectors = OpenAIEmbeddings(base_url=URL + "/v1", api_key="none", model="default", max_retries=0,
                               check_embedding_ctx_length=False).embed_documents(["a cat", "a dog"])
    return {"text": whole.text, "streamed": joined.text, "usage": joined.usage_metadata["output_tokens"], "call": [call["name"], list(call["args"])],
            "vectors": [len(vectors), len(vectors[0])]}


def with_litellm():
    found = {}
    for provider, base in (("openai", URL + "/v1"), ("anthropic", URL)):
        wanted = {"model": f"{provider}/default", "api_base": base, "api_key": "none", "temperature": 0, "max_tokens": 60, "num_retries": 0}
        whole = litellm.completion(messages=HI, **wanted)
        chunks = litellm.completion(messages=HI, stream=True, **wanted)
        found[provider] = whole.choices[0].message.content, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    answer = litellm.responses(model="openai/default", input=QUESTION, api_base=URL + "/v1", api_key="none", temperature=0, max_output_tokens=60)
    vectors = litellm.embedding(model="openai/default", input=["a cat", "a dog"], api_base=URL + "/v1", api_key="none").data
    return found | {"responses": answer.output_text, "vectors": [len(vectors), len(vectors[0]["embedding"])]}


def with_proxy():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp())
    (folder / "config.yaml").write_text(json.dumps({"model_list": [{"model_name": "served", "litellm_params": {
        "model": "openai/default", "api_base": URL + "/v1", "api_key": "none"}}]}))
    proxy = subprocess.Popen([Path(sys.executable).with_name("litellm"), "--config", folder / "config.yaml", "--host", "127.0.0.1",
                              "--port", str(port), "--telemetry", "False"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until_s = time.monotonic() + PROXY_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=5).read()
                break
            except OSError:
                if proxy.poll() is not None or time.monotonic() > until_s:
                    raise
                time.sleep(0.2)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        wanted = {"model": "served", "temperature": 0}
        whole = client.chat.completions.create(messages=HI, max_tokens=60, **wanted)
        chunks = client.chat.completions.create(messages=HI, max_tokens=60, stream=True, **wanted)
        answer = client.responses.create(input=QUESTION, max_output_tokens=60, **wanted)
        vector = client.embeddings.create(model="served", input="a cat").data[0].embedding
        return {"text": whole.choices[0].message.content, "responses": answer.output_text, "vector": len(vector),
                "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)}
    finally:
        proxy.kill()
        proxy.wait()


print(json.dumps({"agents": asyncio.run(with_agents()), "langchain": with_langchain(), "litellm": with_litellm(), "proxy": with_proxy()}))
