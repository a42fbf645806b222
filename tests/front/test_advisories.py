"""What the advisories of vLLM and SGLang of 2026 are about, in twelve kinds, and that none of it happens here.

KINDS says of each kind what happened to others, and which tests show that it cannot happen here: those of this
module, which try what no other test tried, and tests elsewhere, which must exist. SECURITY.md lists the same
kinds."""

import ast
import base64
import http.client
import json
import os
import pickle
import random
import re
import socket
import sqlite3
import stat
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

import psutil
import pytest

import chat_server
from attacked import CHAT, COMPLETIONS, HI, MESSAGES, RESPONSES, Attacked, Trap, two_models
from attacks import (
    BOUNDED, ENDLESS, EVIL, NAMES, NO_SUCH_ID, PICTURES, REFUSED, Planted, parts_of, payloads, png)
from chatlm.common.processes.connect import Listener, dial, listen
from chatlm.front.annexes.chats.row import CHAT_ROUTES
from chatlm.front.front import ROUTES
from chatlm.worker.engine.kvcache import Content, PagePool
from fake_hub import fake_hub
from real_server import descendants, server
from sent_bodies import BASE
from spoken_paths import ANSWERS, BODY_FIELDS

pytestmark = pytest.mark.timeout(120)
ROOT = Path(chat_server.__file__).parent
TESTS = ROOT / "tests"
# A short answer, in the words of all APIs
SHORT = {
    "max_tokens": 2, "max_output_tokens": 16, "n_predict": 2, "options": {"num_predict": 2}, "stream": False}


@dataclass(frozen=True)
class Kind:
    happened: str               # to others
    here: tuple[str, ...]       # tests of this module
    elsewhere: tuple[str, ...]  # MODULE::TEST


