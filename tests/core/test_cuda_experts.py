"""Experts on CUDA: routing and products in the emulation (and on a GPU) against float64, and whole models that stay packed."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import families
import patching
from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import SamplingParams
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.engine.engine import Engine
from chatlm.worker.kernels import choosing
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.kernels.kernels import Backend
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.arrays.kinds import Norm
from chatlm.worker.arrays.packed import dequantize
from chatlm.worker.ops.basic import GATES, experts_reference, sigmoid_routes
from chatlm.worker.weights.load import open_model
from engines import make_batch, tokens_of
from nightly import by_day
from works import assignment, changed

backends = pytest.importorskip("cuda_backends", exc_type=ImportError, reason="no compiled core is installed")
gguf = pytest.importorskip("gguf")
from chatlm.worker.kernels import cuda, cuda_experts, cuda_runner, random_blocks  # noqa: E402
from chatlm.worker.kernels.cuda_weights import PackedMatrix  # noqa: E402

ORDERS, gpu = backends.ORDERS, backends.gpu
KINDS = [*cuda.BLOCKS, *cuda.FLOATS]
FEW, MANY = cuda.FEW_PAIRS, cuda.MANY_PAIRS


def on(gpu, array):
    return torch.from_numpy(np.ascontiguousarray(array)).to(gpu.device)


def routed(gpu, logits, chosen, sum_to_one):
    ids, shares = torch.full((len(logits), chosen), -9, dtype=torch.int32), torch.zeros(len(logits), chosen)
    ids, shares = ids.to(gpu.device), shares.to(gpu.device)
    gpu.ops.route(logits, ids, shares, sum_to_one=sum_to_one, stream=gpu.stream())
    return ids.cpu(), shares.cpu()


def grouped(gpu, ids, experts, item_pairs):
    pairs = len(ids)
    order = torch.full((pairs,), -1, dtype=torch.int32, device=gpu.device)
    items = torch.full((cuda.most_items(experts, pairs, item_pairs), 3), 99, dtype=torch.int32, device=gpu.device)
    gpu.ops.group(ids.to(gpu.device), order, items, experts=experts, item_pairs=item_pairs, stream=gpu.stream())
    return order, items


def weights_of(gpu, kind, rows, columns, seed=0):
    """(blocks on the device, their values in float64)"""
    if kind in cuda.FLOATS:
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(getattr(torch, kind))
        return w.view(torch.uint8).to(gpu.device), w.double().numpy()
    blocks = random_blocks.random_blocks(kind, rows, columns, seed)
    values = dequantize(SimpleNamespace(name=kind.upper()), blocks).reshape(rows, -1) if kind in cuda.OWN else gguf.dequantize(
        blocks, gguf.GGMLQuantizationType[kind.upper()])
    return on(gpu, blocks), values.astype(np.float64)


def product(gpu, x, routed, blocks, kind, outputs, gap=0, **options):
    many, pairs = x.dtype == torch.bfloat16, len(routed[0])
    dtype = torch.bfloat16 if many and options.get("gate") else torch.float32
    out = torch.full((pairs, outputs + gap), -7.0, dtype=dtype, device=gpu.device)
    gpu.ops.multiply_experts(x, *routed, blocks, out[:, :outputs], kind=kind, stream=gpu.stream(), **options)
    assert (out[:, outputs:] == -7).all()
    return out[:, :outputs].cpu()


def gate_in_float64(activation, gate, up):
    return GATES[activation](torch.from_numpy(gate), torch.from_numpy(up)).numpy()


@pytest.mark.parametrize("experts, chosen", [(1, 1), (7, 3), (32, 4), (33, 33), (128, 8), (1024, 64)])
def test_each_row_goes_to_its_largest_logits(gpu, experts, chosen):
    """Each row goes to its largest logits, and of equal ones to the lower ids."""
    random = torch.Generator().manual_seed(experts)
    logits = torch.randn(13, experts, generator=random) * 3
    logits[4:8] = logits[4:8].round()
    logits[9], logits[10, ::2], logits[11] = 0.0, -0.0, -1e30
    best = torch.sort(logits, descending=True, stable=True)
    for order, sum_to_one in zip(ORDERS, (True, False, True)):
        gpu.order(order)
        ids, shares = routed(gpu, logits.to(gpu.device), chosen, sum_to_one)
        assert torch.equal(ids.long(), best.indices[:, :chosen])
        sorted_logits = best.values.double()
        want = torch.softmax(sorted_logits[:, :chosen] if sum_to_one else sorted_logits, -1)[:, :chosen]
        assert (shares - want).abs().max() < 1e-6
    ids, shares = torch.full((3, chosen), 77, dtype=torch.int32), torch.full((3, chosen), 77.0)
    ids, shares, slots = (each.to(gpu.device) for each in (ids, shares, torch.tensor([5, -1, 0])))
    gpu.ops.route(logits[:3].to(gpu.device), ids, shares, sum_to_one=True, slots=slots, stream=gpu.stream())
    assert torch.equal(ids[::2].cpu().long(), best.indices[:3:2, :chosen]) and (ids[1] == -1).all() and (shares[1] == 77).all()
    ids, _ = routed(gpu, torch.full((2, experts), float("nan"), device=gpu.device), chosen, True)
    assert all(len({*row}) == chosen and {*row} <= {*range(experts)} for row in ids.tolist())


@pytest.mark.parametrize("experts, pairs, item_pairs", [(1, 9, 4), (5, 3, 4), (40, 300, 4), (7, 500, 64), (1024, 700, 64)])
def test_every_pair_is_in_one_item_of_its_expert(gpu, experts, pairs, item_pairs):
    ids = torch.from_numpy(np.random.default_rng(pairs).integers(0, experts, pairs) ** 2 % experts).to(torch.int32)
    strays = torch.cat((ids, torch.tensor([-1, experts, 1 << 30], dtype=torch.int32)))
    for order in ORDERS:
        gpu.order(order)
        for given in (ids, strays, ids[:1], torch.zeros_like(ids)):
            by_expert, items = (each.cpu().tolist() for each in grouped(gpu, given, experts, item_pairs))
            used = [item for item in items if item[2]]
            found = [(expert, pair) for expert, first, count in used for pair in by_expert[first:first + count]]
            assert sorted(found) == sorted((id, pair) for pair, id in enumerate(given.tolist()) if 0 <= id < experts)
            assert all(0 < count <= item_pairs for _, _, count in used)


@pytest.mark.parametrize("kind, gate", by_day(dict.fromkeys([*zip(KINDS, itertools.cycle(cuda.GATES)), *itertools.product(("mxfp4", "float32"), cuda.GATES)]),
                                              *itertools.product(("mxfp4",), cuda.GATES), *list(zip(KINDS, itertools.cycle(cuda.GATES)))[::3]))
def test_each_pair_takes_its_expert_s_weights(gpu, kind, gate):
    """Of few rows as in float64, of many within the rounding to bfloat16; experts without pairs, and with many."""
    E, N, K, chosen = 5, 21, max(72, cuda.BLOCKS.get(kind, (0, 0))[0] // 32 * 64), 3
    K = K if kind in cuda.FLOATS else K // cuda.BLOCKS[kind][0] * cuda.BLOCKS[kind][0]
    blocks, w = weights_of(gpu, kind, E * N * (2 if gate else 1), K, seed=N)
    w = w.reshape(-1, E, N, K)
    random = np.random.default_rng(K)
    bias = random.standard_normal(w.size // K).astype(np.float32)
    for rows, item_pairs in ((2, FEW), (9, FEW), (30, MANY)):
        x = random.standard_normal((rows, K)).astype(np.float32)
        given = on(gpu, x) if item_pairs == FEW else on(gpu, x).bfloat16()
        ids = random.choice([0, 1, 4, 4, 4, 4], rows * chosen)
        shares = random.uniform(0, 1, len(ids)).astype(np.float32)
        exact = given.double().cpu().numpy()[np.arange(len(ids)) // chosen]
        if item_pairs == MANY:
            w = torch.from_numpy(w).bfloat16().double().numpy()
        y = [np.einsum("pk,pnk->pn", exact, half[ids]) + own.reshape(E, N)[ids] for half, own in zip(w, np.split(bias, len(w)))]
        want = (gate_in_float64(gate, *y) if gate else y[0]) * shares[:, None]
        outs = set()
        for order in ORDERS:
            gpu.order(order)
            routing = grouped(gpu, torch.from_numpy(ids.astype(np.int32)), E, item_pairs)
            got = product(gpu, given, routing, blocks, kind, N, gap=order, gate=gate, bias=on(gpu, bias), shares=on(gpu, shares))
            outs.add(got.float().numpy().tobytes())
        scale = np.abs(want).max()
        assert np.abs(got.double().numpy() - want).max() < (1e-2 if got.dtype == torch.bfloat16 else 2e-5) * scale and len(outs) == 1


@pytest.mark.parametrize("kind", ["mxfp4", "q4_k", "bfloat16"])
def test_a_pairs_bits_depend_on_it_alone(gpu, kind):
    E, N, K = 3, 10, 256
    blocks, _ = weights_of(gpu, kind, E * N, K)
    x = on(gpu, np.random.default_rng(1).standard_normal((90, K)).astype(np.float32))
    ids = torch.arange(90, dtype=torch.int32) ** 2 % E
    for item_pairs, given in ((FEW, x), (MANY, x.bfloat16())):
        together = product(gpu, given, grouped(gpu, ids, E, item_pairs), blocks, kind, N)
        for some in ([5], [89, 0, 44], list(range(20, 60))):
            got = product(gpu, given[some].contiguous(), grouped(gpu, ids[some], E, item_pairs), blocks, kind, N)
            assert torch.equal(got, together[some])



def test_a_wrong_expert_argument_is_named(gpu):
    """A wrong argument is a value error that names it."""
    at = dict(device=gpu.device)
    blocks, _ = weights_of(gpu, "q4_0", 4 * 16, 64)
    order, items = grouped(gpu, torch.zeros(6, dtype=torch.int32), 4, FEW)
    good = {"x": torch.zeros(3, 64, **at), "order": order, "items": items, "blocks": blocks, "out": torch.zeros(6, 16, **at),
            "kind": "q4_0", "bias": torch.zeros(64, **at), "shares": torch.zeros(6, **at)}
    gpu.ops.multiply_experts(**good, stream=gpu.stream())
    shifted = torch.zeros(3 * 64 + 1, **at)[1:].view(3, 64)
    for name, wrong in (("kind", "q9"), ("gate", "relu"), ("x", torch.zeros(4, 64, **at)), ("x", torch.zeros(3, 32, **at)),
                        ("x", shifted), ("x", good["x"].half()), ("out", torch.zeros(5, 16, **at)), ("blocks", blocks[:, :0]),
                        ("blocks", blocks[:60]), ("items", items[:, :2]), ("bias", torch.zeros(16, **at)),
                        ("shares", torch.zeros(3, **at)), ("order", order.long())):
        with pytest.raises(ValueError, match=f"^{name}: "):
            gpu.ops.multiply_experts(**good | {name: wrong}, stream=gpu.stream())
    logits, ids, shares = torch.zeros(2, 8, **at), torch.zeros(2, 3, dtype=torch.int32, **at), torch.zeros(2, 3, **at)
    for name, arguments in (("logits", (logits.half(), ids, shares)), ("ids", (logits[:, :2].contiguous(), ids, shares)),
                            ("ids", (torch.zeros(2, 1025, **at), ids, shares)), ("shares", (logits, ids, shares[:1]))):
        with pytest.raises(ValueError, match=f"^{name}: "):
            gpu.ops.route(*arguments, sum_to_one=True, stream=gpu.stream())
    for name, changes in (("experts", {"experts": 1025}), ("experts", {"item_pairs": 5}), ("items", {"experts": 3}), ("order", {"order": order[:5]})):
        with pytest.raises(ValueError, match=f"^{name}: "):
            gpu.ops.group(**{"ids": order, "order": order, "items": items, "experts": 4, "item_pairs": FEW} | changes, stream=gpu.stream())


# --- the op ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates, ups, downs", by_day([("q4_k", "q4_k", "q6_k"), ("mxfp4", "mxfp4", "mxfp4"), ("q5_k", "iq4_xs", "q8_0")], ("q5_k", "iq4_xs", "q8_0")))
@pytest.mark.parametrize("rows", by_day([1, 5, 33], 5))
def test_experts_compute_what_their_reference_does(gpu, gates, ups, downs, rows):
    """Also where gates are of another type than ups."""
    E, C, F, chosen = 6, 256, 256, 2
    w = [weights_of(gpu, kind, E * n, 256, seed=i) for i, (kind, n) in enumerate(((gates, F), (ups, F), (downs, C)))]
    parts = [("q5_k", w[0][0]), ("iq4_xs", w[1][0])] if gates != ups else [(gates, torch.cat((w[0][0], w[1][0])))]
    gate_up, down = PackedMatrix(parts, C), PackedMatrix([(downs, w[2][0])], F)
    assert cuda_experts.fits_experts("0.expert_gate_up", gate_up) and cuda_experts.fits_experts("0.expert_down", gate_up) is (gates == ups)
    wide = [torch.from_numpy(values).float().to(gpu.device) for _, values in w]
    random = torch.Generator().manual_seed(rows)
    x, logits = (torch.randn(rows, n, generator=random).to(gpu.device) for n in (C, E))
    biases = [torch.randn(n, generator=random).to(gpu.device) for n in (2 * E * F, E * C)]
    ours = cuda_experts.ExpertOps(gpu.ops, gpu.stream)
    for activation, sum_to_one, given in (("swiglu", False, (None, None)), ("clamped_swiglu", True, biases)):
        norm = torch.full((C,), 1 / 16 / float(wide[0].std()), device=gpu.device)        # so that gates are of about 1
        options = dict(norm=Norm(norm, 1e-5), biases=given, activation=activation, chosen=chosen, sum_to_one=sum_to_one)
        want, got = torch.empty_like(x), torch.empty_like(x)
        experts_reference(x, logits, torch.cat(wide[:2]), wide[2], want, **options)
        ours.experts(x, logits, gate_up, down, got, **options)
        many = rows * chosen > cuda_experts.FEW_PAIRS * E
        assert (got - want).norm() < (2e-2 if many else 1e-5) * (want - x).norm()
        if rows == 1:
            ours.experts(x, logits, gate_up, down, got, residual=False, **options)
            assert (got + x - want).norm() < 1e-5 * (want - x).norm()


@pytest.mark.parametrize("rows", by_day([1, 5, 33], 5))
def test_experts_without_gates_match_their_reference(gpu, rows):
    """Of sigmoids in groups, which torch chooses; they read x as it is, and padding has no expert."""
    E, C, F = 6, 256, 64
    (ups, wide_up), (downs, wide_down) = weights_of(gpu, "q8_0", E * F, C, seed=1), weights_of(gpu, "q8_0", E * C, F, seed=2)
    wide = [torch.from_numpy(values).float().to(gpu.device) for values in (wide_up, wide_down)]
    random = torch.Generator().manual_seed(rows)
    x, logits, bias = (torch.randn(*shape, generator=random).to(gpu.device) for shape in ((rows, C), (rows, E), (E,)))
    options = dict(norm=None, biases=(None, None), activation="relu2", chosen=2, sum_to_one=True, sigmoids=True, correction_bias=bias, groups=(3, 1),
                   share_scale=2.5, residual=False)
    ours, want, got = cuda_experts.ExpertOps(gpu.ops, gpu.stream), torch.empty_like(x), torch.zeros_like(x)
    experts_reference(x, logits, *wide, want, **options)
    ours.experts(x, logits, PackedMatrix([("q8_0", ups)], C), PackedMatrix([("q8_0", downs)], F), got, **options)
    assert (got - want).norm() < (2e-2 if rows * 2 > cuda_experts.FEW_PAIRS * E else 1e-5) * want.norm()
    ours.slots = torch.tensor([-1, *range(1, rows)], device=gpu.device)
    ids, _ = ours.route_by_torch(sigmoid_routes, logits, 2, True, None, (3, 1), 1.0)
    assert ids[0].tolist() == [-1, -1] and (ids[1:] >= 0).all()


# --- whole models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expert_files(tmp_path_factory):
    """name -> a GGUF of a tiny model of two layers: gpt-oss with experts in MXFP4, Qwen3-MoE in Q8_0; or a folder of MXFP4 blocks."""
    folder, blocks = tmp_path_factory.mktemp("experts"), tmp_path_factory.mktemp("blocks")
    small = dict(num_hidden_layers=2, intermediate_size=32, moe_intermediate_size=32)
    families.save_packed(blocks, **small)
    return {"folder": blocks} | {name: families.as_gguf(folder / f"{name}.gguf", families.make_model(name, **small), quantized=True)
                                 for name in ("gpt-oss", "qwen3moe")}


@pytest.fixture
def emulated(emulation_library, monkeypatch):
    monkeypatch.setattr(cuda, "SAMPLE_THREADS", 32)
    return backends.Emulated(emulation_library)


def opened(path, monkeypatch, backend=None, dtype=None):
    """A file as a worker on a GPU loads it; without a backend in float32, for references."""
    settings = Settings(model=str(path), dtype=dtype)
    with monkeypatch.context() as patch:
        patching.patch(patch, choosing, "choose_backend", lambda device, model, *ranks: backend(model) if backend else Backend("cpu"))
        return open_model(resolve_model(settings), settings)


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [
    pytest.param("qwen3moe", "q8_0", marks=pytest.mark.slow), pytest.param("gpt-oss", "mxfp4", marks=pytest.mark.slow), ("folder", "mxfp4")])
def test_a_file_s_experts_stay_packed(emulated, expert_files, monkeypatch, name, kind):
    """Chunks of 8 rows, whose products are all in float32, and two sequences' decode rows, beyond gpt-oss' window of 24."""
    # a folder's floats are bfloat16 for both
    exact = opened(expert_files[name], monkeypatch, dtype="bfloat16" if name == "folder" else "float32")
    model = opened(expert_files[name], monkeypatch, emulated.backend)
    ids = np.random.default_rng(3).integers(0, 256, 80).tolist()
    steps = [[(first, 8, [3, 1, 4])] for first in range(0, 40, 8)] + [[(40, 1, [3, 1, 4]), (0, 7, [0])], [(41, 1, [3, 1, 4]), (7, 1, [0])]]
    logits = []
    for each, kernels in ((exact, load_kernels("cpu")), (model, emulated.kernels(model.architecture))):
        ours = Transformer(each.architecture, dict(each.tensors), kernels, num_pages=12, max_tokens=64, max_rows=8, dtype="float32")
        with torch.inference_mode():
            logits.append([ours.forward(make_batch(*((ids, first, count, pages) for first, count, pages in step))).clone() for step in steps])
    experts = [weight for key, weight in ours.weights.items() if "expert" in key and not key.endswith("_bias")]
    assert len(experts) == 4 and all(isinstance(weight, PackedMatrix) and weight.kind == kind for weight in experts)
    assert kernels.experts == kernels.backend.mixture.experts and kernels.backend.faults == {}
    for want, got in zip(*logits):
        assert (got - want).norm() < 2e-3 * want.norm()     # routers are bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("name, prompt, count, rows, num_pages", [("gpt-oss", 15, 19, 2, 5), pytest.param("qwen3moe", 40, 6, 4, 60, marks=pytest.mark.slow)])
def test_graphs_of_experts_answer_as_ops_do(emulated, expert_files, monkeypatch, name, prompt, count, rows, num_pages):
    """Steps that are begun ahead, with preemption where pages are few, else with a row of padding."""
    model = opened(expert_files[name], monkeypatch, emulated.backend)
    monkeypatch.setattr(cuda_runner, "CudaQueue", lambda device: backends.HostQueue())
    works = [assignment(f"w{i}", tuple(range(10 + i, 10 + prompt)), SamplingParams(seed=i), count + i % 3, ignore_eos=True) for i in range(min(rows, 3))]
    results, kernels = [], emulated.kernels(model.architecture)
    for prepare in (False, True):
        transformer = Transformer(model.architecture, dict(model.tensors), kernels, num_pages=num_pages, max_tokens=64, max_rows=rows)
        engine = Engine(transformer, open_tokenizer(model.text), kernels, num_pages=num_pages, max_batch=rows, context_length=64, prefill_chunk=48)
        if prepare:
            with torch.inference_mode():
                engine.runner.prepare(lambda fraction: None)
        results.append(tokens_of(engine, works))
        assert (engine.queue.preemptions > 0) is (num_pages < 10)
        assert (engine.runner.queue.replays > 3) is prepare and kernels.backend.faults == {}
    assert [len(tokens) for tokens in results[1].values()] == [count + i % 3 for i in range(len(works))]
    assert sum(a == b for a, b in zip(results[0].values(), results[1].values())) >= len(works) - 1       # padding may move a near tie


def test_wrong_experts_become_bfloat16(emulation_library, expert_files, monkeypatch, caplog):
    """Where experts are wrong, their weights become bfloat16, and the reference computes."""
    ops = backends.wrong_ops(multiply_experts=lambda out: out.mul_(1.1))
    emulated = backends.Emulated(emulation_library, ops, faults=["experts"])
    model = opened(expert_files["gpt-oss"], monkeypatch, emulated.backend)
    kernels = emulated.kernels(model.architecture)
    ours = Transformer(model.architecture, dict(model.tensors), kernels, num_pages=4, max_tokens=32, max_rows=4, dtype="float32")
    assert kernels.experts is experts_reference and ours.weights["0.expert_down"].dtype == torch.bfloat16
    assert isinstance(ours.weights["0.qkv"], PackedMatrix) and "decode_core's experts on cpu: " in caplog.text
    exact = opened(expert_files["gpt-oss"], monkeypatch, dtype="float32")
    plain = Transformer(exact.architecture, dict(exact.tensors), load_kernels("cpu"), num_pages=4, max_tokens=32, dtype="float32")
    ids = list(range(5, 35))
    want, got = (each.forward(make_batch((ids, 0, 30, [2, 1]))) for each in (plain, ours))
    assert (got - want).norm() < 0.5 * want.norm()      # roundings change which experts a row goes to


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss", pytest.param("qwen3moe", marks=pytest.mark.slow)])
def test_answers_of_experts_go_on_on_another_gpu(emulated, expert_files, monkeypatch, name):
    """Drafts are off: a row's last bits depend on its batch there. The same decides near ties when ids are computed again, in one chunk."""
    model = opened(expert_files[name], monkeypatch, emulated.backend)
    monkeypatch.setattr(cuda_runner, "CudaQueue", lambda device: backends.HostQueue())
    works = [assignment(f"w{i}", (5, 6, 7, 8, 10 + i) * 3, SamplingParams(temperature=i / 2, seed=i), 10, ignore_eos=True) for i in range(3)]

    def told(works, graphs):
        kernels = emulated.kernels(model.architecture)
        transformer = Transformer(model.architecture, dict(model.tensors), kernels, num_pages=12, max_tokens=64, max_rows=3)
        engine = Engine(transformer, open_tokenizer(model.text), kernels, num_pages=12, max_batch=3, context_length=64, prefill_chunk=48)
        if graphs:
            with torch.inference_mode():
                engine.runner.prepare(lambda fraction: None)
        tokens = tokens_of(engine, works)
        assert (engine.runner.queue.replays > 3) is graphs and engine.drafts is False and engine.drafting.drafted.total == 0
        return tokens

    tokens = told(works, graphs=False)
    resumed = [changed(work, resumed_ids=tuple(tokens[work.id][:2 + 2 * i])) for i, work in enumerate(works)]
    rest = told(resumed, graphs=True)
    assert all(len(work.resumed_ids) + len(rest[work.id]) == 10 for work in resumed)
    assert sum(list(work.resumed_ids) + rest[work.id] == tokens[work.id] for work in resumed) >= 2
