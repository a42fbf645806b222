"""Texts beside answers of other workers: an embedder's layers wait while these are written."""

import time

import numpy as np
import pytest

from chatlm.common import answering
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.kernels import choosing, kernels
from chatlm.worker.process import share_lease
from engines import make_engine, pieces
import encoders
import retrieval
from works import assignment

_core = pytest.importorskip("chatlm.worker.kernels.library", exc_type=ImportError)._core
PROMPTS = [tuple(range(5, 5 + length)) for length in (3, 40, 17)]


@pytest.fixture
def lease(monkeypatch):
    """The lease of this process; afterwards nothing waits for it any more."""
    path = answering.path_of_lease()
    if not path:
        pytest.skip("no memory file here")
    monkeypatch.setattr(answering, "PAUSE_S", 0.03)
    lease = answering.AnswerLease(path)
    yield lease
    lease.until.value = 0
    _core.pause_while(0, 0, 0)


@pytest.fixture(scope="module", params=["bert", "qwen3"])
def embedder(request, tmp_path_factory):
    """An engine that embeds texts: an encoder, or a decoder whose folder says that it is an embedder."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bert":
        encoders.save_folder(folder, "bert", encoders.make_encoder("bert"))
    else:
        retrieval.embedder_folder(folder)
    return encoders.engine_of(folder)[1]


def test_layers_wait_while_another_worker_writes(lease, embedder):
    """Layers wait while another worker writes, and the vectors stay the same."""
    before = encoders.vectors(embedder, PROMPTS, pooling=embedder.answers.tokenizer.spec.embedder.pooling)
    waited = _core.paused_ns()
    share_lease(embedder, answering.path_of_lease())
    pooling = embedder.answers.tokenizer.spec.embedder.pooling
    assert np.array_equal(encoders.vectors(embedder, PROMPTS, pooling=pooling), before) and _core.paused_ns() == waited     # nobody writes
    lease.until.value = time.monotonic_ns() + 10**12
    assert np.array_equal(encoders.vectors(embedder, PROMPTS, pooling=pooling), before)       # and it comes to an end
    assert _core.paused_ns() - waited >= 30_000_000


def test_a_writer_moves_the_word_on(lease, nanochat_fixtures):
    """A writer moves the lease on, and leaves it alone when it embeds."""
    engine = make_engine(nanochat_fixtures / "gen5")
    share_lease(engine, answering.path_of_lease())
    pieces(engine, [assignment("text", PROMPTS[0], SamplingParams(), 0, pooling="mean")])
    assert lease.until.value == 0
    begin = time.monotonic_ns()
    pieces(engine, [assignment("answer", PROMPTS[0], SamplingParams(), 2)])
    assert lease.until.value >= begin + 1e9 * answering.LEAST_S


def test_child_processes_find_the_word():
    """The lease is there for processes that this one starts."""
    assert answering.path_of_lease() == answering.path_of_lease()
    assert answering.longest_pause_s(6) == answering.PAUSE_S and answering.longest_pause_s(24) * 24 == answering.STEP_S


def test_without_decode_core_layers_wait_too(lease, monkeypatch, tmp_path):
    monkeypatch.setattr(choosing, "decode_core", lambda: None)
    encoders.save_folder(tmp_path, "bert", encoders.make_encoder("bert"))
    _, engine = encoders.engine_of(tmp_path)
    waits = []
    monkeypatch.setattr(answering.AnswerLease, "wait", lambda lease, most_s: waits.append(most_s))
    share_lease(engine, answering.path_of_lease())
    encoders.vectors(engine, PROMPTS[:1], pooling="mean")
    kernels.references().pausing.clear()
    assert waits == [answering.PAUSE_S] * len(engine.transformer.model.layers)


def test_a_wait_has_an_end_and_a_slice_after_it(lease):
    lease.until.value = time.monotonic_ns() + 10**12
    begin = time.monotonic_ns()
    lease.wait(0.02)
    assert time.monotonic_ns() - begin >= 20_000_000
    lease.wait(1e9)         # a slice: at once, or this would not end
    lease.until.value = 0
    lease.sliced = 0
    lease.wait(1e9)         # nobody writes
