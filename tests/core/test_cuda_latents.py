"""Latent attention (MLA) on CUDA: in the emulation (and on a GPU), compared with float64 and with chat_server's references."""

import pytest
import torch

from chatlm.common.text.load import open_tokenizer
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.kernels.limits import left_to_torch, not_compiled
from chatlm.worker.model.pages import KvType
from chatlm.worker.ops.latent import absorb_reference, append_latents_reference, by_head_reference
from flat_models import model_of
from engines import load, run
from families import MODELS
from nightly import WHOLE, by_day
from tiny_specs import family_config, family_spec, spec_of

backends = pytest.importorskip("cuda_backends", exc_type=ImportError, reason="no compiled core is installed")
cuda = backends.compiled.cuda
from chatlm.worker.kernels import cuda_latents, proof  # noqa: E402
from chatlm.worker.kernels.random_blocks import random_blocks  # noqa: E402
from chatlm.worker.kernels.cuda_weights import dequantized  # noqa: E402
from cuda_engines import answers, cuda_engine, engine_on, logits_of, same_answers, some_works  # noqa: E402

ORDERS, gpu = backends.ORDERS, backends.gpu
ROUNDED = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}         # of what a type stores
NOTHING = 7.0


def dice(seed):
    return torch.Generator().manual_seed(seed)