KINDS = {
    "slots used again": Kind(
        "Rows, pages or buffers that one request had left reached the answer of the next one, with its text, "
        "scores or masks.",
        ("test_a_row_used_again_is_as_new",),
        ("worker/engine/test_kept.py::test_an_owner_never_sees_another_s_pages",
         "worker/engine/test_temporary_pages.py::test_nothing_of_a_temporary_answer_is_left",
         "worker/engine/test_integrity.py::test_a_page_that_two_answers_own_is_named",
         "worker/engine/test_states.py::test_owners_who_share_no_pages_share_no_states",
         "core/test_core_attention.py::test_what_lies_in_unused_slots_does_not_matter",
         "front/pool/test_prefixes.py::test_a_key_notices_no_other_key_s_prefixes")),
    "hashes of clients as keys": Kind(
        "Prefixes, pictures or sessions were found by a hash that collides, or that a client sends, which then "
        "got what was another's.",
        ("test_what_a_client_says_of_itself_joins_no_pages", "test_prefixes_with_equal_hashes_stay_apart"),
        ("worker/engine/test_kept.py::test_an_owner_never_sees_another_s_pages",
         "worker/engine/test_engine_adapters.py::test_the_prefix_cache_keeps_adapters_apart",
         "common/test_picture_layouts.py::test_row_ids_depend_on_pixels_size_and_settings",
         "front/server/test_picture_routes.py::test_only_a_picture_s_pixels_count",
         "front/pool/test_sandbox.py::test_a_grammar_is_checked_once_for_each_owner",
         "front/server/test_spaces.py::test_a_space_that_can_be_guessed_is_refused",
         "front/server/test_owners.py::test_a_key_is_not_its_owner_s_name")),
    "ids by prefix": Kind(
        "A request for one id reached every request whose id begins with it, and ended or read others' answers.",
        ("test_a_part_of_an_id_is_no_id", "test_a_part_of_an_id_ends_no_answer"),
        ("front/pool/test_duplicate_ids.py::test_no_client_spells_the_id_of_a_part",
         "front/server/test_security.py::test_only_its_own_key_stops_an_answer",
         "front/server/test_streams.py::test_only_its_own_key_reads_a_stream",
         "front/server/test_round_ids.py::test_answers_of_two_keys_stay_apart",
         "front/server/test_approvals.py::test_only_ids_that_the_server_made_are_known")),
    "one grammar that ends the engine": Kind(
        "A grammar that could not be compiled or followed ended the engine, and all answers with it.",
        ("test_no_grammar_ends_more_than_its_request",),
        ("worker/engine/test_grammar.py::test_an_impossible_grammar_fails_its_request_only",
         "worker/engine/test_grammar.py::test_a_matcher_that_breaks_is_our_fault",
         "worker/engine/test_grammar.py::test_a_schema_that_costs_much_memory_is_refused",
         "front/pool/test_sandbox.py::test_a_greedy_schema_is_a_400",
         "front/api/test_apis.py::test_no_odd_tools_or_formats_give_5xx",
         "front/server/test_hostile.py::test_no_attack_ends_a_process")),
    "templates, budgets and media without bound": Kind(
        "Something in a request took all memory or time: a template, a huge count, a picture, an address to "
        "fetch from.",
        ("test_a_request_brings_no_template", "test_numbers_without_bound_are_refused_or_bounded",
         "test_no_picture_takes_more_than_its_bound", "test_nothing_that_a_request_names_is_fetched"),
        ("common/test_text.py::test_templates_are_sandboxed",
         "common/test_text.py::test_no_name_of_a_client_s_variable_breaks_a_template",
         "front/pool/test_sandbox.py::test_a_greedy_template_is_refused",
         "front/server/test_picture_routes.py::test_what_is_no_picture_is_a_400",
         "front/server/test_picture_routes.py::test_seventeen_pictures_are_too_many",
         "front/server/test_extract.py::test_a_document_bomb_is_refused",
         "front/server/test_compressed_bodies.py::test_a_body_that_inflates_too_far_is_413",
         "front/api/test_odd_values.py::test_odd_values_break_no_reader")),
    "pickles": Kind(
        "Bytes from a file, a socket or a request were unpickled or evaluated, and ran the code in them.",
        ("test_nothing_is_unpickled_or_evaluated", "test_the_walk_finds_what_runs_code",
         "test_a_request_with_a_pickle_runs_nothing"),
        ("common/test_other_trainers.py::test_a_hostile_pickle_is_named_without_loading",
         "worker/weights/formats/test_bad_models.py::test_what_is_no_state_dict_is_named",
         "worker/weights/formats/test_bad_models.py::test_a_tokenizer_that_cannot_be_one_is_named",
         "common/test_messages.py::test_any_bytes_give_a_message_or_a_refusal")),
    "states read from disk": Kind(
        "A cache, a database or a note of an earlier run was believed though others could have written it.",
        ("test_a_planted_prefix_store_changes_no_answer",),
        ("worker/engine/test_kept.py::test_a_tampered_store_never_gives_a_wrong_token",
         "worker/engine/test_kept.py::test_pages_of_other_weights_are_not_found",
         "front/pool/test_prefixes.py::test_an_untrusted_folder_is_refused",
         "worker/weights/formats/test_kept_texts.py::test_what_others_could_have_written_is_not_read",
         "worker/weights/formats/test_kept_texts.py::test_a_damaged_file_is_made_again",
         "front/server/test_store.py::test_an_unusable_store_is_refused_in_one_line",
         "front/server/test_store.py::test_a_link_beside_a_store_changes_no_other_file",
         "front/server/test_store.py::test_a_link_put_beside_an_open_store_is_not_followed",
         "front/pool/test_downloads.py::test_a_changed_file_is_not_put_together",
         "common/test_bundle.py::test_an_untrusted_cache_gives_way_to_a_folder",
         "export/test_unfinished.py::test_a_link_in_the_unfinished_folder_s_place_is_not_followed")),
    "assert as a check": Kind(
        "What clients send was checked with `assert`, which `python -O` leaves out.",
        ("test_without_asserts_the_same_is_refused",),
        ("front/api/test_odd_values.py::test_odd_values_break_no_check_of_fields",)),
    "parsers chosen by a request": Kind(
        "A request named a parser, a backend or a function, and the server imported and called it.",
        ("test_a_request_names_nothing_that_is_imported",),
        ("front/api/test_ignored.py::test_a_field_that_nothing_reads_is_named",
         "front/api/test_ignored.py::test_the_header_names_ignored_fields_everywhere",
         "front/api/test_apis.py::test_odd_tools_are_answered_or_refused_by_name")),
    "peers' protocols": Kind(
        "Ranks, Ray's actors and engines decoded whatever reached their ports and pipes, before they knew who "
        "sent it.",
        ("test_a_server_of_ranks_opens_no_port_but_its_own", "test_a_proof_that_was_overheard_proves_nothing"),
        ("worker/ranks/test_nodes.py::test_only_the_secret_admits_a_connection",
         "worker/ranks/test_nodes.py::test_a_first_frame_of_garbage_is_one_line",
         "worker/ranks/test_nodes.py::test_ranks_meet_among_who_send_nonsense",
         "front/pool/test_ray.py::test_a_worker_without_the_secret_learns_nothing",
         "front/pool/test_ray.py::test_a_garbage_frame_is_refused_in_one_line",
         "common/test_messages.py::test_any_bytes_give_a_message_or_a_refusal",
         "common/test_messages.py::test_a_bad_header_is_refused_before_its_body")),
    "a way around an opt-out": Kind(
        "What an operator had switched off or limited was still reached by another route, name or dialect.",
        ("test_no_name_of_a_model_avoids_a_key_s_limit", "test_no_route_avoids_a_key_s_limit",
         "test_no_line_of_a_batch_avoids_a_key_s_limit", "test_without_chats_no_route_keeps_one",
         "test_a_model_that_is_named_twice_avoids_no_limit",
         "test_without_downloads_nothing_asks_the_hub", "test_without_tools_no_dialect_has_any"),
        ("front/server/test_paths.py::test_no_spelling_of_a_path_avoids_a_key",
         "front/server/test_paths.py::test_slashes_give_a_limited_key_nothing",
         "front/server/test_ledger.py::test_models_of_a_key_are_all_that_it_sees",
         "front/server/test_ledger.py::test_operators_need_their_role",
         "front/server/test_rebinding.py::test_a_rebound_page_has_no_tools_in_its_requests",
         "front/server/test_getting_models.py::test_only_an_operator_gets_and_deletes_models",
         "front/annexes/chats/test_temporary_answers.py::test_words_of_a_temporary_chat_are_nowhere")),
    "kernels out of bounds": Kind(
        "Ids of tokens, adapters or pages that do not exist reached the kernels, which read or wrote other "
        "memory.",
        ("test_ids_that_do_not_exist_reach_no_kernel", "test_the_last_ids_and_positions_are_the_last"),
        ("front/pool/test_workers.py::test_unknown_token_ids_are_refused",
         "core/test_core_program.py::test_a_wrong_step_is_an_error_without_effect",
         "core/test_core_program.py::test_a_wrong_slot_is_an_error_without_effect",
         "core/test_core_adapters.py::test_wrong_adapters_are_errors_without_effect",
         "core/test_core_attention.py::test_a_wrong_plan_names_the_argument",
         "core/test_core_sample.py::test_a_wrong_sampling_call_names_the_argument",
         "core/test_core_cuda.py::test_page_ids_out_of_range_are_never_followed"))}


@cache
def named_tests(path):
    """The names of the tests of a module."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return {function.name for function in functions if function.name.startswith("test_")}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_tests(kind):
    """None of them can vanish unnoticed."""
    row = KINDS[kind]
    assert row.here and set(row.here) <= named_tests(Path(__file__))
    for named in row.elsewhere:
        module, _, name = named.partition("::")
        assert name in named_tests(TESTS / module), named


def test_each_test_is_of_a_kind_and_each_kind_in_security_md():
    listed = {name for row in KINDS.values() for name in row.here}
    of_the_table = {"test_each_kind_has_its_tests", "test_each_test_is_of_a_kind_and_each_kind_in_security_md"}
    assert named_tests(Path(__file__)) - listed == of_the_table
    parts = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("\n## ")
    (section,) = (part for part in parts if part.startswith("What went wrong elsewhere"))
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")]
    assert rows[2:] == [*KINDS]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A server of two models for three keys."""
    folder = tmp_path_factory.mktemp("attacked")
    flags = f"--database={folder / 'kept.db'}", "--kv-cache-memory", "8M", "--max-batch", "4"
    with server(*two_models(folder), *flags) as (process, url):
        place = Attacked(url, process, folder)
        for model in ("blue", "red", "poet"):
            place.chat(model=model)
        yield place


