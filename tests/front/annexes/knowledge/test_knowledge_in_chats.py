"""`knowledge` in Chat Completions, by OpenAI's client over a real server with the real all-MiniLM-L6-v2."""

import json
import re
import urllib.request

import openai
import pytest

from chatlm.front.annexes.knowledge.prompting import read_in_time
from chatlm.front.annexes.knowledge.scan import ROLE
from chatlm.front.annexes.knowledge.search import Hit, worth_reading
from real_server import children_of_role, server
from shared_servers import KEYS

pytestmark = pytest.mark.timeout(600)
ZOO = b"# Cats\n\nCats sleep a lot.\n\n## Food\n\nThey eat fish and milk.\n\n# Cars\n\nA car needs fuel."
BOOK = "\n\n".join(
    f"# Chapter {number}\n\nIt tells how {number} ships sailed to the island number {number * 3}."
    for number in range(200)).encode()


def client_of(url, key=KEYS[0]):
    return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(knowing_server):
    return client_of(knowing_server.url)


def filled(client, name, content):
    store = client.vector_stores.create(name=name)
    file = client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=(name, content))
    assert file.status == "completed"
    return store.id, file.id


@pytest.fixture(scope="module")
def zoo(client):
    return filled(client, "zoo.md", ZOO)


@pytest.fixture(scope="module")
def book(client):
    return filled(client, "book.md", BOOK)


def ask(client, stores, *questions, mode=None, **more):
    messages = [{"role": "user", "content": text} if isinstance(text, str) else text for text in questions]
    knowledge = {"stores": stores} | ({"mode": mode} if mode else {})
    extra = {"knowledge": knowledge, **more.pop("extra_body", {})}
    return client.chat.completions.create(model="default", messages=messages, extra_body=extra, temperature=0,
                                          **{"max_tokens": 12, **more})


def test_whole_documents_are_read_where_they_fit(client, zoo):
    store, file = zoo
    answer = ask(client, [store], "What do cats eat?")
    known = answer.knowledge
    assert (known["mode"], known["read"], known["of"], known["words_only"]) == ("whole", 3, 3, False)
    assert [(each["index"], each["file_id"], each["filename"]) for each in known["passages"]] == [
        (number, file, "zoo.md") for number in (1, 2, 3)]
    assert [each["start"] for each in known["passages"]] == [ZOO.index(b"# Cats"), ZOO.index(b"## Food"),
                                                             ZOO.index(b"# Cars")]
    alone = client.chat.completions.create(model="default", max_tokens=1,
                                           messages=[{"role": "user", "content": "What do cats eat?"}])
    assert answer.usage.prompt_tokens > alone.usage.prompt_tokens + 30


def test_passages_are_searched_where_documents_do_not_fit(client, book):
    store, file = book
    known = ask(client, [store], "To which island did 17 ships sail?").knowledge
    assert known["mode"] == "search" and 0 < known["read"] < known["of"] == 200
    assert known["passages"][0]["heading"] == "Chapter 17"
    assert known["passages"][0]["start"] == BOOK.index(b"# Chapter 17\n")


def test_as_many_passages_are_read_as_are_worth_it_or_as_are_asked_for(client, book):
    store, _ = book
    question = "To which island did 17 ships sail?"
    worth = ask(client, [store], question, mode="search").knowledge["passages"]

    def read(**search):
        return ask(client, [store], question, extra_body={"knowledge": {"stores": [store], "mode": "search", **search}}).knowledge["passages"]
    eight = read(score_threshold=0)
    assert 1 <= len(worth) < len(eight) == 8
    left_out = [each for each in eight if each["start"] not in {one["start"] for one in worth}]
    assert max(each["score"] for each in left_out) < min(each["score"] for each in worth[1:] or worth)
    assert read(max_num_results=8) == eight and len(read(max_num_results=12)) == 12
    least = sorted(each["score"] for each in eight)[5]
    assert [each["score"] >= least for each in read(score_threshold=least)] == [True] * 3
    assert len(read(max_num_results=2, score_threshold=least)) == 2


