"""Keys and values of the type q8_0 on CUDA: in the emulation (and on a GPU), compared with chat_server's reference."""

import numpy as np
import pytest
import torch

from chatlm.common.errors import ConfigError
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.pages import KvType
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.ops.packed_kv import PackedKv, turned
from flat_models import ModelSpec, model_of
from engines import make_batch
from nightly import by_day

backends = pytest.importorskip("cuda_backends", exc_type=ImportError, reason="no compiled core is installed")
from chatlm.worker.kernels import cuda_packed_kv  # noqa: E402
from chatlm.worker.kernels.cuda_packed_kv import PackedPages, halves  # noqa: E402

ORDERS, gpu = backends.ORDERS, backends.gpu
PACKED = KvType("float32", packed=True)


def pages_of(floats, device):
    """A cache (2, P, Hkv, 16, D) of random heads as PackedPages."""
    return PackedPages(*(part.to(device) for part in cuda_packed_kv.packed(floats)))


@pytest.mark.parametrize("size", [32, 128, 256])
def test_heads_are_turned_as_by_the_reference(gpu, size):
    x = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(size))
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        out = torch.empty(3, 5, size, dtype=dtype, device=gpu.device)
        gpu.ops.turn(x.to(gpu.device), out, stream=gpu.stream())
        assert (out.cpu().float() - turned(x)).abs().max() < bound * x.abs().max()


