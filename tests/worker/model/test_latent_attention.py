"""Latent attention (MLA): its arithmetic against heads' own keys and values."""

import pytest
import torch

from chatlm.worker.ops.attention import paged_attention_reference, plan_attention_reference
from chatlm.worker.ops.latent import absorb, append, by_head, turn
from engines import make_batch
from tiny_deepseek import KEPT, TURNED

pytestmark = pytest.mark.usefixtures("one_thread")
T, H, PLAIN, VALUE = 40, 4, 8, 12


def random(*shape, seed=[0]):
    seed[0] += 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed[0]))


@torch.inference_mode()     # as computed, since buffers for scores are kept
def test_queries_of_latents_and_latents_as_values_give_what_heads_own_keys_and_values_give():
    x, kv, weight = random(T, H * (PLAIN + TURNED)), random(T, KEPT + TURNED), 1 + random(KEPT) / 4
    k_up, v_up = random(H * KEPT, PLAIN) / 4, random(H * VALUE, KEPT) / 4
    angles, positions = random(64, TURNED // 2), torch.arange(T)
    cos, sin = angles.cos(), angles.sin()
    keys = torch.zeros(64, 1, KEPT + TURNED)
    cache = keys, keys[..., :KEPT]
    append(kv, weight, 1e-5, cos, sin, positions, positions, cache)
    q, seen, out = torch.empty(T, H * (KEPT + TURNED)), torch.empty(T, H * KEPT), torch.empty(T, H * VALUE)
    # paged_attention divides by the root of its keys' width, and scores by that of heads' own keys
    absorb(x, k_up, cos, sin, positions, ((KEPT + TURNED) / (PLAIN + TURNED))**0.5, q)
    plan = plan_attention_reference(make_batch((list(range(T)), 0, T, [0, 1, 2])), positions, {0}, "float32")
    paged_attention_reference(q, cache, plan, 0, seen)
    by_head(seen, v_up, out)

    latent = torch.nn.functional.rms_norm(kv[:, :KEPT], (KEPT,), weight, 1e-5)
    rotated = turn(kv[:, None, KEPT:], cos, sin, positions).expand(-1, H, -1)
    own_keys = torch.cat((torch.einsum("tc,hcd->thd", latent, k_up.view(H, KEPT, PLAIN)), rotated), 2)
    own_values = torch.einsum("tc,hvc->thv", latent, v_up.view(H, VALUE, KEPT))
    heads = x.unflatten(1, (H, -1))
    queries = torch.cat((heads[..., :PLAIN], turn(heads[..., PLAIN:], cos, sin, positions)), 2)
    expected = torch.nn.functional.scaled_dot_product_attention(*(part.transpose(0, 1) for part in (queries, own_keys, own_values)), is_causal=True)
    assert (out - expected.transpose(0, 1).flatten(1)).abs().max() < 1e-5
    assert torch.equal(keys[:T, 0, :KEPT], latent)
