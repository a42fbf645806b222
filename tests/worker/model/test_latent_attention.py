"""Latent attention (MLA): its arithmetic against heads' own keys and values, and a tiny DeepSeek-V3 of blocks against transformers."""

import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch

from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.kernels.limits import not_compiled
from chatlm.worker.model.tensors import Cut
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.ops.attention import paged_attention_reference, plan_attention_reference
from chatlm.worker.ops.latent import absorb_reference, append_latents_reference, by_head_reference, turn
from called_ops import exact_adapter
from engines import forward_logits, make_batch
from tiny_deepseek import KEPT, LAYERS, TURNED, VOCABULARY, deepseek_blocks, deepseek_tensors, tiny_deepseek

pytestmark = pytest.mark.usefixtures("one_thread")
T, H, PLAIN, VALUE = 40, 4, 8, 12


def random(*shape, seed=[0]):
    seed[0] += 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed[0]))


@torch.inference_mode()     # as computed, since buffers for scores are kept
def test_latents_give_what_heads_own_keys_give():
    """Queries of latents and latents as values give what heads own keys and values give."""
    x, kv, weight = random(T, H * (PLAIN + TURNED)), random(T, KEPT + TURNED), 1 + random(KEPT) / 4
    k_up, v_up = random(H * KEPT, PLAIN) / 4, random(H * VALUE, KEPT) / 4
    angles, positions = random(64, TURNED // 2), torch.arange(T)
    cos, sin = angles.cos(), angles.sin()
    keys = torch.zeros(64, 1, KEPT + TURNED)
    cache = keys, keys[..., :KEPT]
    append_latents_reference(kv, weight, 1e-5, cos, sin, positions, positions, cache)
    q, seen, out = torch.empty(T, H * (KEPT + TURNED)), torch.empty(T, H * KEPT), torch.empty(T, H * VALUE)
    # paged_attention divides by the root of its keys' width, and scores by that of heads' own keys
    absorb_reference(x, k_up, cos, sin, positions, ((KEPT + TURNED) / (PLAIN + TURNED))**0.5, cache, q)
    plan = plan_attention_reference(make_batch((list(range(T)), 0, T, [0, 1, 2])), positions, {0}, "float32")
    paged_attention_reference(q, cache, plan, 0, seen)
    by_head_reference(seen, v_up, out)

    latent = torch.nn.functional.rms_norm(kv[:, :KEPT], (KEPT,), weight, 1e-5)
    rotated = turn(kv[:, None, KEPT:], cos, sin, positions).expand(-1, H, -1)
    own_keys = torch.cat((torch.einsum("tc,hcd->thd", latent, k_up.view(H, KEPT, PLAIN)), rotated), 2)
    own_values = torch.einsum("tc,hvc->thv", latent, v_up.view(H, VALUE, KEPT))
    heads = x.unflatten(1, (H, -1))
    queries = torch.cat((heads[..., :PLAIN], turn(heads[..., PLAIN:], cos, sin, positions)), 2)
    expected = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(0, 1) for part in (queries, own_keys, own_values)), is_causal=True)
    assert (out - expected.transpose(0, 1).flatten(1)).abs().max() < 1e-5
    assert torch.equal(keys[:T, 0, :KEPT], latent)


IDS = [7 * place % VOCABULARY for place in range(40)]
PAGES = [5, 9, 1], [2, 7, 3]


def transformer_of(model, tensors, **ops):
    kernels = dataclasses.replace(load_kernels("cpu", model, max_tokens=64, max_rows=8), **ops)
    assert kernels.backend.name == "torch/reference"
    return Transformer(model, dict(tensors), kernels, num_pages=12, max_tokens=64, max_rows=8, dtype="float32")


def expected(theirs, ids=IDS):
    with torch.no_grad():
        return theirs(torch.tensor([ids])).logits[0]


def close(found, logits):
    return (found - logits).abs().max() < 1e-4 * logits.abs().max()


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"rope_interleave": False}, {"first_k_dense_replace": 3}], ids=["V3", "queries of x", "half-split pairs", "dense"])
def test_a_tiny_deepseek_v3_matches_transformers(changes):
    """A tiny DeepSeek v3 has the logits of transformers whether tokens are cached or not."""
    theirs = tiny_deepseek(**changes)
    model, tensors = deepseek_blocks(theirs.config), deepseek_tensors(theirs)
    assert {name: tensor.shape for name, tensor in tensors.items()} == model.shapes()
    ours, want, other = transformer_of(model, tensors), expected(theirs), IDS[::-1]
    assert ours.layer_caches[0][0].shape[1:] == (1, KEPT + TURNED)      # numbers that a token caches in a layer
    assert close(forward_logits(ours, make_batch((IDS, 0, 20, PAGES[0])))[0], want[19])
    assert close(forward_logits(ours, make_batch((IDS, 20, 17, PAGES[0])))[0], want[36])
    found = forward_logits(ours, make_batch((IDS, 37, 1, PAGES[0]), (other, 0, 9, PAGES[1])))
    assert close(found[0], want[37]) and close(found[1], expected(theirs, other)[8])
    found = forward_logits(ours, make_batch((IDS, 38, 1, PAGES[0]), (other, 9, 1, PAGES[1])))
    assert close(found[0], want[38]) and close(found[1], expected(theirs, other)[9])


