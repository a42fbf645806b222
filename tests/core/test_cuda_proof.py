"""CUDA kernels prove themselves: one that is wrong or raises is replaced by its reference, and named."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engines
import patching
from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import SamplingParams
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.engine.engine import Engine
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.warm_up import WarmUp
from chatlm.worker.kernels import choosing
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.transformer import Transformer
from near_tie import assert_same_tokens_or_near_tie
from nightly import by_day
from pools import collect, greedy
from works import assignment

backends = pytest.importorskip("cuda_backends", exc_type=ImportError, reason="no compiled core is installed")
from chatlm.worker.kernels import cuda, cuda_runner, proof  # noqa: E402
from chatlm.worker.kernels.library import _core  # noqa: E402

MARGIN = 2e-3           # as in tests/worker/engine/test_engine.py
FAULTY = (sys.executable, str(Path(__file__).parents[1] / "support" / "faulty_worker.py"))


def refuse(result):
    raise RuntimeError("CUDA: no kernel image is available for execution on the device")


def add_one(result):
    result.add_(1)


def only_in_bfloat16(result):
    if result.dtype == torch.bfloat16:
        result.mul_(1.1)


def spoil_all(result):
    result.fill_(float("nan") if result.is_floating_point() else -1)


def one_value(result):
    result.view(-1)[5:6].add_(3)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cuda, "SAMPLE_THREADS", 32)         # the same tokens, and the emulation is faster


def engine_of(kernels, fixture, monkeypatch, queue=None):
    """An engine of a nanochat fixture on the CPU, as a worker builds it."""
    monkeypatch.setattr(cuda_runner, "CudaQueue", lambda device: queue or backends.HostQueue())
    with torch.inference_mode():
        transformer = Transformer(fixture.architecture, dict(fixture.tensors), kernels, num_pages=40, dtype="float32",
                                  max_tokens=40, max_rows=4)
        engine = Engine(transformer, open_tokenizer(fixture.text), kernels, num_pages=40, max_batch=4,
                        context_length=128, prefill_chunk=32)
        WarmUp(engine).complete(lambda fraction: None)
    return engine


def some_works():
    sampling = (dict(temperature=0.0), dict(temperature=0.9, top_k=20), dict(temperature=1.0, repetition_penalty=1.2))
    return [assignment(f"w{i}", tuple(range(20 + i, 61)), SamplingParams(seed=i, **params), 12, ignore_eos=True)
            for i, params in enumerate(sampling)]


def assert_reference_answers(engine, fixture, monkeypatch):
    """`engine` runs its own steps; engines.run would trace it op by op."""
    expected = engines.run(engine_of(load_kernels("cpu"), fixture, monkeypatch), some_works())
    tokens = {work.id: [] for work in some_works()}
    with torch.inference_mode():
        for work in some_works():
            engine.add(work)
        while engine.busy:
            for name, piece in engines.step_pieces(engine):
                tokens[name] += piece.tokens
            check_integrity(engine)
    for name, got in tokens.items():
        traced = expected.traced(name)
        assert len(got) == 12
        assert_same_tokens_or_near_tie(traced, SimpleNamespace(tokens=got, gaps=traced.gaps), MARGIN)


WRONG = [(op, how, said) for op in ("linear", "rope_append", "paged_attention", "sample")
         for how, said in ((add_one, None), (refuse, "raises RuntimeError: CUDA: no kernel image"), (one_value, None), (spoil_all, None))]


@pytest.mark.parametrize("op, how, said", by_day(WRONG, WRONG[0], WRONG[13]))       # a wrong `linear`, a `sample` that raises
def test_a_wrong_kernel_gives_way_to_its_reference(
        emulation_library, nanochat_fixtures, monkeypatch, caplog, op, how, said):
    """A kernel that is wrong or raises is replaced by its reference and named."""
    fixture = engines.load(nanochat_fixtures / "gen5")
    kernel = {"linear": "multiply"}.get(op, op)
    emulated = backends.Emulated(emulation_library, backends.wrong_ops(**{kernel: how}), faults=[op])
    with monkeypatch.context() as patch:
        patching.patch(patch, choosing, "choose_backend", lambda device, model, *ranks: emulated.backend(model))
        kernels = load_kernels("cuda", fixture.architecture)
    assert kernels.names[op] == ("numpy/reference" if op == "sample" else "torch/reference")
    ours = {"pack", "make_cache", "plan_attention"} | {name for name, (has, _) in _core.OPS.items() if has == "CUDA"} - {"by_head", "append_latents"}
    assert {name for name, by in kernels.names.items() if by == "decode_core/cuda"} == ours - ({"linear", "embed"} if op == "linear" else {op})
    [fault] = kernels.backend.faults.values()
    assert f"decode_core's {op} on cpu: {fault}; torch's reference computes instead" in caplog.text
    assert fault.startswith(said) if said else "differs by" in fault or "draws the tokens" in fault
    assert_reference_answers(engine_of(kernels, fixture, monkeypatch), fixture, monkeypatch)


def test_a_kernel_wrong_in_one_type_alone_is_found(emulation_library, nanochat_fixtures):
    spec = engines.load(nanochat_fixtures / "gen3").architecture
    ops = backends.wrong_ops(paged_attention=only_in_bfloat16)
    backend = backends.Emulated(emulation_library, ops).backend(spec)
    backend.ops(0, 0, None)
    assert list(backend.faults) == ["paged_attention"] and "(bfloat16, window" in backend.faults["paged_attention"]


@pytest.mark.parametrize("generation", ["gen1", "gen3", "gen5"])
def test_kernels_that_are_right_are_kept(emulation_library, nanochat_fixtures, generation, caplog):
    backends.Emulated(emulation_library).kernels(engines.load(nanochat_fixtures / generation).architecture)
    assert caplog.text == ""


def test_several_kernels_may_be_wrong_at_once(emulation_library, nanochat_fixtures, monkeypatch):
    fixture, wrong = engines.load(nanochat_fixtures / "gen3"), ("rope_append", "paged_attention")
    emulated = backends.Emulated(emulation_library, backends.wrong_ops(**dict.fromkeys(wrong, refuse)), faults=wrong)
    engine = engine_of(emulated.kernels(fixture.architecture), fixture, monkeypatch)
    assert engine.runner.graphs          # references are captured too
    assert_reference_answers(engine, fixture, monkeypatch)
    assert engine.runner.queue.replays > 5


class FailingQueue(backends.HostQueue):
    """Graphs of more than `most` rows cannot be captured."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def capture(self, work):
        [fields] = [cell.cell_contents for cell in work.__closure__ if hasattr(cell.cell_contents, "logit_rows")]
        if len(fields.logit_rows) > self.most:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().capture(work)


