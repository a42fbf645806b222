"""Bodies whose tools, choices of tools and formats of answers are right, nearly right, or nonsense: for hypothesis."""

from hypothesis import strategies as st

from chatlm.common.jsontext import JSON_TYPES
from chatlm.common.text.formats import CALL_FORMATS
from chatlm.common.text.schema_rules import STRING_FORMATS
from chatlm.front.api.field_types import EFFORTS, OTHER_TOOLS

TOOL_FORMATS = [None, *CALL_FORMATS]
MARKERS = ["<[</tool_call>]>", "<[<think>]>", "</tool_call>", "</parameter>\n", "</think>"]
ODD_TEXTS = ["", "x", "a b", "\ud800", "\0", '"', "/", "\\", "\n", "{", "}", "{calls}", "(", "[", "<", "é" * 70, "/a/ | start", "#", "weather", *MARKERS]
texts = st.sampled_from(ODD_TEXTS) | st.text(max_size=4)
numbers = st.integers(-2, 40) | st.sampled_from([0.5, -0.0, 2.0, 1e308, float("inf"), float("nan"), 2**31, 2**64, 10**400, -10**19])
json_values = st.recursive(st.none() | st.booleans() | numbers | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    texts | st.sampled_from(["type", "name", "properties", "$ref"]), inner, max_size=3), max_leaves=5)
REFERENCES = ["#", "#/$defs/a", "#/$defs/b", "#/properties/a", "#/properties/a/items", "#/allOf/0", "#/nope", "#a", "urn:tool:0", "urn:tool:1", "http://x", ""]
PATTERNS = ["", "^a", "b$", "^$", "a|b", "^a|b$", "(", "[", "*", "\\", "\\d+", "a/b", "\\/", "a{9}", "a{2,1}", "(?=a)", "(?i)a", "^", "$", "\\1", "\n", "^\\$", "[^\n]", "\ud800", "(?P<n>a)"]
KINDS = [*JSON_TYPES, "nope", ""]
names = st.sampled_from(["a", "b", "c"]) | texts


def mostly(right, wrong=json_values):
    """Values that are right, and one in eight that may be wrong."""
    return st.sampled_from([right] * 7 + [wrong]).flatmap(lambda chosen: chosen)


def keywords_of(inner):
    """Each keyword of JSON Schema with right values, and wrong ones."""
    some = st.lists(inner, min_size=1, max_size=3)
    right = {
        "type": st.sampled_from(KINDS) | st.lists(st.sampled_from(KINDS), max_size=3),
        **dict.fromkeys(("properties", "$defs", "patternProperties"), st.dictionaries(names, inner, min_size=1, max_size=3)),
        **dict.fromkeys(("additionalProperties", "items"), inner | st.booleans()),
        **dict.fromkeys(("allOf", "anyOf", "oneOf", "prefixItems"), some),
        **dict.fromkeys(("not", "if", "then", "propertyNames", "contains"), inner),
        "required": st.lists(names, max_size=3), "enum": st.lists(json_values, max_size=3), "const": json_values,
        "$ref": st.sampled_from(REFERENCES), "pattern": st.sampled_from(PATTERNS), "format": st.sampled_from([*STRING_FORMATS, "nope"]),
        **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minimum", "maximum",
                         "exclusiveMinimum", "multipleOf"), numbers),
        "uniqueItems": st.booleans(), "$id": texts, "x-guidance": json_values}
    return {name: mostly(values) for name, values in right.items()}


USUAL = ["type", "properties", "required", "additionalProperties", "allOf", "anyOf", "oneOf", "$ref", "$defs", "enum", "const", "minLength", "maxLength", "pattern", "format", "items"]


def deeper(inner):
    keywords = keywords_of(inner)
    names = st.sampled_from([USUAL, USUAL, USUAL, sorted(keywords)]).flatmap(lambda known: st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: keywords[name] for name in chosen}))


flat = deeper(st.sampled_from([{}, {"type": "string"}, {"type": "integer"}, True, False, {"$ref": "#"}]))
schemas = st.sampled_from([flat, flat, deeper(flat)]).flatmap(lambda chosen: chosen)
parameters = mostly(st.fixed_dictionaries(
    {"type": st.just("object"), "properties": mostly(st.dictionaries(names, mostly(schemas), min_size=1, max_size=3))},
    optional={"required": mostly(st.lists(names, max_size=2)), "$defs": mostly(st.fixed_dictionaries({"a": schemas, "b": schemas})),
              "allOf": mostly(st.lists(schemas, max_size=2)), "additionalProperties": mostly(schemas | st.booleans())}) | schemas, schemas | json_values)
function_names = st.sampled_from(["weather", "time", "f-1"]) | texts


def functions(schema):
    return st.fixed_dictionaries({"name": mostly(function_names), schema: parameters}, optional={
        "description": mostly(texts), "strict": mostly(st.booleans())})


def tools_of(schema, inside):
    """The tools of an API: its functions' parameters are in `schema`, and maybe all of them in a member `function`."""
    right = functions(schema).map(lambda each: {"type": "function", "function": each} if inside else {**each, "type": "function"} if schema == "parameters" else each)
    others = st.fixed_dictionaries({"type": mostly(st.sampled_from(OTHER_TOOLS))})
    wrong = st.one_of(others, functions("parameters"), functions("input_schema"), json_values)
    return mostly(st.lists(mostly(right, wrong), min_size=1, max_size=2))