@pytest.mark.parametrize("scores, read", [
    ([0.9, 0.8, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1], [0, 1]),
    ([0.3, 0.9, 0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1], [0, 1]),               # the first by ranks stays
    ([0.89, 0.88, 0.81, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8], [0, 1]),            # an embedder that finds all alike
    ([0.5] * 20, [0, 1, 2, 3, 4, 5, 6, 7]),
    ([0.9, 0.1, 0.1], [0, 1, 2]),                                          # there are so few that all are read
    ([], []),
])
def test_what_is_far_less_near_than_the_best_is_not_worth_reading(scores, read):
    hits = [Hit(number, 1, "file-a", "a.md", {}, number, "", 0, None, "x", score) for number, score in enumerate(scores)]
    assert [hit.passage for hit in worth_reading(hits, 8)] == read


def test_the_budget_follows_the_speed_of_prompts_and_not_its_noise():
    assert [read_in_time(each) for each in (0.0, 1e-6, 0.0005, 0.0108, 0.0204, 5.0)] == [1024, 2**23, 16384, 1024, 512, 256]
    assert read_in_time(0.019) == read_in_time(0.021)


def test_the_speed_of_prompts_is_measured(knowing_server, client, zoo):
    ask(client, [zoo[0]], "What do cats eat?")
    with urllib.request.urlopen(urllib.request.Request(knowing_server.url + "/stats", headers={"Authorization": f"Bearer {KEYS[0]}"})) as response:
        workers = json.load(response)["workers"]
    assert all(0 < worker["prompt_token_s"] < 1 for worker in workers)


def test_a_question_that_follows_is_searched_with_the_one_before_it(client, book):
    store, _ = book
    known = ask(client, [store], "Tell me about chapter 17.", {"role": "assistant", "content": "Yes."},
                "And where did they go?", mode="search").knowledge
    assert "Chapter 17" in [each["heading"] for each in known["passages"]]


def test_the_same_question_has_the_same_answer_and_its_documents_are_cached(client, zoo):
    store, _ = zoo
    first, second = (ask(client, [store], "What do cats eat?", seed=1) for _ in range(2))
    assert first.choices[0].message == second.choices[0].message and first.knowledge == second.knowledge
    other = ask(client, [store], "Why does a car need fuel?")
    details = other.usage.prompt_tokens_details
    assert details.cached_tokens > other.usage.prompt_tokens // 2