@pytest.mark.parametrize("most, failed", by_day([(2, 1), (0, 3)], (2, 1)))
def test_steps_without_a_graph_run_op_by_op(emulation_library, nanochat_fixtures, monkeypatch, caplog,
                                            most, failed):
    """Steps whose graph cannot be captured run op by op."""
    fixture, queue = engines.load(nanochat_fixtures / "gen5"), FailingQueue(most)
    engine = engine_of(backends.Emulated(emulation_library).kernels(fixture.architecture), fixture, monkeypatch, queue)
    fault = engine.kernels.backend.faults["graphs"]
    assert fault == f"{failed} of 3 cannot be captured (RuntimeError: operation not permitted when stream is capturing)"
    assert caplog.text.count(fault) == 1 and {rows for rows, _ in engine.runner.graphs} == {1, 2, 4} & {*range(most + 1)}
    assert_reference_answers(engine, fixture, monkeypatch)
    assert (queue.replays > 0) is (most > 0)


def test_a_lost_device_ends_the_start_in_one_line(nanochat_fixtures):
    """Nothing can be computed on torch's meta device, as on a GPU after an illegal access."""
    spec = engines.load(nanochat_fixtures / "gen1").architecture
    backend = backends.CudaBackend(backends.blocks_of(spec), None, device="meta")
    said = "^decode_core's linear raises .*CHAT_SERVER_KERNELS=reference serves"
    with pytest.raises(ConfigError, match=said):
        backend.ops(0, 0, None)


def test_tolerances_know_nan_and_the_types():
    ones = torch.ones(4)
    assert proof.differs(ones * 1.0005, ones, "x") == "" and proof.differs(ones * 1.01, ones, "x")
    assert proof.differs((ones * 1.01).bfloat16(), ones, "x") == ""
    assert "nan" in proof.differs(ones * float("nan"), ones, "x")
    assert proof.differs(ones * 0, ones * 0, "x") == ""


@pytest.mark.slow
async def test_stats_and_log_name_what_does_not_run(start_pool, emulation_library, monkeypatch, capfd):
    """Stats and log name what does not run, and answers are right."""
    monkeypatch.setenv("EMULATION", str(emulation_library))
    sizes = dict(max_batch=2, context_length=128, prefill_chunk=32, device_type="cpu")      # the emulation's, also where a GPU is
    pool = await start_pool(worker_command=FAULTY, **sizes)
    plain = await start_pool(**sizes)
    [worker], [other] = pool.stats()["workers"], plain.stats()["workers"]
    assert other["kernel_faults"] == {} and set(worker["kernel_faults"]) == {"paged_attention", "graphs"}
    assert "differs by" in worker["kernel_faults"]["paged_attention"]
    assert worker["kernel_faults"]["graphs"].startswith("1 of 2 cannot be captured (RuntimeError: operation not")
    kernels = pool.stats()["kernels"]
    assert (kernels["paged_attention"], kernels["rope_append"]) == ("torch/reference", "decode_core/cuda")
    log = capfd.readouterr().err
    assert "decode_core's paged_attention on cpu: the output differs" in log and "CUDA graphs: 1 of 2 cannot be" in log
    request = greedy("a", max_tokens=20, ignore_eos=True)
    assert (await collect(pool, request))[1] == (await collect(plain, request))[1]