@pytest.fixture(scope="module")
def closed(tmp_path_factory, nanochat_fixtures):
    """A server without keys that has neither chats nor tools nor downloads; and the hub that it must not
    ask."""
    folder = tmp_path_factory.mktemp("closed")
    with fake_hub(org__tiny={"tiny.gguf": b"GGUF"}) as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf")}
        flags = "--no-downloads", "--no-chats", f"--database={folder / 'kept.db'}", "--kv-cache-memory", "4M"
        with server("--models", nanochat_fixtures / "gen5", *flags, env=environment) as (process, url):
            yield Attacked(url, process, folder), hub


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A server of a model that sees."""
    pytest.importorskip("PIL")
    from tiny_sight import make_smolvlm, save_sight
    folder = tmp_path_factory.mktemp("seeing")
    save_sight(folder, "smolvlm", make_smolvlm())
    with server(folder, "--dtype", "float32", "--no-drafts") as (process, url):
        yield Attacked(url, process, folder)


# slots used again


SECRET = "The secret of the first client is forty-two. "
MEASURES = [  # every kind of output, with all that is known of how likely it was
    (CHAT, {"messages": HI, "temperature": 0, "max_tokens": 24, "logprobs": True, "top_logprobs": 20,
            "ignore_eos": True}),
    (CHAT, {"messages": [{"role": "user", "content": SECRET}], "seed": 5, "max_tokens": 24, "n": 2,
            "ignore_eos": True}),
    (COMPLETIONS, {"prompt": [*range(40, 90)], "temperature": 0, "max_tokens": 9, "logprobs": 5,
                   "prompt_logprobs": 5, "echo": True}),
    (COMPLETIONS, {"prompt": "abc", "max_tokens": 9, "seed": 1, "logprobs": 3,
                   "guided_choice": ["yes", "no", "forty-two"]}),
    ("/v1/embeddings", {"input": ["The secret", "of the first client"]})]
FILLING = [  # what leaves biases, masks, counts and branches in a row
    {"logit_bias": {str(token): 100 for token in range(50, 60)}}, {"guided_regex": "[a-z]{30}"},
    {"repetition_penalty": 5, "dry_multiplier": 3}, {"top_k": 1, "min_tokens": 30}, {"n": 2, "logprobs": True}]


def measured(place, key):
    """Of each of MEASURES: what comes out, and how many tokens of its prompt were found in a cache."""
    found = []
    for path, body in MEASURES:
        reply = place.ask(path, body, key)
        assert reply.status == 200, reply.body
        cached = (reply.body["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        found.append((without_drafted(reply.body.get("choices") or reply.body["data"]), cached))
    return found


def without_drafted(value):
    """What was drafted depends on the time that steps took."""
    if isinstance(value, dict):
        return {name: without_drafted(member) for name, member in value.items() if name != "drafted"}
    return [*map(without_drafted, value)] if isinstance(value, list) else value


def leave_halfway(place, key, body):
    """Begin a streamed answer and leave after its first byte."""
    connection = http.client.HTTPConnection(place.url.removeprefix("http://"), timeout=60)
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    connection.request("POST", CHAT, json.dumps(body | {"stream": True}), headers)
    response = connection.getresponse()
    assert response.read(1)
    response.close()
    connection.close()


def test_a_row_used_again_is_as_new(nanochat_fixtures, tmp_path):
    """After a client has filled every row and page, and left some halfway, another's outputs have the bits of a
    new server, and nothing comes from its pages."""
    (tmp_path / "keys").write_text("a: fresh\nb: filler\nc: later\n")
    flags = "--api-key-file", tmp_path / "keys", "--kv-cache-memory", "256K", "--max-batch", "2"
    with server(nanochat_fixtures / "gen5", *flags) as (process, url):
        place = Attacked(url, process, tmp_path)
        fresh = measured(place, "fresh")
        pages = place.ask("/stats", key="fresh").body["workers"][0]["kv_pages_total"]
        dice = random.Random(3)

        def fill(number):
            text = SECRET * dice.randrange(1, 6)
            body = {"messages": [{"role": "user", "content": f"{number} {text}"}], "max_tokens": 40}
            body |= dice.choice(FILLING)
            if number % 4 == 0:
                return leave_halfway(place, "filler", body)
            assert place.ask(CHAT, body, "filler").status == 200
            assert place.ask("/v1/embeddings", {"input": text}, "filler").status == 200

        with ThreadPoolExecutor(4) as threads:
            assert [*threads.map(fill, range(12))]
        used = place.ask("/v1/usage", key="filler").body["data"]
        tokens = sum(row["prompt_tokens"] + row["completion_tokens"] for row in used)
        assert tokens > PagePool.page_size * pages  # so all of them were used again
        assert all(cached == 0 for _, cached in fresh) and measured(place, "later") == fresh


# hashes of clients as keys


SAID = {
    "user": "alice", "owner": "alice", "safety_identifier": "alice", "metadata": {"user_id": "alice"},
    "prompt_cache_key": "k", "cache_salt": "s", "id_slot": 0, "session_id": "x", "cache_prompt": True}


@pytest.mark.parametrize("path, body", [
    (CHAT, {"messages": [{"role": "user", "content": "Joint " * 30}]}), (RESPONSES, {"input": "Joined " * 30}),
    (MESSAGES, {"messages": [{"role": "user", "content": "Joining " * 30}]}),
    (COMPLETIONS, {"prompt": "Join " * 30})])
def test_what_a_client_says_of_itself_joins_no_pages(attacked, path, body):
    """No name that a request may have for its owner, its session or its cache says whose pages it finds."""
    headers = {"X_Request_Id": "joint", "X_Chat_Space": "A" * 22, "X_Session_Id": "x", "X_Client": "alice"}

    def cached(key):
        reply = attacked.ask(path, body | SAID | {"max_tokens": 2, "max_output_tokens": 16}, key, **headers)
        assert reply.status == 200, reply.body
        usage = reply.body["usage"]
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        return details.get("cached_tokens", usage.get("cache_read_input_tokens", 0)) > 0

    found = [cached(key) for key in ("alice", "mallory", "alice", "mallory")]
    assert found == [False, False, True, True]


def test_prefixes_with_equal_hashes_stay_apart():
    """Python hashes integers by a public rule: tokens with the hash of any others are found at once."""
    pool, size = PagePool(8), PagePool.page_size
    ours = [*range(100, 100 + size), 5]
    theirs = [token + sys.hash_info.modulus for token in ours]
    key = "owner", tuple(ours[:size])
    assert hash(key) == hash(("owner", tuple(theirs[:size]))) and ours != theirs
    page = pool.free.pop()
    pool.index[key] = Content(1, [page])
    pool.refs[page] = 1
    assert pool.match_prefix(ours, "owner") == ([page], 1)
    assert pool.match_prefix(theirs, "owner") == ([], "owner")
    assert pool.match_prefix(ours, "other") == ([], "other")


# ids by prefix


GONE = 400, 404, 405


def test_a_part_of_an_id_is_no_id(attacked):
    """It neither shows, changes, ends nor deletes anything, in a path or in a body."""
    batched = {"endpoint": CHAT, "completion_window": "24h"}
    line = {"custom_id": "1", "method": "POST", "url": CHAT, "body": {"messages": HI, "max_tokens": 2}}
    response = attacked.ask(RESPONSES, {"input": "Hi", "max_output_tokens": 2}).body["id"]
    items = [{"type": "message", "role": "user", "content": "Hi"}]
    conversation = attacked.ask("/v1/conversations", {"items": items}).body["id"]
    item = attacked.ask(f"/v1/conversations/{conversation}/items").body["data"][0]["id"]
    file = attacked.upload(line)
    batch = attacked.ask("/v1/batches", batched | {"input_file_id": file}).body["id"]
    chat = "c0ffee" + "0" * 26
    change = {"kind": "chat", "id": chat, "patch": {"created": 1, "title": "T"}}
    assert attacked.ask("/v1/chats/changes", {"changes": [change]}).status == 200
    places = {
        "/v1/responses/": response, "/v1/conversations/": conversation, "/v1/files/": file,
        f"/v1/conversations/{conversation}/items/": item, "/v1/batches/": batch, "/v1/chats/": chat}
    for path, name in places.items():
        for part in parts_of(name):
            assert attacked.get(path, part).status in GONE, (path, part)
            spelled = path + quote(part, safe="")
            assert attacked.ask(spelled, method="DELETE").status in GONE, (path, part)
            assert attacked.ask(f"{spelled}/cancel", {}).status in GONE, (path, part)
    for part in {*parts_of("red@poet")} - {"red", "poet"}:
        assert attacked.get("/v1/models/", part).status == 404, part
        assert attacked.chat(model=part).status == 404, part
    for part in parts_of(response):
        assert attacked.ask(RESPONSES, {"input": "Hi", "previous_response_id": part}).status in GONE, part
    for part in parts_of(conversation):
        assert attacked.ask(RESPONSES, {"input": "Hi", "conversation": part}).status in GONE, part
    for part in parts_of(file):
        assert attacked.ask("/v1/batches", batched | {"input_file_id": part}).status in GONE, part
    for path, name in places.items():
        assert attacked.get(path, name).status == 200, path


def test_a_part_of_an_id_ends_no_answer(attacked):
    """Neither an answer of the same key nor another's: it has the text that it has undisturbed."""
    body = {"messages": HI, "temperature": 0, "max_tokens": 400, "ignore_eos": True}
    whole = attacked.ask(CHAT, body, "alice").text
    name = "answer-of-alice-1"
    parts = {*parts_of(name), "answer", "answer-of-alice", "answer-of-alice-10"}
    with ThreadPoolExecutor(1) as threads:
        while parts:  # until each was asked for while the answer was running
            answer = threads.submit(attacked.ask, CHAT, body, "alice", X_Request_Id=name)
            for part in sorted(parts):
                for key in ("alice", "mallory"):
                    spelled = quote(part, safe="")
                    assert attacked.ask(f"/v1/cancel/{spelled}", {}, key).status in GONE, part
                    assert attacked.ask(f"/v1/streams/{spelled}", key=key).status in GONE, part
                if not answer.done():
                    parts.remove(part)
            assert answer.result().text == whole


