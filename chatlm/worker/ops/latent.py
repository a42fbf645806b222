"""Reference ops of attention over one compressed vector for each token (MLA): see the block Mla.

The cached key of a token is its latent, `kept` numbers, and then `turned` numbers that turn by its position.
The value is the latent alone. All H query heads read the same keys and values."""

from __future__ import annotations

import torch

from chatlm.worker.ops.attention import rotate, slots_of
from chatlm.worker.ops.packed_kv import PackedKv, turned as turned_parts


def absorb_reference(x, k_up, cos, sin, positions, scale, cache, out, adjacent=False):
    """Turn queries for heads' keys into queries for latents, times `scale` -> out (T, H * (kept + turned)).

    x           (T, H * (plain + turned)): for each head the numbers that do not turn, then those that do
    k_up        (H * kept, plain): a matrix for each head; its product with the plain numbers is the query for
                latents
    cache       of the layer; if it is packed, queries are turned like its keys
    The other numbers turn by the rows `positions` (T,) of cos and sin. adjacent: numbers that turn together
    are neighbours in x; in `out` they are half of those that turn apart, as keys have them."""
    keys = slots_of(cache)[0]
    plain = k_up.shape[1]
    turned = 2 * cos.shape[-1]
    heads = x.float().unflatten(1, (-1, plain + turned))  # (T, H, plain + turned)
    own = k_up.float().unflatten(0, (heads.shape[1], -1))  # (H, kept, plain)
    latent = torch.einsum("thd,hcd->thc", heads[..., :plain], own)
    rotated = turn(heads[..., plain:], cos, sin, positions, adjacent)
    queries = scale * torch.cat((latent, rotated), 2)
    if isinstance(keys, PackedKv):
        queries = turned_parts(queries, keys.parts)
    out.copy_(queries.flatten(1))


def append_latents_reference(x, weight, eps, cos, sin, positions, slots, cache, adjacent=False):
    """x (T, kept + turned) -> the keys of the cache at `slots` (T,).

    The first numbers get an RMS norm, and the others turn, of which absorb_reference tells."""
    keys = slots_of(cache)[0]  # (slots, 1, kept + turned)
    kept = len(weight)
    latent = torch.nn.functional.rms_norm(x[:, None, :kept].float(), (kept,), weight, eps)
    rotated = turn(x[:, None, kept:].float(), cos, sin, positions, adjacent)
    rows = torch.cat((latent, rotated), 2)
    if isinstance(keys, PackedKv):
        keys.put(slots, rows)
    else:
        keys.index_copy_(0, slots, rows.to(keys.dtype))


def by_head_reference(x, up, out):
    """Turn what attention gives, weighted latents, into values of heads: x (T, H * kept) -> out (T, H * Dv).

    up: (H * Dv, kept), the rows of each head one after another."""
    heads = x.float().unflatten(1, (-1, up.shape[1]))
    own = up.float().unflatten(0, (heads.shape[1], -1))  # (H, Dv, kept)
    out.copy_(torch.einsum("thc,hvc->thv", heads, own).flatten(1))


def turn(x, cos, sin, positions, adjacent=False):
    """x (T, heads, turned) turned by the rows `positions` (T,) of cos and sin (max_positions, turned / 2)."""
    x = torch.cat((x[..., 0::2], x[..., 1::2]), -1) if adjacent else x.clone()
    rotate(x, *(torch.index_select(table, 0, positions).unsqueeze(1) for table in (cos, sin)))
    return x
