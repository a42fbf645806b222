"""What openai-harmony says about conversations and completions, as JSON on stdout.

    TIKTOKEN_ENCODINGS_BASE=FOLDER python harmony_peer.py < {"conversations": [[messages, tools, effort, date]], "answers": [ids],
                                                             "texts": [text]}
"""

import json
import sys

from openai_harmony import (Author, Conversation, DeveloperContent, HarmonyEncodingName, Message, ReasoningEffort, Role, StreamableParser,
                            StreamState, SystemContent, ToolDescription, load_harmony_encoding)

ENCODING = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


def assistant(text, channel, **more):
    message = Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)
    return message.with_recipient(more["recipient"]).with_content_type("json") if more else message


def told(message, names):
    """The harmony messages for one of Chat Completions; `names` is the function of each call's id."""
    text = message["content"] or ""
    if message["role"] == "user":
        yield Message.from_role_and_content(Role.USER, text)
    elif message["role"] == "tool":
        author = Author.new(Role.TOOL, f"functions.{names[message['tool_call_id']]}")
        yield Message.from_author_and_content(author, text).with_recipient("assistant").with_channel("commentary")
    else:
        if message.get("reasoning_content"):
            yield assistant(message["reasoning_content"], "analysis")
        if text:
            yield assistant(text, "commentary" if message.get("tool_calls") else "final")
        for call in message.get("tool_calls", ()):
            names[call["id"]] = call["function"]["name"]
            yield assistant(call["function"]["arguments"], "commentary", recipient=f"functions.{call['function']['name']}")


def rendered(messages, tools, effort, date):
    system = SystemContent.new().with_conversation_start_date(date).with_reasoning_effort(ReasoningEffort[effort.upper()])
    developer, names = DeveloperContent.new(), {}
    if first := messages[0]["role"] in ("system", "developer"):
        developer = developer.with_instructions(messages[0]["content"])
    if tools:
        functions = (tool["function"] for tool in tools)
        developer = developer.with_function_tools([ToolDescription.new(each["name"], each.get("description", ""), parameters=each.get("parameters"))
                                                   for each in functions])
    heads = [Message.from_role_and_content(Role.SYSTEM, system)]
    heads += [Message.from_role_and_content(Role.DEVELOPER, developer)] * bool(first or tools)
    rest = [each for message in messages[first:] for each in told(message, names)]
    return ENCODING.render_conversation_for_completion(Conversation.from_messages(heads + rest), Role.ASSISTANT)


def parsed(ids):
    """[channel, recipient, text] of each message of a completion, the last one as far as it goes."""
    parser = StreamableParser(ENCODING, role=Role.ASSISTANT)
    for token in ids:
        parser.process(token)
    whole = [[each.channel, each.recipient, "".join(part.text for part in each.content)] for each in parser.messages]
    return whole + [[parser.current_channel, parser.current_recipient, parser.current_content]] * (parser.state == StreamState.CONTENT)


asked = json.load(sys.stdin)
json.dump({"conversations": [rendered(*each) for each in asked["conversations"]], "answers": [parsed(ids) for ids in asked["answers"]],
           "texts": [ENCODING.encode(text, disallowed_special=()) for text in asked["texts"]]}, sys.stdout)