# one grammar that ends the engine


def test_no_grammar_ends_more_than_its_request(attacked):
    """The next question of another client has its answer from the same worker."""
    expected, workers = attacked.chat("alice").text, attacked.workers()
    for held in EVIL:
        reply = attacked.chat(max_tokens=4, **held)
        assert reply.status in (200, 400), (held, reply.body)
        assert attacked.chat("alice").text == expected
    deep = b'{"a":' * 5000 + b"{}" + b"}" * 5000
    body = b'{"messages": [{"role": "user", "content": "hi"}], "guided_json": ' + deep + b"}"
    assert attacked.ask(CHAT, body).status == 400
    assert attacked.workers() == workers


# templates, budgets and media without bound


def test_a_request_brings_no_template(attacked):
    """Templates in a body are named as ignored, and change nothing of the answer; variables replace nothing."""
    fields = dict.fromkeys(("chat_template", "template", "prompt_template", "jinja"), ENDLESS)
    plain = attacked.chat(max_tokens=4).text
    assert attacked.chat(max_tokens=4, **fields).text == plain
    for path in (*ANSWERS, "/apply-template", "/tokenize"):
        body = SHORT | BASE[path]
        if attacked.ask(path, body).status == 200:
            reply = attacked.ask(path, body | fields)
            assert reply.status == 200 and set(fields) <= set(reply.ignored), path
    shown = attacked.ask("/apply-template", {"messages": HI}).body
    for variables in ({"messages": [{"role": "system", "content": "other"}]}, {"self": 1},
                      {"chat_template": ENDLESS}, {"raise_exception": "x"}, {"add_generation_prompt": False},
                      {"bos_token": "<|x|>"}, {"namespace": {}}, {"__class__": 1}):
        body = {"messages": HI, "chat_template_kwargs": variables}
        assert attacked.ask("/apply-template", body).body == shown, variables