def test_streams_say_first_what_was_read(client, zoo):
    store, file = zoo
    chunks = list(ask(client, [store], "What do cats eat?", stream=True))
    assert [hasattr(chunk, "knowledge") for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert chunks[0].knowledge == ask(client, [store], "What do cats eat?").knowledge


CITES = {"type": "json_schema", "json_schema": {"name": "x", "schema": {
    "enum": ["Fish [2], not [3]; [99] and [12345] [0] [1"]}}}


def test_what_was_given_is_annotated_and_nothing_else(client, zoo):
    store, file = zoo
    answer = ask(client, [store], "?", response_format=CITES, max_tokens=100)
    message = answer.choices[0].message
    entry = {"type": "file_citation", "file_id": file, "filename": "zoo.md"}
    wanted = [{**entry, "index": message.content.index(f"[{number}]"), "passage": number}
              for number in (2, 3)]
    assert "[99]" in message.content and [each.to_dict() for each in message.annotations] == wanted
    chunks = list(ask(client, [store], "?", response_format=CITES, max_tokens=100, stream=True))
    cited = [chunk.choices[0].delta.annotations for chunk in chunks
             if chunk.choices and hasattr(chunk.choices[0].delta, "annotations")]
    assert cited == [wanted] and chunks[-1].choices[0].delta.annotations == wanted
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content


def test_the_native_route_says_it_in_a_frame_of_its_own(client, zoo):
    store, _ = zoo
    body = {"messages": [{"role": "user", "content": "What do cats eat?"}], "max_tokens": 4,
            "knowledge": {"stores": [store]}}
    url = f"{client.base_url}".removesuffix("/v1/") + "/chat/completions"
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {client.api_key}"}
    http = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(http, timeout=120) as response:
        lines = response.read().split(b"\n")
    frames = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert [*frames[0]] == ["knowledge"] and frames[0]["knowledge"]["read"] == 3 and frames[-1]["done"]


@pytest.mark.parametrize("knowledge, status, why", [
    ({"stores": ["vs_nothing"]}, 404, "vs_nothing"),
    ({"stores": []}, 400, "knowledge"),
    ({"stores": ["a"] * 9}, 400, "1 to 8"),
    ({"stores": "vs_a"}, 400, "a list"),
    ({"stores": ["a"], "mode": "all"}, 400, '"auto"'),
    ({"stores": ["a"], "mods": "whole"}, 400, "knowledge has no member mods, only stores, mode, max_num_results, score_threshold, return_text"),
    ({"stores": ["a"], "max_num_results": 0}, 400, "max_num_results, from 1 to 50"),
    ({"stores": ["a"], "score_threshold": 1.5}, 400, "score_threshold, from 0 to 1"),
    ([], 400, "knowledge"),
])
def test_a_wrong_value_is_named(client, knowledge, status, why):
    with pytest.raises(openai.APIStatusError) as error:
        client.chat.completions.create(model="default", messages=[{"role": "user", "content": "x"}],
                                       extra_body={"knowledge": knowledge})
    assert error.value.status_code == status and why in str(error.value)
    assert (error.value.body["param"] or "").startswith("knowledge")


def test_whole_documents_that_do_not_fit_are_refused_with_the_room(client, book):
    with pytest.raises(openai.BadRequestError, match=r"room for [0-9,]+ tokens of knowledge, but"):
        ask(client, [book[0]], "x", mode="whole")


def test_an_empty_store_gives_nothing_to_read(client):
    store = client.vector_stores.create()
    known = ask(client, [store.id], "x").knowledge
    assert (known["read"], known["of"], known["passages"]) == (0, 0, [])
    client.vector_stores.delete(store.id)
    with pytest.raises(openai.NotFoundError):
        ask(client, [store.id], "x")


def test_a_killed_search_process_is_started_anew(knowing_server, client, book):
    before = ask(client, [book[0]], "To which island did 17 ships sail?").knowledge
    vectors = children_of_role(knowing_server.process, ROLE)
    assert vectors
    for each in vectors:
        each.kill()
    assert ask(client, [book[0]], "To which island did 17 ships sail?").knowledge == before


def test_stores_of_others_are_unknown_ones(client, zoo):
    store, _ = zoo
    assert ask(client, [store], "What do cats eat?").knowledge["read"] == 3
    said = []
    for name in (store, "vs_" + "0" * (len(store) - 3)):
        with pytest.raises(openai.NotFoundError) as error:
            ask(client.with_options(api_key=KEYS[1]), [name], "What do cats eat?")
        said.append(re.sub(name, "", str(error.value)))
    assert said[0] == said[1]


def test_without_an_embedder_words_alone_are_searched(knowing_server, book, default_model_path, tmp_path):
    """Of a database that a server with an embedder has filled."""
    database = knowing_server.copy_database(tmp_path)
    with server(default_model_path, f"--database={database}", f"--api-key={KEYS[0]}") as (_, url):
        raw = client_of(url).chat.completions.with_raw_response.create(
            model="default", messages=[{"role": "user", "content": "What does chapter 17 tell?"}],
            max_tokens=2, extra_body={"knowledge": {"stores": [book[0]]}})
        known = raw.parse().knowledge
        assert raw.headers["X-Search"] == "words" and known["words_only"]
        assert known["passages"][0]["heading"] == "Chapter 17"


def test_without_a_database_nothing_is_searched(tiny_url, zoo):
    with pytest.raises(openai.NotFoundError) as error:
        ask(client_of(tiny_url), [zoo[0]], "x")
    assert error.value.code == "no_database"


@pytest.mark.parametrize("mode", ["whole", "search"])
def test_the_text_that_was_read_makes_the_same_prompt(client, zoo, mode):
    """So whoever asks again needs no store."""
    store, _ = zoo
    question = {"role": "user", "content": "What do cats eat?"}
    first = ask(client, [store], question, extra_body={"knowledge": {"stores": [store], "mode": mode, "return_text": True}, "seed": 3})
    text = first.knowledge["text"]
    assert "[1] zoo.md" in text and "They eat fish and milk." in text and "text" not in ask(client, [store], question, mode=mode).knowledge
    said = [{"role": "system", "content": text}, question] if mode == "whole" else [question | {"content": text + question["content"]}]
    again = client.chat.completions.create(model="default", messages=said, temperature=0, max_tokens=12, seed=3)
    assert again.usage.prompt_tokens == first.usage.prompt_tokens and again.choices[0].message.content == first.choices[0].message.content