modes = st.sampled_from(["auto", "none", "required", "any"])
a_tool = st.fixed_dictionaries({}, optional={
    "type": mostly(st.sampled_from(["function", "tool", "custom"])), "name": mostly(function_names),
    "function": mostly(st.fixed_dictionaries({"name": mostly(function_names)}))})
some_tools = mostly(st.lists(mostly(a_tool), max_size=2))
allowed_tools = {"mode": mostly(modes), "tools": some_tools}
choices = {  # of each API
    "chat": st.fixed_dictionaries({"type": st.just("function"), "function": mostly(st.fixed_dictionaries({"name": mostly(function_names)}))})
    | st.fixed_dictionaries({"type": st.just("allowed_tools"), "allowed_tools": mostly(st.fixed_dictionaries(allowed_tools))}),
    "responses": a_tool | st.fixed_dictionaries({"type": st.just("allowed_tools"), **allowed_tools}),
    "messages": st.fixed_dictionaries({"type": modes}, optional={"disable_parallel_tool_use": mostly(st.booleans())})
    | st.fixed_dictionaries({"type": st.just("tool"), "name": mostly(function_names)})}
any_choice = st.one_of(a_tool, *choices.values(), json_values, st.fixed_dictionaries({"type": st.just("allowed_tools")}, optional={
    "allowed_tools": mostly(st.fixed_dictionaries({}, optional=allowed_tools)), **allowed_tools}))
choices = {api: mostly(right if api == "messages" else right | modes, any_choice) for api, right in choices.items()}
a_format = mostly(st.fixed_dictionaries({"type": mostly(st.sampled_from(["text", "json_object", "json_schema"]))}, optional={
    "schema": mostly(schemas), "json_schema": mostly(st.fixed_dictionaries({}, optional={"schema": mostly(schemas), "name": texts}))}))
a_schema = mostly(schemas | st.just("json"))
a_setting = mostly(st.fixed_dictionaries({}, optional={"format": a_format, "effort": mostly(st.sampled_from(EFFORTS))}))
constraints = {
    "functions": mostly(st.lists(mostly(functions("parameters")), min_size=1, max_size=2)), "function_call": mostly(a_tool | modes, any_choice),
    "guided_json": schemas | texts, "json_schema": schemas, "guided_regex": st.sampled_from(PATTERNS) | texts,
    "guided_choice": mostly(st.lists(texts, min_size=1, max_size=3)), "structured_outputs": mostly(st.fixed_dictionaries({}, optional={
        "json": mostly(schemas), "regex": st.sampled_from(PATTERNS), "choice": st.lists(texts, max_size=2)})),
    "grammar": texts | st.sampled_from(['root ::= "a"', "start: /a/", "start: %json {}", "start: a", "start: <[1]>"])}
HI = [{"role": "user", "content": "hi"}]
CHAT = {"tools": tools_of("parameters", True), "tool_choice": choices["chat"], "response_format": a_format, "parallel_tool_calls": mostly(st.booleans())}
RESPONSES = {"tools": tools_of("parameters", False), "tool_choice": choices["responses"], "text": a_setting}
MESSAGES = {"tools": tools_of("input_schema", False), "tool_choice": choices["messages"], "output_config": a_setting}
QUESTIONS = {  # of each route: a question, what may come with it, and what rarely does
    "/chat/completions": ({"messages": HI, "model": "default"}, CHAT, constraints), "/v1/chat/completions": ({"messages": HI}, CHAT, constraints),
    "/v1/completions": ({"prompt": "hi"}, {"response_format": a_format}, constraints), "/v1/responses": ({"input": "hi"}, RESPONSES, {}),
    "/v1/messages": ({"messages": HI}, MESSAGES, {}), "/api/chat": ({"messages": HI}, {"tools": CHAT["tools"], "format": a_schema}, {}),
    "/api/generate": ({"prompt": "hi"}, {"format": a_schema}, {})}


def bodies_of(path):
    always, usual, more = QUESTIONS[path]
    both = usual.keys() & {"tools", "tool_choice"}
    asked = st.fixed_dictionaries({name: usual[name] for name in both}, optional={name: each for name, each in usual.items() if name not in both})
    call = {"tool_choice": {"type": "any"} if path == "/v1/messages" else "required"} if "tool_choice" in both else {}
    required = asked.map(lambda body: body | call)
    others = st.sampled_from(sorted(more or usual)).flatmap(lambda name: st.fixed_dictionaries({name: (more or usual)[name]}))
    return st.one_of(asked, required, others).map(lambda body: {**always, **body})


bodies = st.sampled_from(sorted(QUESTIONS)).flatmap(lambda path: st.tuples(st.just(path), bodies_of(path)))


def required_call(function):
    return "/v1/chat/completions", {"messages": HI, "tools": [{"type": "function", "function": function}], "tool_choice": "required"}


# of a route, its body, and how the model calls functions
asked = st.tuples(bodies, st.sampled_from(TOOL_FORMATS)) | st.tuples(functions("parameters").map(required_call), st.sampled_from([name for name, row in CALL_FORMATS.items() if row.tags]))