def test_numbers_without_bound_are_refused_or_bounded(attacked):
    """Counts, lists and nesting: 400 by name, or no more than the context."""
    expected, workers = attacked.chat("alice").text, attacked.workers()
    for path, body in REFUSED:
        reply = attacked.ask(path, body)
        assert reply.status == 400 and reply.error, (path, body, reply.body)
    for path, body in BOUNDED:
        reply = attacked.ask(path, body)
        assert reply.status == 200 and reply.body["usage"]["total_tokens"] <= 512, (path, body, reply.body)
    assert attacked.chat("alice").text == expected and attacked.workers() == workers


@pytest.mark.parametrize("what", PICTURES)
def test_no_picture_takes_more_than_its_bound(seeing, what):
    """It is read within its bounds or refused by name; the next one is read."""
    def shown(data):
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": source}}, {"type": "text", "text": "What is this?"}]
        return seeing.ask(CHAT, {"messages": [{"role": "user", "content": parts}], "max_tokens": 2}, "")

    reply = shown(PICTURES[what]())
    assert reply.status == 200 or "image_url" in reply.body["error"]["param"], reply.body
    assert reply.status in (200, 400)
    assert shown(png()).status == 200


def test_nothing_that_a_request_names_is_fetched(seeing):
    """No address of a picture, a document, a sound or a schema is connected to, in any dialect."""
    with Trap() as trap:
        url = trap.url
        parts = [{"type": kind, kind: {"url": url}} for kind in ("image_url", "video_url", "audio_url")]
        parts += [{"type": kind, "source": {"type": "url", "url": url}} for kind in ("image", "document")]
        parts += [
            {"type": "image_url", "image_url": url}, {"type": "image", "image": url},
            {"type": "input_image", "image_url": url}, {"type": "input_file", "file_url": url},
            {"type": "file", "file": {"file_data": url}}]
        for part in parts:
            said = [{"role": "user", "content": [part, {"type": "text", "text": "hi"}]}]
            bodies = [(path, {"messages": said}) for path in (CHAT, MESSAGES, "/api/chat", "/apply-template")]
            for path, body in (*bodies, (RESPONSES, {"input": said})):
                reply = seeing.ask(path, body | {"max_tokens": 2}, "")
                assert reply.status == 400, (path, part, reply.body)
        said = [{"role": "user", "content": "hi", "images": [url]}]
        assert seeing.ask("/api/chat", {"messages": said}, "").status == 400
        assert seeing.ask("/api/generate", {"prompt": "hi", "images": [url]}, "").status == 400
        for schema in ({"$ref": url}, {"$id": url, "$ref": "x"}, {"$schema": url, "type": "integer"}):
            assert seeing.chat("", guided_json=schema).status in (200, 400)
        assert not trap.sprung


# pickles


MODULES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "multiprocessing",
    "runpy", "code", "pty"}
CALLS = {
    "eval", "exec", "compile", "__import__", "system", "popen", "recv_pyobj", "broadcast_object_list",
    "all_gather_object", "full_load", "unsafe_load", "load_module", "exec_module"}
LOADS = {"torch", "numpy", "np", "yaml"}  # whose `load` may run code
FLAGS = {"allow_pickle": True, "trust_remote_code": True, "weights_only": False, "shell": True}
RUNS_CODE = {  # (module of chatlm, what) -> why it may
    ("common/bundle.py", "marshal"): "packs our own modules as code, compiled by a Python that it starts",
    ("common/unpack.py", "exec_module"): "loads the compiled core once its SHA-256, owner and mode are right",
    ("common/errors.py", "import_module"): "libraries that this program names",
    ("common/hub/huggingface.py", "import_module"): "parts of huggingface_hub that it names",
    ("common/late.py", "import_module"): "names that stand in tables of this program, and tasks that the front names",
    ("worker/weights/files/torch_file.py", "pickle"): "PlainUnpickler loads no global, and so calls nothing",
    ("worker/weights/formats/nanochat/checkpoint.py", "pickle"): "the number of an opcode",
    ("worker/engine/calculator.py", "compile"): "finds errors in arithmetic; what it makes is never run"}
MAY_RUN_CODE = re.compile(  # to parse all modules takes seconds
    rf"(?:import|from)\s.*\b(?:{'|'.join(MODULES)})\b|(?<!re\.)\b(?:{'|'.join(CALLS)}|import_module)\("
    rf"|\b(?:{'|'.join(LOADS)})\.load\(|{'|'.join(FLAGS)}")


