"""`file_search` in Responses by OpenAI's client, over a real server with the default model and the real
all-MiniLM-L6-v2. That model never learned to call functions: it is searched first."""

import openai
import pytest

from chatlm.front.annexes.knowledge.scan import ROLE
from real_server import children_of_role, server
from shared_servers import KEYS

pytestmark = pytest.mark.timeout(600)
ZOO = b"# Cats\n\nCats sleep a lot.\n\n## Food\n\nThey eat fish and milk.\n\n# Cars\n\nA car needs fuel."
RESULTS = ["file_search_call.results"]


def client_of(url, key=KEYS[0]):
    return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)


def filled(client, name="zoo.md", content=ZOO, **more):
    store = client.vector_stores.create(name=name)
    file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=(name, content), **more)
    assert file.status == "completed"
    return store.id, file.id


@pytest.fixture(scope="module")
def client(knowing_server):
    return client_of(knowing_server.url)


@pytest.fixture(scope="module")
def zoo(client):
    return filled(client)


def forced(text):
    return {"format": {"type": "json_schema", "name": "x", "schema": {"enum": [text]}}}


def ask(client, searched, question="What do cats eat?", /, **more):
    tools = more.pop("tools", [{"type": "file_search", "vector_store_ids": [searched]}])
    return client.responses.create(model="default", input=question, tools=tools, temperature=0,
                                   **{"max_output_tokens": 12, "include": RESULTS} | more)


def types(response):
    return [item.type for item in response.output]


def test_passages_are_found_by_meaning_and_cited(client, zoo):
    store, file = zoo
    response = ask(client, store, "What is their diet?", text=forced("Fish [1], [7]; [12345]"),
                   max_output_tokens=60)
    assert types(response) == ["file_search_call", "message"]
    call = response.output[0]
    assert (call.status, call.queries) == ("completed", ["What is their diet?"])
    assert call.results[0].text.startswith("## Food") and call.results[0].file_id == file
    [annotation] = response.output[1].content[0].annotations
    assert (annotation.type, annotation.file_id, annotation.filename) == ("file_citation", file, "zoo.md")
    assert response.output_text[annotation.index:].startswith("[1]")
    alone = client.responses.create(model="default", input="What is their diet?", max_output_tokens=1)
    assert response.usage.input_tokens > alone.usage.input_tokens + 30


def test_the_clients_stream_helper_understands_its_events(client, zoo):
    store, file = zoo
    with client.responses.stream(model="default", input="What do cats eat?", max_output_tokens=60,
                                 tools=[{"type": "file_search", "vector_store_ids": [store]}],
                                 text=forced("Fish [1]")) as stream:
        events = [*stream]
    kinds = [event.type for event in events]
    assert [kind for kind in kinds if "file_search" in kind] == [
        f"response.file_search_call.{moment}" for moment in ("in_progress", "searching", "completed")]
    [added] = [event for event in events if event.type == "response.output_text.annotation.added"]
    final = events[-1].response
    assert added.annotation.file_id == file and final.output[0].results is None
    assert final.output[1].content[0].annotations[0].to_dict() == added.annotation.to_dict()


