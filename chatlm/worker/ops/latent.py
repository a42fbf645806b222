"""Reference ops of attention over one compressed vector for each token (MLA, see Mla).

A token's cached key is its latent, `kept` numbers, and then `turned` numbers that turn by its position; the
value is the latent alone. All H query heads read the same."""

from __future__ import annotations

import torch

from chatlm.worker.ops.attention import rotate, slots_of


def absorb(x, k_up, cos, sin, positions, scale, out):
    """Queries of heads' own keys -> queries of latents, times `scale`.

    x (T, H * (plain + turned)) has for each head the numbers that do not turn, then those that do. k_up
    (H * kept, plain) has each head's matrix, whose product with the first is the query of a latent. The
    others turn by the rows `positions` (T,) of cos and sin -> out (T, H * (kept + turned))."""
    plain = k_up.shape[1]
    turned = 2 * cos.shape[-1]
    heads = x.float().unflatten(1, (-1, plain + turned))  # (T, H, plain + turned)
    own = k_up.float().unflatten(0, (heads.shape[1], -1))  # (H, kept, plain)
    latent = torch.einsum("thd,hcd->thc", heads[..., :plain], own)
    rotated = turn(heads[..., plain:], cos, sin, positions)
    out.copy_(scale * torch.cat((latent, rotated), 2).flatten(1))


def append(x, weight, eps, cos, sin, positions, slots, cache):
    """x (T, kept + turned): RMS norm of the first numbers, the others turn -> the keys of the cache at
    `slots` (T,)."""
    # (slots, 1, kept + turned)
    keys = slots_of(cache)[0]
    kept = len(weight)
    assert isinstance(keys, torch.Tensor)  # no packed type has this size
    latent = torch.nn.functional.rms_norm(x[:, None, :kept].float(), (kept,), weight, eps)
    rotated = turn(x[:, None, kept:].float(), cos, sin, positions)
    keys.index_copy_(0, slots, torch.cat((latent, rotated), 2).to(keys.dtype))


def by_head(x, v_up, out):
    """What attention found of latents -> each head's values: x (T, H * kept), v_up (H * Dv, kept) with each
    head's rows -> out (T, H * Dv)."""
    heads = x.float().unflatten(1, (-1, v_up.shape[1]))
    own = v_up.float().unflatten(0, (heads.shape[1], -1))  # (H, Dv, kept)
    out.copy_(torch.einsum("thc,hvc->thv", heads, own).flatten(1))


def turn(x, cos, sin, positions):
    """x (T, heads, turned) turned by the rows `positions` (T,) of cos and sin (max_positions, turned / 2)."""
    x = x.clone()
    rotate(x, *(torch.index_select(table, 0, positions).unsqueeze(1) for table in (cos, sin)))
    return x