def runs_code(tree):
    """What in a module's code may run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from {alias.name.partition(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            yield from {(node.module or "").partition(".")[0]} & MODULES
        elif isinstance(node, ast.Call):
            owner, _, name = ast.unparse(node.func).rpartition(".")
            if name in CALLS and owner != "re":
                yield name
            if name == "load" and owner in LOADS:
                yield f"{owner}.load"
            if name == "import_module" and not isinstance(node.args[0], ast.Constant):
                yield name
            for word in node.keywords:
                if word.arg in FLAGS and getattr(word.value, "value", None) is FLAGS[word.arg]:
                    yield word.arg


def test_nothing_is_unpickled_or_evaluated():
    """But for the places that say why they may; each of these is still there."""
    found = set()
    for path in (ROOT / "chat_server.py", *(ROOT / "chatlm").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if MAY_RUN_CODE.search(text):
            name = path.relative_to(ROOT).as_posix().removeprefix("chatlm/")
            found |= {(name, what) for what in runs_code(ast.parse(text))}
    assert found == {*RUNS_CODE}


@pytest.mark.parametrize("text", [
    "import pickle", "from pickle import loads", "import marshal as m", "import os, dill",
    "from multiprocessing.connection import Client", "eval(x)", "exec(x)", "compile(a, b, 'exec')",
    "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)", "yaml.load(x)",
    "importlib.import_module(name)", "os.system(x)", "subprocess.run(x, shell=True)",
    "AutoModel.from_pretrained(x, trust_remote_code=True)", "def f():\n  class A:\n    import dill"])
def test_the_walk_finds_what_runs_code(text):
    assert MAY_RUN_CODE.search(text) and [*runs_code(ast.parse(text))]


KINDS_OF_BYTES = (
    "application/octet-stream", "application/x-pickle", "application/json", "multipart/form-data; boundary=XX")


def test_a_request_with_a_pickle_runs_nothing(attacked, tmp_path):
    """Whatever a body says that its bytes are, on whatever route."""
    made = tmp_path / "made"
    data = pickle.dumps(Planted(made))
    others = "/v1/files", "/v1/chats/changes", "/v1/chats/files", "/v1/tools/call", "/extract"
    for path in (*BODY_FIELDS, *others):
        for kind in KINDS_OF_BYTES:
            assert 400 <= attacked.ask(path, data, Content_Type=kind).status < 500, (path, kind)
    assert not made.exists()
    pickle.loads(data)
    assert made.exists()  # what they would have seen


# states read from disk


def test_a_planted_prefix_store_changes_no_answer(nanochat_fixtures, tmp_path):
    """Segments that were cut, changed or replaced by links and pipes are passed over, and nothing outside of the
    folder changes."""
    store, precious = tmp_path / "store", tmp_path / "precious"
    precious.write_bytes(b"precious" * 1000)
    sentence = "The sea rises and falls twice a day, and nobody who lives beside it forgets that. "
    texts = [f"{number} {sentence * 4}" for number in range(3)]
    flags = "--dtype", "float32", "--prefix-memory", "0"

    def answers(*more):
        with server(nanochat_fixtures / "gen5", *flags, *more) as (process, url):
            place = Attacked(url, process, tmp_path)
            found = [place.chat("", text).text for text in texts]
            process.terminate()
            process.wait(30)
            return found

    plain = answers()
    assert answers("--prefix-store", store) == plain
    segments = [path for path in store.rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert segments
    for segment in segments:
        data = bytearray(segment.read_bytes())
        segment.with_name("0" + segment.name).write_bytes(data[:len(data) // 2])
        segment.with_name("1" + segment.name).symlink_to(precious)
        segment.with_name("2" + segment.name).symlink_to("/dev/zero")
        os.mkfifo(segment.with_name("3" + segment.name))
        for place in range(500, len(data), 97):
            data[place] ^= 1
        segment.write_bytes(data)
    assert answers("--prefix-store", store) == plain
    for segment in segments:
        segment.unlink(missing_ok=True)
        segment.symlink_to(precious)
    assert answers("--prefix-store", store) == plain
    assert precious.read_bytes() == b"precious" * 1000


# assert as a check


OTHER_BODIES = [
    ("/v1/batches", {"input_file_id": "file-1"}), ("/v1/chats/changes", {"changes": [5]}),
    ("/v1/tools/call", {"name": 5}), ("/v1/conversations", {"items": 5}), ("/models/load", {"model": 5}),
    *((path, {}) for path in BODY_FIELDS),
    *((path, BASE[path] | {"model": "nobody"}) for path in BODY_FIELDS)]


def test_without_asserts_the_same_is_refused(tiny_url, nanochat_fixtures, tmp_path):
    """A server under `python -O` gives the same status and the same words."""
    environment = os.environ | {"PYTHONOPTIMIZE": "1"}
    held = [(CHAT, {"messages": HI, "max_tokens": 2} | one) for one in EVIL[2::5]]
    bodies = [*REFUSED, *BOUNDED, *NO_SUCH_ID[::6], *held, *OTHER_BODIES]
    with server(nanochat_fixtures / "gen5", env=environment) as (process, url):
        for each in descendants(process):
            assert each.environ()["PYTHONOPTIMIZE"] == "1"
        places = [Attacked(tiny_url, None, tmp_path), Attacked(url, process, tmp_path)]

        def compare(asked):
            plain, optimized = (place.ask(*asked, key="") for place in places)
            assert (plain.status, plain.error) == (optimized.status, optimized.error), asked
            return plain.status

        with ThreadPoolExecutor(4) as threads:
            seen = Counter(threads.map(compare, bodies))
        assert seen[400] > 90 and seen[500] == 0, seen
        assert places[0].chat("").text == places[1].chat("").text


# parsers chosen by a request


def test_a_request_names_nothing_that_is_imported(attacked, tmp_path):
    """Such fields are named as ignored, or refused, and nothing in them is opened, imported or called."""
    made, plain = tmp_path / "made", attacked.chat(max_tokens=4).text
    values = payloads(made)
    for number, name in enumerate(NAMES):
        reply = attacked.chat(max_tokens=4, **{name: values[number % len(values)]})
        assert reply.status == 200 and name in reply.ignored and reply.text == plain, (name, reply.body)
    for number, path in enumerate(ANSWERS):
        for value in values[number % 3::3]:
            reply = attacked.ask(path, SHORT | BASE[path] | dict.fromkeys(NAMES, value))
            named = set(NAMES) <= set(reply.ignored)
            assert reply.status == 400 or reply.status == 200 and named, (path, value, reply.body)
    function = {"type": "function", "function": {"name": "f"}}
    for value in values:
        for known in (
                {"response_format": {"type": value}}, {"tool_choice": value}, {"reasoning_effort": value},
                {"response_format": {"type": "json_schema", "json_schema": value}},
                {"structured_outputs": {"json": {}, "backend": value}},
                {"messages": [{"role": value, "content": "x"}]},
                {"messages": [{"role": "user", "content": [{"type": value}]}]},
                {"tools": [function], "tool_choice": {"type": "function", "function": {"name": value}}}):
            assert attacked.chat(max_tokens=2, **known).status == 400, known
    assert not made.exists()


# peers' protocols


def listening(process):
    """The addresses where a process waits for connections, over the network or by a path."""
    waiting = psutil.CONN_LISTEN, psutil.CONN_NONE  # of TCP and UDP
    found = {tuple(each.laddr) for each in process.net_connections("inet") if each.status in waiting}
    held = {os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir() if link.is_symlink()}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, inode, *_ = line.split()
        if f"socket:[{inode}]" in held and int(flags, 16) & 1 << 16:
            found.add(("unix", inode))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_of_ranks_opens_no_port_but_its_own(nanochat_fixtures, tmp_path):
    """Two replicas of two ranks talk over inherited pipes and nameless memory, which nobody else can reach."""
    pytest.importorskip("decode_core", reason="ranks need it")
    flags = "--tp", "2", "--num-workers", "2", "--dtype", "float32"
    with server(nanochat_fixtures / "gen5", *flags, forked=False) as (process, url):
        Attacked(url, process, tmp_path).chat("")
        front, *others = [psutil.Process(process.pid), *descendants(process)]
        assert len(others) >= 4
        assert listening(front) == {("127.0.0.1", int(url.rpartition(":")[2]))}
        for each in others:
            assert not listening(each) and not each.net_connections("inet"), each.cmdline()
        for each in (front, *others):
            for place in map(os.path.realpath, Path(f"/proc/{each.pid}/fd").iterdir()):
                if place.startswith(("/dev/shm/", "/tmp/")) and os.path.exists(place):
                    assert not stat.S_IMODE(os.stat(place).st_mode) & 0o077, place


class Overhearing:
    """Stands between who dials and a listener, passes all bytes on, and keeps them."""

    def __init__(self, address):
        self.address = address
        self.socket = listen("127.0.0.1")
        self.said = {"dialer": b"", "listener": b""}
        self.thread = threading.Thread(target=self.relay)
        self.thread.start()

    def relay(self):
        one, _ = self.socket.accept()
        with self.socket, one, socket.create_connection(self.address) as other:
            back = threading.Thread(target=self.copy, args=("listener", other, one))
            back.start()
            self.copy("dialer", one, other)
            back.join()

    def copy(self, name, source, target):
        while data := source.recv(1 << 16):
            self.said[name] += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_a_proof_that_was_overheard_proves_nothing(caplog):
    """Neither played again, nor the listener's own proof or nonce as one's own."""
    secret = os.urandom(32)
    with listen("127.0.0.1") as opened, Listener(opened, secret) as listener, ThreadPoolExecutor(1) as threads:
        middle = Overhearing(opened.getsockname())
        dialed = threads.submit(dial, *middle.socket.getsockname(), secret)
        admitted, _ = listener.accept(30)
        dialed.result().close()
        admitted.close()
        middle.thread.join()
        front, worker = middle.said["dialer"], middle.said["listener"]
        assert len(front) == 64 and len(worker) == 64  # a nonce and a proof of each
        echoed = None
        for number, played in enumerate((front, front[:32] + worker[32:], worker, echoed), 1):
            with socket.create_connection(opened.getsockname()) as peer:
                assert listener.accept(0.01) is None
                nonce = peer.recv(32)
                peer.sendall(played or nonce + nonce)
                while listener.handshakes:
                    assert listener.accept(0.01) is None
                assert caplog.text.count("it does not know the secret") == number and peer.recv(1) == b""


# a way around an opt-out


def other_names(place):
    """Names of the model `red` and of its adapter, and what could be taken for one."""
    return ["red", "poet", "red@poet", "blue@poet", "red:latest", str(place.folder / "red"), "blue@red",
            str(place.folder / "poet"), f"{place.folder}/blue/../red", "blue:red", "blue,red", "RED", " red",
            "red\0", "models/red", "blue\nred"]


def test_no_name_of_a_model_avoids_a_key_s_limit(attacked):
    """The key `bound` has `blue` alone: each route with a body finds that one, and no other by any name."""
    names = other_names(attacked)
    paths = [path for path in BODY_FIELDS if path != "/v1/compare" and not path.startswith("/models/")]
    assert len(paths) > 20
    for number, path in enumerate(paths):
        body = SHORT | BASE[path]
        assert attacked.ask(path, body | {"model": "blue"}, "bound").status != 404, path
        for name in names[:3] + names[3 + number % 4::4]:
            reply = attacked.ask(path, body | {"model": name}, "bound")
            assert reply.status == 404, (path, name, reply.body)
    for path in ("/models/load", "/models/unload"):
        assert attacked.ask(path, {"model": "blue"}, "bound").status == 403
    for name in names:
        compared = attacked.ask("/v1/compare", BASE["/v1/compare"] | {"models": ["blue", name]}, "bound")
        assert compared.status == 404, compared.body


@pytest.mark.parametrize("pad", [1, 200_000])  # the longer one is read in a sandbox
@pytest.mark.parametrize("text", [
    '"model": "blue", "model": "red"', '"model": "blue", "mod\\u0065l": "red"',
    '"name": "blue", "model": "red"'])
def test_a_model_that_is_named_twice_avoids_no_limit(attacked, text, pad):
    """What is checked is what answers."""
    more = json.dumps({"messages": HI, "max_tokens": 2, "pad": "x" * pad})
    body = "{" + text + ", " + more[1:]
    for path in (CHAT, "/api/chat", MESSAGES):
        assert attacked.ask(path, body.encode(), "bound").status == 404, path


def test_no_route_avoids_a_key_s_limit(attacked):
    """Whatever takes a model's name in its path or its query, and whatever lists models."""
    rows = [row for row in ROUTES if row.method == "GET" and not row.open]
    paths = [row.path.replace("{name:.+}", "%s") for row in rows if "{name:.+}" in row.path]
    paths += [f"{row.path}?model=%s" for row in rows if any(each.name == "model" for each in row.query)]
    assert {"/v1/models/%s", "/props?model=%s"} <= set(paths)
    for path in paths:
        for name in other_names(attacked):
            reply = attacked.ask(path % quote(name, safe=""), key="bound")
            assert reply.status in (400, 403, 404), (path, name, reply.body)
        assert attacked.ask(path % "blue", key="bound").status in (200, 403, 404), path
    for path in ("/v1/models", "/models", "/api/tags", "/api/ps", "/api/v0/models", "/stats", "/stats/history",
                 "/v1/usage", "/slots", "/props"):
        text = json.dumps(attacked.ask(path, key="bound").body)
        assert '"red' not in text and "poet" not in text and str(attacked.folder / "red") not in text, path