def tables(turned, positions=64):
    angles = torch.outer(torch.arange(positions), 100.0 ** (-torch.arange(turned // 2) / max(1, turned // 2)))
    return angles.cos(), angles.sin()


def same_in_all_orders(gpu, work):
    """What `work` returns, which must have the same bits in every order of threads and blocks."""
    results = []
    for order in ORDERS:
        gpu.order(order)
        results.append(work())
    assert all(torch.equal(result, results[0]) for result in results)
    return results[0]


# --- append_latents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept, turned, kind, cached, adjacent", [
    (512, 64, torch.float32, torch.bfloat16, True), (256, 32, torch.bfloat16, torch.float32, False), (32, 16, torch.float32, torch.float16, True),
    (80, 0, torch.float32, torch.float32, False)])
def test_tokens_are_kept_as_by_the_reference(gpu, kept, turned, kind, cached, adjacent):
    """Padding and rows out of range write nothing."""
    D, pages = kept + turned, 5
    wide = torch.randn(6, D + 8, generator=dice(kept)).to(kind)
    x, weight = wide[:, :D], 1 + torch.randn(kept, generator=dice(1)) / 4
    positions, slots = torch.tensor([0, 63, 7, 5, 64, 9]), torch.tensor([17, 3, 79, -1, 20, 80])
    cos, sin = tables(turned)

    def kept_by_kernel():
        cache = torch.full((pages, 16, D), NOTHING, dtype=cached, device=gpu.device)
        gpu.ops.append_latents(*(each.to(gpu.device) for each in (wide[:, :D], weight, cos, sin, positions, slots)), cache, eps=1e-5,
                               adjacent=adjacent, stream=gpu.stream())
        return cache.cpu()

    got = same_in_all_orders(gpu, kept_by_kernel).view(-1, D)
    want = torch.full((pages * 16, 1, D), NOTHING)
    append_latents_reference(x[:3], weight, 1e-5, cos, sin, positions[:3], slots[:3], (want, want), adjacent)
    assert (got.float() - want[:, 0]).abs().max() <= ROUNDED[cached] * want.abs().max()
    assert (got[[slot for slot in range(80) if slot not in (17, 3, 79)]] == NOTHING).all()


# --- products by head --------------------------------------------------------------------------------------------


def head_matrices(kind, rows, columns, device):
    """(rows of blocks, the same in float32)"""
    if kind in cuda.FLOATS:
        floats = torch.randn(rows, columns, generator=dice(rows)).to(getattr(torch, kind))
        return floats.view(torch.uint8).to(device), floats.float()
    blocks = torch.from_numpy(random_blocks(kind, rows, columns))
    return blocks.to(device), dequantized(kind, blocks)


KINDS = by_day(["bfloat16", "float16", "float32", "q8_0", "q4_0", "q5_1", "iq4_nl", "mxfp4"], "bfloat16", "q8_0")


@pytest.mark.parametrize("kind", KINDS)
def test_each_head_meets_its_own_matrix(gpu, kind):
    """A row's bits are the same whatever other rows there are; all output types; outputs that are no multiple of 16."""
    H, N, K = 3, 22, 320
    blocks, floats = head_matrices(kind, H * N, K, gpu.device)
    x = torch.randn(11, H * K, generator=dice(2))
    want = torch.empty(11, H * N)
    by_head_reference(x, floats, want)

    def product(rows, out_type=torch.float32):
        out = torch.full((rows, H * N + 6), NOTHING, dtype=out_type, device=gpu.device)
        gpu.ops.by_head(x[:rows].to(gpu.device), blocks, out[:, :H * N], kind=kind, columns=K, stream=gpu.stream())
        assert (out[:, H * N:] == NOTHING).all()
        return out[:, :H * N].cpu()

    whole = same_in_all_orders(gpu, lambda: product(11))
    assert (whole - want).abs().max() <= 1e-5 * want.abs().max()
    for rows in (1, 2, 3, 8):
        assert torch.equal(product(rows), whole[:rows])
    assert (product(3, torch.bfloat16).float() - want[:3]).abs().max() <= 8e-3 * want.abs().max()


@pytest.mark.parametrize("kind, adjacent", [("bfloat16", True), ("q8_0", False)])
def test_queries_are_absorbed_as_by_the_reference(gpu, kind, adjacent):
    """Also asked for what turns alone; a row whose position is out of range does not turn."""
    H, kept, plain, turned, T = 3, 48, 96, 32, 10
    blocks, floats = head_matrices(kind, H * kept, plain, gpu.device)
    x, positions = torch.randn(T, H * (plain + turned), generator=dice(3)), torch.tensor([*range(T - 1), 64])
    cos, sin = tables(turned)
    want = torch.empty(T, H * (kept + turned))
    page = torch.zeros(16, 1, kept + turned)
    absorb_reference(x, floats, cos, sin, positions.clamp(max=63), 0.7, (page, page), want, adjacent)

    def absorbed(rows, blocks):
        out = torch.full((rows, H * (kept + turned)), NOTHING, device=gpu.device)
        gpu.ops.absorb(x[:rows].to(gpu.device), blocks, *(each.to(gpu.device) for each in (cos, sin, positions[:rows])), out, kind=kind, kept=kept,
                       plain=plain, scale=0.7, adjacent=adjacent, stream=gpu.stream())
        return out.cpu().view(rows, H, -1)

    whole = same_in_all_orders(gpu, lambda: absorbed(T, blocks))
    wanted = want.view(T, H, -1)
    assert (whole[:-1] - wanted[:-1]).abs().max() <= 1e-5 * want.abs().max()
    assert (whole[-1, :, :kept] - wanted[-1, :, :kept]).abs().max() <= 1e-5 * want.abs().max() and (whole[-1, :, kept:] == NOTHING).all()
    assert torch.equal(absorbed(1, blocks), whole[:1])
    alone = absorbed(T, None)
    assert torch.equal(alone[..., kept:], whole[..., kept:]) and (alone[..., :kept] == NOTHING).all()


# --- attention ---------------------------------------------------------------------------------------------------


def latent_case(heads, D, kind, lengths, width, seed=0):
    """q, pages, tables: each row has pages of its own; what no row uses is NaN, and ids after a row's pages are none."""
    random = dice(seed)
    needed = [-(-max(length, 0) // 16) for length in lengths]
    ids = torch.randperm(sum(needed) + 2, generator=random).int()
    pages = torch.full((len(ids), 16, D), torch.nan, dtype=kind)
    table = torch.full((len(lengths), width), -5, dtype=torch.int32)
    for row, (length, own) in enumerate(zip(lengths, torch.split(ids[:sum(needed)], needed))):
        table[row, :len(own)] = own
        for position in range(length):
            pages[own[position // 16], position % 16] = torch.randn(D, generator=random).to(kind)
    q = 1.5 * torch.randn(len(lengths), heads, D, generator=random) * D**-0.5
    return q, pages, table, torch.tensor(lengths, dtype=torch.int32)


def attended(gpu, q, pages, table, lengths, Dv, out_type=torch.float32, window=0):
    B, H, _ = q.shape
    floats, integers = cuda.latent_workspace(B, H, Dv, table.shape[1])
    states, tickets = torch.full((floats,), torch.nan, device=gpu.device), torch.zeros(integers, dtype=torch.int32, device=gpu.device)
    out = torch.full((B, H * Dv), NOTHING, dtype=out_type, device=gpu.device)
    gpu.ops.latent_attention(*(each.to(gpu.device) for each in (q, pages, table, lengths)), states, tickets, out, window=window, stream=gpu.stream())
    assert not tickets.any()
    return out.cpu()


def wanted_attention(q, pages, table, length, Dv, window=0):
    """One row in float64 -> (H, Dv)."""
    keys = pages[table[:-(-length // 16)].long()].flatten(0, 1)[max(0, length - window) if window else 0:length].double()
    return torch.softmax(q.double() @ keys.T, -1) @ keys[:, :Dv]


# 20 heads are two groups of ten, as GLM-4.7-Flash has them
@pytest.mark.parametrize("heads, D, Dv, kind, out_type", by_day([
    (20, 576, 512, torch.bfloat16, torch.float32), (16, 320, 256, torch.bfloat16, torch.bfloat16), (3, 48, 32, torch.float32, torch.float32),
    (33, 80, 64, torch.float16, torch.float32), (5, 576, 512, torch.float32, torch.bfloat16), (1, 64, 64, torch.bfloat16, torch.float32)],
    (20, 576, 512, torch.bfloat16, torch.float32), (3, 48, 32, torch.float32, torch.float32), (33, 80, 64, torch.float16, torch.float32)))
def test_latent_attention_is_near_float64(gpu, heads, D, Dv, kind, out_type):
    """Of rows of no key, of one, within a page, and of several spans, through windows too."""
    lengths = [1, 16, 33, 0, 150, -1]
    q, pages, table, sizes = latent_case(heads, D, kind, lengths, 12, heads)
    for window in (0, 100):
        gpu.order(window % 3)
        got = attended(gpu, q, pages, table, sizes, Dv, out_type, window)
        for row, length in enumerate(lengths):
            if length <= 0:
                assert (got[row] == NOTHING).all()
                continue
            want = wanted_attention(q[row], pages, table[row], length, Dv, window)
            bound = 5e-5 + (ROUNDED[torch.bfloat16] if out_type == torch.bfloat16 else 0)
            assert (got[row].view(heads, Dv) - want).abs().max() <= bound * want.abs().max()


def test_a_row_of_latents_has_the_same_bits_anywhere(gpu):
    """In any batch, with a wider table, and in any order of threads and blocks."""
    q, pages, table, sizes = latent_case(4, 64, torch.bfloat16, [200, 40, 129], 13)
    whole = same_in_all_orders(gpu, lambda: attended(gpu, q, pages, table, sizes, 48))
    for some in ([2], [1, 0], [0, 0]):
        wide = torch.nn.functional.pad(table[some], (0, 30), value=-1)
        assert torch.equal(attended(gpu, q[some], pages, wide, sizes[some], 48), whole[some])


@pytest.mark.parametrize("most_spans", [1, 3, 20])
def test_long_rows_of_latents_are_merged_in_groups(gpu, monkeypatch, most_spans):
    """With 20 spans, two groups of them; with 1, nothing is merged."""
    monkeypatch.setattr(cuda, "MOST_SPANS", most_spans)
    lengths = [40, 65, 1300]
    q, pages, table, sizes = latent_case(2, 32, torch.float32, lengths, 82)
    gpu.order(2)
    got = attended(gpu, q, pages, table, sizes, 16)
    for row, length in enumerate(lengths):
        want = wanted_attention(q[row], pages, table[row], length, 16)
        assert (got[row].view(2, 16) - want).abs().max() <= 5e-5 * want.abs().max()


def test_page_ids_of_latents_out_of_range_are_masked(gpu):
    q, pages, table, sizes = latent_case(2, 32, torch.bfloat16, [40, 100], 7)
    good = attended(gpu, q, pages, table, sizes, 16)
    table[0], table[1, 3] = 1 << 30, -1
    got = attended(gpu, q, pages, table, sizes, 16)
    assert (got[0] == 0).all() and got[1].isfinite().all() and (got[1] != good[1]).any()
    sizes[0] = 1 << 30                          # longer than the table
    attended(gpu, q, pages, table, sizes, 16)


# --- whole models ------------------------------------------------------------------------------------------------


def latent_model(name, fixtures):
    """(spec, random tensors, a tokenizer) of a family with latent attention."""
    spec = family_spec(name) if isinstance(name, str) else name
    if name == "mistral4":                      # whose queries grow, here from position 8 on
        spec = spec_of(family_config(name, rope_parameters=MODELS[name][1]["rope_parameters"] | dict(original_max_position_embeddings=8)), 512)
    tensors = {key: torch.randn(shape, generator=dice(4)) * (0.15 if len(shape) > 1 else 1.0) for key, shape in model_of(spec).shapes().items()}
    return spec, tensors, open_tokenizer(load(fixtures / "gen5").text)


FAMILIES = "deepseek3", "deepseek2-lite", "deepseek2-grouped", "kimi2", "glm-flash", "youtu", "mistral4", "minicpm3"
OURS = {"absorb", "append_latents", "by_head", "paged_attention", "make_cache", "plan_attention"}


@pytest.mark.parametrize("name", by_day(FAMILIES, "mistral4", "minicpm3"))
def test_families_of_latents_answer_as_references(emulation_library, nanochat_fixtures, monkeypatch, name):
    """Steps of decode rows are graphs; prompts of several chunks come between them."""
    model = latent_model(name, nanochat_fixtures)
    assert not_compiled(model_of(model[0]), "cuda") == ""
    assert ("scale of queries by their position" in left_to_torch(model_of(model[0]), "cuda")) is (name == "mistral4")
    works = [work for work in some_works(model[0].vocab_size, 4 if WHOLE else 3, 3) if len(work.prompt_ids) < 100 or WHOLE and not model[0].experts]
    expected = run(engine_on(load_kernels("cpu"), model), works)
    rows = 2 if model[0].experts else None      # which draft nothing
    engine = cuda_engine(backends.Emulated(emulation_library), model, monkeypatch, max_batch=2, max_rows=rows, prefill_chunk=12)
    assert OURS <= {op for op in engine.kernels.names} and engine.kernels.backend.latents
    same_answers(expected, answers(engine, works, [0, 2, 2, 9][:len(works)]))
    assert engine.runner.queue.replays > 8


@torch.inference_mode()
def test_graphs_of_latents_have_each_row_s_bits(emulation_library, nanochat_fixtures, monkeypatch):
    """So drafts are on for dense models, and off where a kernel failed, over pages of 8 bits, and where experts mix rows."""
    model = latent_model("youtu", nanochat_fixtures)
    engine = cuda_engine(backends.Emulated(emulation_library, products=True), model, monkeypatch, max_batch=2, max_rows=2, context_length=64)
    steps, backend = engine.runner, engine.kernels.backend
    for length in (1, 2):
        together = logits_of(steps, [0, 1], length)
        assert torch.equal(logits_of(steps, [1], length), together[1:])
    assert backend.few_rows_invariant
    backend.latents.packed = True
    assert not backend.few_rows_invariant
    backend.latents.packed = False
    backend.faults["absorb"] = "differs"
    assert not backend.few_rows_invariant
    experts = backends.Emulated(emulation_library, products=True).backend(family_spec("deepseek3"))
    assert not experts.few_rows_invariant


@torch.inference_mode()
def test_latents_in_8_bits_are_computed_by_torch(emulation_library, nanochat_fixtures, monkeypatch):
    """As over chat_server's own cache, in graphs too; padding writes nothing."""
    spec = spec_of(family_config("youtu", kv_lora_rank=64, qk_rope_head_dim=32))        # both parts are powers of two
    model = latent_model(spec, nanochat_fixtures)
    options = dict(max_batch=2, max_rows=2, kv=KvType("float32", packed=True))
    engine = cuda_engine(backends.Emulated(emulation_library), model, monkeypatch, **options)
    reference = engine_on(load_kernels("cpu"), model, **options)
    assert engine.kernels.backend.latents.packed
    for length in (1, 2, 3):
        got, want = logits_of(engine.runner, [0, 1], length), logits_of(reference.runner, [0, 1], length)
        assert (got - want).norm() < 2e-2 * want.norm()
    works = some_works(spec.vocab_size, 2, 6)
    assert all(len(tokens) >= 6 for tokens in answers(engine, works).values())


@pytest.mark.parametrize("op, kernel", [("append_latents", "append_latents"), ("absorb", "absorb"), ("by_head", "by_head"), ("paged_attention", "latent_attention")])
def test_wrong_kernels_of_latents_give_way(emulation_library, nanochat_fixtures, monkeypatch, caplog, op, kernel):
    """A kernel that is wrong is named, and torch computes its op with the same answers, in graphs."""
    def refuse(*arguments, **options):
        raise RuntimeError("CUDA: no kernel image is available for execution on the device")

    model = latent_model("youtu", nanochat_fixtures)
    works = some_works(model[0].vocab_size, 3, 6)[::2]
    expected = run(engine_on(load_kernels("cpu"), model), works)
    wrong = type("WrongOps", (backends.EmulatedOps,), {kernel: refuse})
    engine = cuda_engine(backends.Emulated(emulation_library, wrong, faults=[op]), model, monkeypatch, max_batch=2, max_rows=2)
    assert f"decode_core's {op} on cpu: raises RuntimeError: CUDA: no kernel image" in caplog.text
    same_answers(expected, answers(engine, works))
    assert engine.runner.queue.replays > 3


def test_long_prompts_are_attended_in_parts(emulation_library, monkeypatch):
    """With the scores of a few tokens at once, and products of more rows than a kernel takes."""
    backend = backends.Emulated(emulation_library).backend(family_spec("deepseek3"))
    for scratch in (1 << 26, 700):
        monkeypatch.setattr(cuda_latents, "SCRATCH", scratch)
        assert proof.prove_latent_prompts(backend, torch.device("cpu")) == ""
    attn = backend.latents.attn
    x = torch.randn(cuda_latents.FEW_ROWS + 5, attn.heads * attn.kept, generator=dice(1))
    up = torch.randn(attn.heads * attn.head_values, attn.kept, generator=dice(2))
    got, want = (torch.empty(len(x), attn.heads * attn.head_values) for _ in range(2))
    backend.latents.by_head(x, up, got)
    by_head_reference(x, up, want)
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


# --- what is refused ---------------------------------------------------------------------------------------------


def attention_arguments():
    return dict(q=torch.zeros(1, 2, 64), pages=torch.zeros(3, 16, 64), block_table=torch.zeros(1, 1, dtype=torch.int32),
                lengths=torch.ones(1, dtype=torch.int32), states=torch.zeros(9999), tickets=torch.zeros(9, dtype=torch.int32), out=torch.zeros(1, 64))


def append_arguments():
    return dict(x=torch.zeros(2, 64), weight=torch.ones(32), cos=torch.zeros(9, 16), sin=torch.zeros(9, 16), positions=torch.zeros(2, dtype=torch.int64),
                slots=torch.zeros(2, dtype=torch.int64), pages=torch.zeros(3, 16, 64))


def absorb_arguments():
    return dict(x=torch.zeros(2, 2 * 40), blocks=torch.zeros(2 * 16, 32, dtype=torch.uint8), cos=torch.zeros(9, 16), sin=torch.zeros(9, 16),
                positions=torch.zeros(2, dtype=torch.int64), out=torch.zeros(2, 2 * 48), kind="float32", kept=16, plain=8)


def by_head_arguments():
    return dict(x=torch.zeros(2, 2 * 32), blocks=torch.zeros(2 * 16, 34, dtype=torch.uint8), out=torch.zeros(2, 2 * 16), kind="q8_0", columns=32)


ARGUMENTS = {"latent_attention": attention_arguments, "append_latents": append_arguments, "absorb": absorb_arguments, "by_head": by_head_arguments}


@pytest.mark.parametrize("op, wrong, message", [
    ("latent_attention", dict(pages=torch.zeros(3, 16, 72)), "pages: must be .P, 16, D., D a multiple of 16 up to 576"),
    ("latent_attention", dict(pages=torch.zeros(3, 16, 64, dtype=torch.int8)), "pages: must be float32 or float16 or bfloat16"),
    ("latent_attention", dict(pages=torch.zeros(3 * 16 * 64 + 1)[1:].view(3, 16, 64)), "pages: pages and slots must start at multiples of 16"),
    ("latent_attention", dict(q=torch.zeros(1, 2, 80)), "q: must have shape"), ("latent_attention", dict(out=torch.zeros(1, 48)), "out: must have a multiple"),
    ("latent_attention", dict(out=torch.zeros(1, 160)), "out: must have a multiple"), ("latent_attention", dict(states=torch.zeros(9)), "states: needs"),
    ("latent_attention", dict(window=-1), "window: must be"), ("latent_attention", dict(block_table=torch.zeros(1, 0, dtype=torch.int32)), "block_table"),
    ("append_latents", dict(weight=torch.ones(48)), "weight: must have 32 numbers beside 32 that turn, not 48"),
    ("append_latents", dict(x=torch.zeros(2, 80)), "x: must have shape"), ("append_latents", dict(slots=torch.zeros(3, dtype=torch.int64)), "slots"),
    ("append_latents", dict(sin=torch.zeros(9, 8)), "sin"), ("append_latents", dict(positions=torch.zeros(2)), "positions: must be int64"),
    ("absorb", dict(x=torch.zeros(2, 81)), "x: must have a multiple of 40 columns"), ("absorb", dict(blocks=torch.zeros(30, 32, dtype=torch.uint8)), "blocks: must be 2"),
    ("absorb", dict(out=torch.zeros(2, 90)), "out"), ("absorb", dict(kind="q9"), "kind"), ("absorb", dict(plain=7), "x: must have a multiple of 39"),
    ("by_head", dict(x=torch.zeros(2 * 64 + 1)[1:].view(2, 64)), "x: rows and heads must start at multiples of 16 bytes"),
    ("by_head", dict(blocks=torch.zeros(33, 34, dtype=torch.uint8)), "blocks: must be 2 matrices of as many rows"), ("by_head", dict(out=torch.zeros(2, 31)), "out")])
def test_wrong_arguments_of_latents_are_named(emulation_library, op, wrong, message):
    ops = backends.Emulated(emulation_library).ops
    getattr(ops, op)(**ARGUMENTS[op](), stream=0)
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(**ARGUMENTS[op]() | wrong, stream=0)
