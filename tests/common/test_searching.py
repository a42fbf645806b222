"""What a search of the hub says, also where the hub answers oddly or not at all; sizes, and the speed to expect."""

import socket

import pytest

from chatlm.common.errors import ConfigError
from chatlm.common.hub import offers
from chatlm.common.hub.better import BETTER, SHARE, active_share
from chatlm.common.hub.huggingface import load_hub
from chatlm.common.hub.offers import best_offers, estimated_bytes, search, short_offers
from chatlm.common.memory import read_bandwidth
from fake_hub import fake_hub


@pytest.fixture
def hub(monkeypatch):
    """The library with a hub of its own: it reads the address when it is imported."""
    library = load_hub("a test")
    with fake_hub(org__model_8B={"a.gguf": b"x"}) as server:
        monkeypatch.setattr(library.constants, "ENDPOINT", server.url)
        yield library, server


def test_no_size_is_unknown():
    assert [offer.name for offer in short_offers() if not offer.bytes] == []
    assert estimated_bytes("org/some-8B-GGUF", {}, "gguf") == pytest.approx(4.9e9, rel=0.01)
    assert estimated_bytes("org/some", {"gguf": {"total": 10 ** 9}}, "gguf") == 610_000_000
    assert estimated_bytes("org/some", {"safetensors": {"parameters": {"BF16": 10 ** 9, "F32": 10}}}, "safetensors") == 2 * 10 ** 9 + 40
    for odd in ({"gguf": 7}, {"gguf": {"total": "many"}}, {"safetensors": {"parameters": [1]}}, {"safetensors": {"parameters": {"BF16": None}}}):
        assert estimated_bytes("org/some", odd, next(iter(odd))) == 0


def test_a_mixture_reads_a_share_of_its_weights():
    assert active_share("Qwen/Qwen3-30B-A3B-GGUF:Qwen3-30B-A3B-Q4_K_M.gguf") == pytest.approx(0.1)
    assert active_share("Qwen/Qwen3-8B") == active_share("org/a4b") == 1


def test_the_best_fit_is_quantized_and_largest_first():
    needed, size, model = BETTER[2]
    names = [offer.name for offer in best_offers(needed / SHARE + 1)]
    assert names[0] == model and len(names) == 3
    assert best_offers(0) == []


def test_the_bandwidth_of_the_memory_is_measured():
    for threads in (1, 3):
        assert 0 < read_bandwidth(threads, 1 << 20, 1) < 1e14


def test_a_search_names_what_matches(hub):
    library, server = hub
    (found,) = search(library, "model")
    assert (found.name, found.kind, found.bytes) == ("org/model_8B", "gguf", offers.estimated_bytes("org/model_8B", {}, "gguf"))
    assert search(library, "nothing") == []


def test_an_odd_answer_of_a_search_is_no_model(hub, monkeypatch):
    library, _ = hub
    monkeypatch.setattr(offers, "ask_for_models", lambda *_: [1, None, {}, {"id": 7}, {"id": "../../x"}])
    assert search(library, "a") == []


def test_a_hub_is_asked_again_without_new_fields(hub):
    """A hub that does not know the fields is asked without them."""
    library, server = hub
    server.knows_fields = False
    assert [offer.name for offer in search(library, "model")] == ["org/model_8B"]
    assert [path for _, path, *_ in server.requests] == ["api/models", "api/models"]


def test_without_a_hub_a_search_ends_at_once(hub, monkeypatch):
    library, _ = hub
    monkeypatch.setattr(library.constants, "ENDPOINT", "http://127.0.0.1:9")
    tries = []
    session = library.utils.get_session()
    monkeypatch.setattr(type(session), "get", lambda self, *all, get=type(session).get, **more: tries.append(1) or get(self, *all, **more))
    with pytest.raises(ConfigError, match="^no connection to the hub: http://127.0.0.1:9 cannot be reached"):
        search(library, "a")
    assert len(tries) == 1


def test_a_hub_that_never_answers_is_given_up(hub, monkeypatch):
    library, _ = hub
    monkeypatch.setattr(offers, "SEARCH_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(library.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ConfigError, match="cannot be reached"):
            search(library, "a")