def test_no_line_of_a_batch_avoids_a_key_s_limit(attacked):
    def line(name, **more):
        body = {"model": name, "messages": HI, "max_tokens": 2}
        return {"custom_id": name, "method": "POST", "url": CHAT, "body": body} | more

    lines = [*map(line, ("blue", *other_names(attacked))), line("red", model="blue", custom_id="outer")]
    file = attacked.upload(*lines, key="bound")
    wanted = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    batch = attacked.ask("/v1/batches", wanted, "bound").body
    while batch["status"] not in ("completed", "failed"):
        batch = attacked.ask(f"/v1/batches/{batch['id']}", key="bound").body
    assert batch["request_counts"] == {"total": len(lines), "completed": 1, "failed": len(lines) - 1}
    answered = attacked.ask(f"/v1/files/{batch['output_file_id']}/content", key="bound").body
    assert answered["custom_id"] == "blue" and answered["response"]["body"]["model"] == "blue"


def test_without_chats_no_route_keeps_one(closed):
    """No route of chats works, and no dialect writes an answer into one."""
    place, _ = closed
    chat = {"id": "a" * 32, "node": "b" * 32, "parent": "c" * 32}
    for row in CHAT_ROUTES:
        path = row.path.replace("{id}", "a" * 32).replace("{sha256}", "d" * 64)
        reply = place.ask(path, {} if row.method == "POST" else None, "", row.method, X_Chat_Space="E" * 22)
        assert (reply.status, reply.body["error"]["code"]) == (404, "no_chats"), (path, reply.body)
    for path in ANSWERS:
        for stream in ({}, {"stream": True}):
            body = SHORT | BASE[path] | stream | {"chat": chat}
            reply = place.ask(path, body, "", X_Chat_Space="E" * 22)
            assert reply.status in (400, 404) or "chat" in reply.ignored, (path, reply.body)
    with closing(sqlite3.connect(place.folder / "kept.db")) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (name,) in tables:
            if name.startswith("chat"):
                assert not connection.execute(f"SELECT 1 FROM {name}").fetchall(), name