def test_the_same_question_has_the_same_answer_streamed_kept_and_in_the_background(client, zoo):
    store, _ = zoo
    whole = ask(client, store)
    assert client.responses.retrieve(whole.id).output == whole.output
    begun = ask(client, store, background=True)
    while begun.status in ("queued", "in_progress"):
        begun = client.responses.retrieve(begun.id)
    events = [*ask(client, store, stream=True)]
    for other in (begun, events[-1].response, ask(client, store, store=False)):
        assert other.output_text == whole.output_text
        assert other.output[0].results == whole.output[0].results
    unkept = ask(client, store, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_a_response_goes_on_and_is_searched_anew(client, zoo):
    store, _ = zoo
    first = ask(client, store)
    second = ask(client, store, "And how much do they sleep?", previous_response_id=first.id)
    assert second.output[0].queries == [
        "And how much do they sleep?", "And how much do they sleep?\nWhat do cats eat?"]
    assert "Cats sleep a lot." in str(second.output[0].results)
    conversation = client.conversations.create()
    ask(client, store, conversation=conversation.id)
    assert [item.type for item in client.conversations.items.list(conversation.id, order="asc")] == [
        "message", "file_search_call", "message"]
    assert ask(client, store, "Why?", conversation=conversation.id).status in ("completed", "incomplete")


def test_filters_and_limits_are_those_of_the_entry(client):
    store, _ = filled(client, attributes={"year": 1999})
    for more, count in (({}, 3), ({"max_num_results": 1}, 1), (
            {"filters": {"type": "gte", "key": "year", "value": 2000}}, 0),
            ({"ranking_options": {"score_threshold": 0.99}}, 0),
            ({"ranking_options": {"ranker": "auto", "hybrid_search": {
                "embedding_weight": 1, "text_weight": 0}}}, 3)):
        response = ask(client, store, tools=[{"type": "file_search", "vector_store_ids": [store], **more}])
        assert len(response.output[0].results) == count, more


def test_it_stands_beside_functions_and_tools_of_servers(client, zoo):
    store, _ = zoo
    function = {"type": "function", "name": "order", "parameters": {
        "type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, "strict": False}
    search = {"type": "file_search", "vector_store_ids": [store]}
    picks = {"type": "mcp", "server_label": "fake", "require_approval": "never", "allowed_tools": ["pick"]}
    response = ask(client, store, tools=[search, function], tool_choice={"type": "function", "name": "order"},
                   max_output_tokens=60)
    assert types(response) == ["function_call"]
    response = ask(client, store, tools=[search, function, picks], tool_choice="required",
                   max_output_tokens=200)
    assert types(response)[:2] == ["mcp_list_tools", "file_search_call"] and response.output[1].results
    response = ask(client, store, tools=[search, picks], max_output_tokens=60, tool_choice={
        "type": "mcp", "server_label": "fake", "name": "pick"})
    assert types(response)[:2] == ["mcp_list_tools", "mcp_call"]


def test_a_killed_worker_changes_nothing(knowing_server, client, zoo):
    store, _ = zoo
    undisturbed = ask(client, store, max_output_tokens=40)
    text = []
    killed = 0
    for event in ask(client, store, max_output_tokens=40, stream=True):
        if event.type == "response.file_search_call.searching" or (
                event.type == "response.output_text.delta" and len(text) == 5):
            for each in children_of_role(knowing_server.process, "worker"):
                each.kill()
                killed += 1
        if event.type == "response.output_text.delta":
            text.append(event.delta)
    assert killed and "".join(text) == undisturbed.output_text and event.response.output[0].results


def test_a_killed_search_process_is_started_anew(knowing_server, client, zoo):
    store, _ = zoo
    before = ask(client, store).output[0].results
    vectors = children_of_role(knowing_server.process, ROLE)
    assert vectors
    for each in vectors:
        each.kill()
    assert ask(client, store).output[0].results == before


def test_a_client_that_leaves_in_a_search_hinders_nobody(client, zoo):
    store, _ = zoo
    for _ in range(3):
        with ask(client, store, stream=True) as stream:
            next(event for event in stream if event.type == "response.file_search_call.searching")
    assert ask(client, store).output[0].status == "completed"


def test_two_keys_search_their_own(client):
    other = client.with_options(api_key=KEYS[1])
    store, _ = filled(client)
    theirs, file = filled(other, "bees.md", b"# Cats\n\nBees eat nectar, cats eat mice.")
    assert ask(client, store).output[0].results
    said = []
    for name in (store, "vs_" + "0" * (len(store) - 3)):
        for names in ([name], [theirs, name]):
            with pytest.raises(openai.NotFoundError) as error:
                ask(other, None, tools=[{"type": "file_search", "vector_store_ids": names}])
            said.append(str(error.value).replace(name, "").replace("[1]", "[0]"))
    assert len({*said}) == 1
    found = ask(other, theirs).output[0].results
    assert {each.file_id for each in found} == {file}
    client.vector_stores.delete(store)
    with pytest.raises(openai.NotFoundError):
        ask(client, store)


def test_without_an_embedder_words_are_searched(knowing_server, zoo, default_model_path, tmp_path):
    """Of a database that a server with an embedder has filled."""
    database = knowing_server.copy_database(tmp_path)
    tools = [{"type": "file_search", "vector_store_ids": [zoo[0]]}]
    with server(default_model_path, f"--database={database}", f"--api-key={KEYS[0]}") as (_, url):
        raw = client_of(url).responses.with_raw_response.create(
            model="default", input="fish?", tools=tools, max_output_tokens=2, include=RESULTS)
        assert raw.headers["X-Search"] == "words" and "fish" in raw.parse().output[0].results[0].text


def test_without_a_database_the_search_is_ignored(tiny_url, zoo):
    tools = [{"type": "file_search", "vector_store_ids": [zoo[0]]}]
    raw = client_of(tiny_url).responses.with_raw_response.create(model="default", input="x", tools=tools,
                                                                 max_output_tokens=2)
    assert raw.headers["X-Ignored-Tools"] == "file_search"