def test_ranks_and_stages_of_a_deepseek_v3_agree():
    """Two ranks of a tiny DeepSeek v3 and two stages compute it together."""
    theirs = tiny_deepseek()
    model, tensors, want = deepseek_blocks(theirs.config), deepseek_tensors(theirs), expected(theirs)
    meet, shared = threading.Barrier(2), [None, None]

    def all_reduce(rank, x, out, residual=None):
        shared[rank] = x.clone()
        meet.wait(30)
        total = shared[0] + shared[1]
        meet.wait(30)
        out.copy_(total if residual is None else total + residual)

    def all_gather(rank, x, out):
        shared[rank] = x.clone()
        meet.wait(30)
        out.copy_(torch.cat(shared, 1)[:, :out.shape[1]])
        meet.wait(30)

    def compute(rank):
        own, parts = model.of_rank(rank, 2)
        cut = {name: part_of(tensor, own.shapes()[name], parts[name]) for name, tensor in tensors.items()}
        joined = transformer_of(own, cut, all_reduce=functools.partial(all_reduce, rank), all_gather=functools.partial(all_gather, rank))
        forward_logits(joined, make_batch((IDS, 0, 37, PAGES[0])))
        return forward_logits(joined, make_batch((IDS, 37, 1, PAGES[0])))[0]

    with ThreadPoolExecutor(2) as pool:
        assert all(close(found, want[37]) for found in pool.map(compute, range(2)))

    first, second = (transformer_of(model.of_layers(mine), of_stage(tensors, mine)) for mine in (range(2), range(2, LAYERS)))
    for begin, count in ((0, 37), (37, 1)):
        batch = make_batch((IDS, begin, count, PAGES[0]))
        first.forward(batch._replace(logit_rows=[]))
        second.arrays.put(first.arrays.numpy(first.buffers["x"]), second.buffers["x"])
        assert close(forward_logits(second, batch)[0], want[begin + count - 1])


def part_of(tensor, shape, part):
    """What a rank has of it."""
    if not part.ranges:
        return tensor
    return numpy.concatenate([piece for _, piece in Cut(tensor.shape, shape, part.axis, part.ranges).apply([tensor])])


def of_stage(tensors, mine):
    own = {f"{int(layer) - mine.start}.{part}": tensor for name, tensor in tensors.items() for layer, dot, part in [name.partition(".")]
           if dot and int(layer) in mine}
    ends = {"embed": tensors["embed"]} if mine.start == 0 else {name: tensors[name] for name in ("head", "final_norm")}
    return own | ends | {"final_norm": tensors["final_norm"]}


def test_decode_core_says_what_it_does_not_compute():
    """Sizes that are no multiples of 16 and larger latents are left to torch; a GPU takes the other sizes as they are."""
    model = deepseek_blocks(tiny_deepseek(**{"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 32}).config)
    mla = model.layers[0].mixer
    assert not_compiled(model) == not_compiled(model, "cuda") == ""
    for changes, on_gpu in ((dict(plain=8), False), (dict(turned=8), True), (dict(head_values=12), False), (dict(query_width=24), False),
                            (dict(kept=576), True), (dict(kept=528, turned=48), True)):
        layers = tuple(dataclasses.replace(layer, mixer=dataclasses.replace(mla, **changes)) for layer in model.layers)
        changed = dataclasses.replace(model, layers=layers)
        assert (not_compiled(changed) == "latent attention of these sizes") is (changes != dict(kept=528, turned=48))
        assert not_compiled(changed, "cuda") == ("latent attention of these sizes on a GPU" if on_gpu else "")


def test_an_adapter_changes_all_of_latent_attention():
    """An adapter changes every product of latent attention that it may."""
    theirs = tiny_deepseek()
    model, tensors = deepseek_blocks(theirs.config), deepseek_tensors(theirs)
    adapter = exact_adapter(model)
    assert {"0.queries_in", "0.queries_up", "0.kv_in", "0.output"} <= {*adapter}
    merged = {name: tensor + (adapter[name].b * adapter[name].scales) @ adapter[name].a if name in adapter else tensor for name, tensor in tensors.items()}
    beside, whole = transformer_of(model, tensors), transformer_of(model, merged)
    beside.pack_adapter(1, adapter)
    batch = make_batch((IDS, 0, 37, PAGES[0]))
    assert close(forward_logits(beside, batch._replace(adapters=[1])), forward_logits(whole, batch))
    assert not close(forward_logits(beside, batch._replace(adapters=[0])), forward_logits(whole, batch))