def test_without_downloads_nothing_asks_the_hub(closed):
    """No name of a model of the hub does, in any dialect or on a route for operators."""
    place, hub = closed
    names = ["org/tiny", "org/tiny:tiny.gguf", "org/tiny@main", "hf.co/org/tiny", "hf://org/tiny",
             f"{hub.url}/org/tiny", "qwen3:0.6b", "llama3.2-1b", "all-minilm"]
    asked = [(path, BASE[path] | {"model": name}) for path in BODY_FIELDS for name in names]
    asked += [("/v1/compare", BASE["/v1/compare"] | {"models": names[:2]})]
    asked += [(path, {"model": name, "name": name}) for name in names
              for path in ("/models/download", "/api/pull", "/models/delete", "/models/load")]
    for path, body in asked:
        assert place.ask(path, body, "").status in (400, 403, 404), (path, body)
    for path in ("/models/hub?search=tiny", "/models/hub/org/tiny"):
        assert place.ask(path, key="").status == 403, path
    assert not hub.requests


def test_without_tools_no_dialect_has_any(closed):
    """Tool servers that a request names are not connected to, no call is run here, and each tool is named as
    ignored or refused."""
    place, _ = closed
    assert place.ask("/v1/tools", key="").body["data"] == []
    assert place.ask("/v1/tools/call", {"name": "fake__add", "arguments": {}}, "").status == 403
    with Trap() as trap:
        mcp = {"type": "mcp", "server_label": "x", "server_url": trap.url, "require_approval": "never"}
        kinds = "web_search", "code_interpreter", "local_shell", "computer_use_preview", "image_generation"
        tools = [mcp, {"type": "file_search", "vector_store_ids": ["vs_1"]}, *({"type": kind} for kind in kinds)]
        servers = [{"type": "url", "name": "x", "url": trap.url}]
        bodies = [(RESPONSES, {"input": "hi", "tools": [tool]}) for tool in tools]
        bodies += [(CHAT, {"messages": HI, "tools": [tool]}) for tool in tools]
        bodies += [(path, {"messages": HI, "mcp_servers": servers}) for path in (CHAT, MESSAGES)]
        bodies += [(MESSAGES, {"messages": HI, "tools": [tool]}) for tool in (
            {"type": "mcp_toolset", "mcp_server_name": "x"}, {"type": "bash_20250124", "name": "bash"},
            {"type": "code_execution_20250522", "name": "code_execution"})]
        for path, body in bodies:
            reply = place.ask(path, body | {"max_tokens": 4, "max_output_tokens": 16}, "")
            named = reply.headers["X-Ignored-Tools"] or "mcp_servers" in reply.ignored
            assert reply.status in (400, 404, 409) or reply.status == 200 and named, (path, body, reply.body)
            assert "mcp_call" not in json.dumps(reply.body), reply.body
        assert not trap.sprung


# kernels out of bounds


def test_ids_that_do_not_exist_reach_no_kernel(attacked):
    """They are refused by name; the same worker gives the same answer afterwards."""
    expected, workers = attacked.chat("alice").text, attacked.workers()
    for path, body in NO_SUCH_ID:
        reply = attacked.ask(path, {"max_tokens": 2} | body)
        assert reply.status == 400, (path, body, reply.body)
    for name in ("red@", "@poet", "red@0", "red@-1", "red@1", f"red@{2**70}", "red@poet@poet", "red@../poet"):
        assert attacked.chat(model=name).status == 404, name
    assert attacked.chat("alice").text == expected and attacked.workers() == workers


def test_the_last_ids_and_positions_are_the_last(attacked):
    """The largest id and the longest prompt are computed, and what is one beyond is refused, beside answers."""
    longest = attacked.ask("/props?model=red").body["default_generation_settings"]["n_ctx"]
    prompt = [7 * number % 250 for number in range(longest + 1)]
    edge = {"prompt": [259, 0, 259], "logprobs": 20, "logit_bias": {"259": 100}, "logprob_token_ids": [0, 259]}
    expected, workers = attacked.chat("alice").text, attacked.workers()
    with ThreadPoolExecutor(2) as threads:
        beside = [threads.submit(attacked.chat, "alice") for _ in range(6)]
        assert attacked.ask(COMPLETIONS, edge | {"max_tokens": 1}).status == 200
        body = {"prompt": prompt[:-2], "max_tokens": 50, "prompt_logprobs": 1, "ignore_eos": True}
        whole = attacked.ask(COMPLETIONS, body)
        assert whole.status == 200 and whole.body["usage"]["total_tokens"] == longest, whole.body
        assert attacked.ask(COMPLETIONS, {"prompt": prompt, "max_tokens": 1}).status == 400
        assert attacked.ask("/v1/embeddings", {"input": prompt[:-1]}).status == 200
        assert attacked.ask("/v1/embeddings", {"input": prompt}).status == 400
        assert {reply.result().text for reply in beside} == {expected}
    assert attacked.workers() == workers
