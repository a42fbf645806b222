"""The packages `anthropic` and `openai` and tools that the server at argv[1] runs; prints what they got as JSON."""

import json
import sys

import anthropic
import openai

URL = sys.argv[1]
HI = [{"role": "user", "content": "Pick a colour."}]


def messages():
    client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
    toolset = {"type": "mcp_toolset", "mcp_server_name": "fake", "default_config": {"enabled": False}, "configs": {"pick": {"enabled": True}}}
    wanted = {"model": "default", "betas": ["mcp-client-2025-11-20"], "mcp_servers": [{"type": "url", "name": "fake", "url": ""}], "tools": [toolset]}
    asked = {**wanted, "max_tokens": 60, "tool_choice": {"type": "any"}, "extra_body": {"temperature": 0}}
    whole = client.beta.messages.create(messages=HI, **asked)
    with client.beta.messages.stream(messages=HI, **asked) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    later = [*HI, {"role": "assistant", "content": whole.content}, {"role": "user", "content": "Which?"}]
    said = client.beta.messages.create(messages=later, **{**asked, "tool_choice": {"type": "none"}})
    older = {"type": "url", "name": "fake", "url": "", "tool_configuration": {"enabled": True, "allowed_tools": ["pick"]}}
    old = client.beta.messages.create(messages=HI, **{**asked, "betas": ["mcp-client-2025-04-04"], "mcp_servers": [older], "tools": []})
    counts = [client.beta.messages.count_tokens(messages=each, **wanted).input_tokens for each in (HI, later)]
    refused = []
    for change in {"url": "https://elsewhere.example"}, {"authorization_token": "x"}, {"name": "other"}:
        try:
            client.beta.messages.create(messages=HI, **{**asked, "mcp_servers": [wanted["mcp_servers"][0] | change]})
        except anthropic.BadRequestError as error:
            refused.append(error.status_code)
    return {"kinds": [block.type for block in whole.content], "streamed": [block.type for block in final.content], "begun": events.count("content_block_start"),
            "old": [block.type for block in old.content], "input": whole.content[0].input, "result": whole.content[1].content[0].text,
            "same": [whole.content[0].input, whole.content[-1].text] == [final.content[0].input, final.content[-1].text], "stop": whole.stop_reason,
            "later": said.stop_reason, "counts": counts, "used": said.usage.input_tokens + said.usage.cache_read_input_tokens, "refused": refused}


def responses():
    client = openai.OpenAI(base_url=URL + "/v1", api_key="none", max_retries=0)
    tool = {"type": "mcp", "server_label": "fake", "require_approval": "never", "allowed_tools": ["pick"]}
    whole = client.responses.create(model="default", input=HI, tools=[tool], tool_choice="required", max_output_tokens=60, temperature=0)
    return {"kinds": [item.type for item in whole.output], "result": whole.output[1].output}


print(json.dumps({"messages": messages(), "responses": responses()}))
