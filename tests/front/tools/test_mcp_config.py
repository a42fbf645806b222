"""The file of --mcp-config, as other programs write it, and what is wrong with it."""

import json

import pytest

from chatlm.common.errors import ConfigError
from chatlm.front.tools.config import read_mcp_config
from chatlm.front.tools.rules import model_name

VARIABLES = {"TOKEN": "secret-token", "EMPTY": ""}


def read(tmp_path, text):
    path = tmp_path / "mcp.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return read_mcp_config(str(path), VARIABLES)


def refusal(tmp_path, text):
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"--mcp-config {tmp_path}") and "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    return str(error.value)


def of_one(**fields):
    return {"mcpServers": {"one": fields}}


def test_files_of_four_programs_are_read(tmp_path):
    claude = read(tmp_path, of_one(command="npx", args=["-y", "x"], env={"A": "${TOKEN}", "B": "${NONE:-b}", "C": "${EMPTY:-c}"}))
    assert claude[0].command == ("npx", "-y", "x") and claude[0].env == {"A": "secret-token", "B": "b", "C": ""}
    assert "npx" in claude[0].warning
    cursor = read(tmp_path, of_one(url="https://tools.example/mcp", headers={"Authorization": "Bearer ${env:TOKEN}"}))
    assert cursor[0].headers == {"Authorization": "Bearer secret-token"} and not cursor[0].warning
    code = read(tmp_path, '{\n// a comment\n"servers": {"one": {"type": "stdio", "command": "http://x" // another\n}}, "inputs": []}')
    assert code[0].command == ("http://x",)
    studio = read(tmp_path, '\ufeff{"mcpServers": {"one": {"url": "http://127.0.0.1:9/mcp"}, "two": {"command": "x", "disabled": true}}}')
    assert [server.label for server in studio] == ["one"]


def test_approvals_and_hidden_tools_are_read(tmp_path):
    [server] = read(tmp_path, of_one(command="x", alwaysAllow=["a"], autoApprove=["b"], disabledTools=["c"], trustReadOnly=True, timeout_ms=1500))
    assert server.allowed == {"a", "b"} and server.hidden == {"c"} and server.trusts_read_only and server.timeout_s == 1.5


@pytest.mark.parametrize("text, words", [
    ("{", "not a JSON file"), ("[]", "must be an object"), ("{}", "must have mcpServers"), ('{"mcpServers": []}', "must have mcpServers"),
    ('{"mcpServers": {"a": {"command": "x"}, "a": {"command": "y"}}}', '"a" is there twice'),
    ({"mcpServers": {}, "servers": {}}, "must have mcpServers"), ({"mcpservers": {}}, 'no field "mcpservers"'),
    (of_one(), "either command or url"), (of_one(command="x", url="http://x"), "either command or url"),
    (of_one(command=""), "command is empty"), (of_one(command=["x"]), "command must be a text"), (of_one(command="x", args="y"), "list of texts"),
    (of_one(command="x\0"), "command must be a text"), (of_one(command="x", env={"A": 1}), "values are texts"), (of_one(command="x", env={"A=B": "c"}), "can't be set"),
    (of_one(command="x", headers={}), "headers does not go with command"), (of_one(url="http://x", env={}), "env does not go with url"),
    (of_one(url="file:///etc/passwd"), "http://"), (of_one(url="http://"), "http://"), (of_one(url="http://me:secret@x/"), "password"),
    (of_one(url="http://x:99999/"), "http://"),
    (of_one(url="http://x", type="sse"), "2024"), (of_one(url="http://x", type="stdio"), "does not go with url"), (of_one(command="x", type="pipe"), "stdio or http"),
    (of_one(url="http://x", headers={"A b": "c"}), "no header can have"), (of_one(url="http://x", headers={"A": "secret\nB: c"}), "no header can have"),
    (of_one(command="x", timeout=60), "timeout_ms"), (of_one(command="x", timeout_ms=True), "1 to 3600000"), (of_one(command="x", timeout_ms=0), "1 to 3600000"),
    (of_one(command="x", envFile=".env"), "envFile is not supported"), (of_one(command="x", oauth={}), "oauth is not supported"),
    (of_one(command="x", comand="y"), "did you mean command"), (of_one(command="x", disabled="yes"), "true or false"),
    (of_one(command="${UNSET}"), "variable UNSET, which is not set"), (of_one(command="x", env={"A": "${input:key}"}), "can't fill in"),
    (of_one(command="x", env={"A": "${}"}), "can't fill in"), ({"mcpServers": {"": {"command": "x"}}}, "1 to 64 characters"),
    ({"mcpServers": {"a\nb": {"command": "x"}}}, "1 to 64 characters"), ({"mcpServers": {"x" * 65: {"command": "x"}}}, "1 to 64 characters"),
    ({"mcpServers": {str(number): {"command": "x"} for number in range(65)}}, "at most 64"), ("[" * 100_000, "not a JSON file"),
    ("x" * (1 << 20) + "y", "more than"),
])
def test_what_is_wrong_is_named_in_one_line(tmp_path, text, words):
    assert words in refusal(tmp_path, text)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match="No such file"):
        read_mcp_config("/nonexistent/mcp.json")


@pytest.mark.parametrize("value", ["${A:-{x}}", "${A:-${B}}", "x ${A", "${A:-{}", "${{A}}", "${A:-{x}} ${HOME}"])
@pytest.mark.parametrize("place", ["args", "env", "headers", "url"])
def test_a_variable_that_can_t_be_filled_in_is_refused(tmp_path, value, place):
    """It would be passed on as it is."""
    fields = {"args": {"command": "c", "args": [value]}, "env": {"command": "c", "env": {"X": value}},
              "headers": {"url": "http://h/", "headers": {"X": value}}, "url": {"url": f"http://h/{value}"}}
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": {"a": fields[place]}}))
    with pytest.raises(ConfigError, match="without the } that ends it|can't fill in"):
        read_mcp_config(str(path), {"A": "1", "HOME": "/h"})


@pytest.mark.parametrize("labels", [
    ("a", "a__b"), ("a", "a_"), ("a.b", "a_b"), ("a b", "a.b"), ("x" * 60, "x" * 61), ("a", "a.b"),
    ("x" * 55 + "1", "x" * 55 + "2")])
def test_labels_whose_tools_could_have_one_name_are_refused(tmp_path, labels):
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": {label: {"command": "c"} for label in labels}}))
    with pytest.raises(ConfigError, match="could have the same name"):
        read_mcp_config(str(path))


@pytest.mark.parametrize("labels", [("time", "time_zone"), ("a", "ab", "a-b"), ("a_b", "a"), ("A", "a")])
def test_other_labels_go_together(tmp_path, labels):
    path = tmp_path / "mcp.json"
    path.write_text(json.dumps({"mcpServers": {label: {"command": "c"} for label in labels}}))
    assert len(read_mcp_config(str(path))) == len(labels)
    names = {model_name(label, tool) for label in labels for tool in ("x", "b__x", "_x", ".x", "b.x")}
    assert len(names) == 5 * len(labels)
