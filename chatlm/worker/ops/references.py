"""Every reference by the name of its op.

Importing this module imports torch, so only what computes with tensors does."""

from chatlm.worker.ops.attention import (
    attend, attend_prompt, decode_rows, mean_squares_reference, norm_heads_reference, norm_qk_reference,
    page_table, paged_attention_reference, plan_attention_reference, rope_append_reference,
    scale_rows_reference,
    text_attention_reference)
from chatlm.worker.ops.basic import (
    adapter_products, backout_reference, clamp_reference, copy_reference, embed_reference,
    experts_reference, fastest_dtype,
    finish_linear, gate_input_reference, gated_add_reference, gather_rows_reference, layer_inputs_reference,
    layer_norm_reference, linear_reference, look_up_reference, make_cache_reference, mix_reference,
    pack_reference, pause_reference, pausing, rms_norm_reference, routes, sigmoid_routes, smear_reference,
    softcap_reference)
from chatlm.worker.ops.latent import absorb_reference, append_latents_reference, by_head_reference
from chatlm.worker.ops.mixers import (
    OneEach, delta_rule_reference, gate_reference, group_squares_reference, mamba2_reference,
    norm_groups_reference, short_conv_reference, split_gates_reference)
from chatlm.worker.ops.sampling import sample_on_host
from chatlm.worker.ops.tensors import TorchArrays, rope_tables, tensor_of, zeroed

REFERENCES = {
    "embed": embed_reference,
    "gather_rows": gather_rows_reference,
    "rms_norm": rms_norm_reference,
    "layer_norm": layer_norm_reference,
    "pack": pack_reference,
    "linear": linear_reference,
    "experts": experts_reference,
    "copy": copy_reference,
    "mix": mix_reference,
    "gated_add": gated_add_reference,
    "look_up": look_up_reference,
    "layer_inputs": layer_inputs_reference,
    "gate_input": gate_input_reference,
    "smear": smear_reference,
    "backout": backout_reference,
    "softcap": softcap_reference,
    "make_cache": make_cache_reference,
    "pause": pause_reference,
    "mean_squares": mean_squares_reference,
    "norm_qk": norm_qk_reference,
    "norm_heads": norm_heads_reference,
    "scale_rows": scale_rows_reference, "clamp": clamp_reference,
    "rope_append": rope_append_reference,
    "plan_attention": plan_attention_reference,
    "paged_attention": paged_attention_reference,
    "text_attention": text_attention_reference,
    "absorb": absorb_reference,
    "append_latents": append_latents_reference,
    "by_head": by_head_reference,
    "short_conv": short_conv_reference,
    "delta_rule": delta_rule_reference,
    "mamba2": mamba2_reference,
    "group_squares": group_squares_reference,
    "norm_groups": norm_groups_reference,
    "split_gates": split_gates_reference,
    "gate": gate_reference,
    "sample": sample_on_host}