@pytest.mark.parametrize("size", by_day([32, 64, 128, 256], 64))
def test_keys_and_values_are_packed_as_by_reference(gpu, size):
    """To a step of the scale; no other slot is touched, and no scale is that of another block."""
    H, Hkv, P, T = 4, 2, 4, 5
    random = torch.Generator().manual_seed(size)
    qkv = torch.randn(T, (H + 2 * Hkv) * size, generator=random)
    qkv[:, ::37] *= 30
    qkv[3, (H + Hkv) * size:] = 0                # a head of zeros has scales of 0
    empty, no_turn = pages_of(torch.zeros(2, P, Hkv, 16, size), gpu.device), torch.ones(10, 0, device=gpu.device)
    slots = torch.tensor([3, 40, -1, 17, 63], device=gpu.device)
    q = torch.zeros(T, H, size, device=gpu.device)
    pages, scales = halves(empty)
    gpu.ops.rope_append(qkv.to(gpu.device), no_turn, no_turn, torch.arange(T, device=gpu.device), slots, *pages, q, stream=gpu.stream(), **scales)
    keys, values = (qkv[:, first * size:(first + Hkv) * size].view(T, Hkv, size) for first in (H, H + Hkv))
    for half, heads in enumerate((keys, values)):
        want = PackedKv(torch.zeros(T, Hkv, size, dtype=torch.int8), torch.zeros(T, Hkv, size // 32, dtype=torch.float16))
        want.put(torch.arange(T), heads)
        codes, steps = (part[half].cpu().transpose(1, 2).flatten(0, 1) for part in empty)           # (slots, Hkv, ..)
        for row, slot in enumerate(slots.tolist()):
            if slot >= 0:
                assert (codes[slot].int() - want.codes[row].int()).abs().max() <= 1
                assert torch.allclose(steps[slot].float(), want.scales[row].float(), rtol=2e-3)
        assert not codes[[s for s in range(16 * P) if s not in slots.tolist()]].any()
    real = slots >= 0
    want = turned(qkv[:, :H * size].view(T, H, size)) * size**-0.5
    assert (q.cpu()[real.cpu()] - want[real.cpu()]).abs().max() < 1e-5 * want.abs().max()


def attended(gpu, q, cache, table, lengths, window=0, order=0, softcap=0.0, sinks=None):
    (pages, scales), (B, H, D), Hkv = halves(cache), q.shape, cache.shape[2]
    floats, integers = backends.compiled.cuda.attention_workspace(B, H, Hkv, D, table.shape[1])
    out, tickets = torch.full((B, H * D), 7.0, device=gpu.device), torch.zeros(integers, dtype=torch.int32, device=gpu.device)
    gpu.order(order)
    gpu.ops.paged_attention(q.to(gpu.device), *pages, table.to(gpu.device), lengths.to(gpu.device), torch.empty(floats, device=gpu.device), tickets,
                            out, window=window, softcap=softcap, sinks=sinks, stream=gpu.stream(), **scales)
    assert not tickets.any()
    return out.cpu()


@pytest.mark.parametrize("heads, kv_heads, size", by_day([(2, 2, 32), (6, 2, 64), (10, 2, 128), (8, 1, 256)], (10, 2, 128), (2, 2, 32)))
def test_attention_over_packed_pages_is_near_float64(gpu, heads, kv_heads, size):
    """A row's bits are the same alone, in any order of threads and blocks, and with a wider table."""
    random = torch.Generator().manual_seed(heads)
    cache = pages_of(torch.randn(2, 12, kv_heads, 16, size, generator=random), gpu.device)
    q, lengths = torch.randn(3, heads, size, generator=random) * size**-0.5, torch.tensor([1, 150, 0], dtype=torch.int32)
    table = torch.stack([torch.randperm(12, generator=random) for _ in range(3)]).int()
    floats = cuda_packed_kv.gathered(cache, torch.arange(12, device=gpu.device)).cpu().double()                  # (2, Hkv, 12, 16, D)
    for window in (0, 100):
        outs = [attended(gpu, q, cache, table, lengths, window, order) for order in ORDERS]
        assert all(torch.equal(out, outs[0]) for out in outs)
        assert torch.equal(attended(gpu, q[1:2], cache, table[1:2].repeat(1, 2), lengths[1:2], window), outs[0][1:2])
        for row, length in enumerate(lengths[:2].tolist()):
            first = max(0, length - window) if window else 0
            k, v = (part[:, table[row].long()].flatten(1, 2)[:, first:length].repeat_interleave(heads // kv_heads, 0) for part in floats)
            weights = torch.softmax(torch.einsum("hd,hsd->hs", q[row].double(), k), -1)
            want = torch.einsum("hs,hsd->hd", weights, v).flatten()
            assert (outs[0][row] - want).abs().max() < 3e-6 * want.abs().max()
        assert (outs[0][2] == 7).all()


@pytest.mark.parametrize("wrong, message", [
    (lambda k, scales: dict(k_scales=None, v_scales=None), "k_scales: must come with pages of int8"),
    (lambda k, scales: dict(v_scales=scales.float()), "v_scales: must be float16"),
    (lambda k, scales: dict(k_scales=scales[:, :, :8]), "k_scales: must have shape"),
    (lambda k, scales: dict(k_pages=k.float(), v_pages=k.float()), "k_scales: must come with pages of int8, and with no others"),
    (lambda k, scales: dict(k_pages=k[..., :48], v_pages=k[..., :48], q=torch.zeros(1, 2, 48)), "k_pages: of int8 must have a D that is a power of two from 32, not 48")])
def test_wrong_pages_or_scales_are_named(emulation_library, wrong, message):
    ops, (k, scales) = backends.Emulated(emulation_library).ops, pages_of(torch.zeros(2, 16, 64), "cpu")
    k, scales = k.view(1, 2, 16, 64), scales.view(1, 2, 16, 2)
    given = dict(q=torch.zeros(1, 2, 64), k_pages=k, v_pages=k, k_scales=scales, v_scales=scales, block_table=torch.zeros(1, 1, dtype=torch.int32),
                 lengths=torch.ones(1, dtype=torch.int32), states=torch.zeros(999), tickets=torch.zeros(9, dtype=torch.int32), out=torch.zeros(1, 128))
    with pytest.raises(ValueError, match=message):
        ops.paged_attention(**given | wrong(k, scales), stream=0)


def small_model(size=32, **changes):
    spec = ModelSpec(vocab_size=284, layers=2, width=48, heads=4, kv_heads=2, head_size=size, ffn_size=64, max_positions=512, **changes)
    random = torch.Generator().manual_seed(3)
    return spec, {name: torch.randn(shape, generator=random) * (0.15 if len(shape) > 1 else 1.0) for name, shape in model_of(spec).shapes().items()}


@pytest.mark.parametrize("changes", by_day([{}, dict(sinks=True, attention_softcap=4.0)], dict(sinks=True, attention_softcap=4.0)))
def test_logits_over_packed_pages_match_references(gpu, changes):
    """Prompts in chunks, together with decode rows, through windows; float pages differ more."""
    spec, tensors = small_model(**changes)
    if changes:
        spec, tensors = backends.with_windows(spec, (24, 0)), tensors | {f"{l}.sinks": torch.linspace(-2, 3, 4) for l in range(2)}
    tokens, pages, logits = np.random.default_rng(4).integers(0, spec.vocab_size, 200).tolist(), [3, 1, 4, 2, 5, 6, 7, 0, 9, 8, 10, 11, 13], []
    for kernels, device, kv in ((load_kernels("cpu"), "cpu", PACKED), (gpu.kernels(spec), gpu.device, PACKED), (load_kernels("cpu"), "cpu", None)):
        model = Transformer(model_of(spec), {name: t.to(device) for name, t in tensors.items()}, kernels, num_pages=16, max_tokens=120, kv=kv,
                            dtype="float32", device=device)
        steps = [[(tokens, 0, 100, pages)], [(tokens, 100, 90, pages), (tokens, 0, 20, [14, 15])], [(tokens, 190, 1, pages), (tokens, 20, 1, [14, 15])]]
        logits.append(torch.cat([model.forward(make_batch(*step)).cpu().clone() for step in steps]))
    reference, fast, floats = logits
    near, far = ((other - reference).norm() / reference.norm() for other in (fast, floats))
    assert near < 3e-3 and near < far / 3       # a code may be the next one where a sum is on the edge


def test_packed_pages_have_the_bytes_of_the_layout(gpu):
    """A backend without kernels for packed pages would say so in one line."""
    spec, tensors = small_model()
    kernels = gpu.kernels(spec)
    model = Transformer(model_of(spec), tensors, kernels, num_pages=10, max_tokens=8, kv=PACKED, dtype="float32", device=gpu.device)
    assert model.cache.nbytes == 10 * model.layout.page_bytes == 10 * 16 * 2 * (2 * 2 * 32) * 34 // 32
    assert {*model.layout.types} == {"q8_0"} and model.layer_caches[0].codes.data_ptr() == model.cache.data_ptr()
    assert [kernels.kv_type(choice, "bfloat16") for choice in ("auto", "float32", "q8_0")] == [
        KvType("bfloat16"), KvType("float32"), KvType("bfloat16", packed=True)]
    kernels.backend.packs_kv = False
    with pytest.raises(ConfigError, match="^--kv-cache-dtype q8_0: decode_core/cuda has no kernels that read it; auto, bfloat16 and float32 are possible$"):
        kernels.kv_type("q8_0", "bfloat16")
