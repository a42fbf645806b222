"""Checks what a model's files state about its weights: types, rotary scaling, a tied head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TYPE_CHECKING

import numpy

from chatlm.worker.arrays.gguf_types import block_of
from chatlm.worker.doctor.findings import Findings, error, examples, note, warning
from chatlm.worker.doctor.tensor_statistics import rows_of
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.weights.families.table import FAMILIES
from chatlm.worker.weights.formats.configs import TIED

if TYPE_CHECKING:
    from chatlm.worker.doctor.examined_model import ExaminedModel
    from chatlm.worker.model.blocks.model import Model

FEW_BITS = 3.0  # of a weight: Q2_K, the types IQ2 and IQ1, ternary ones
OF_TRAINING = ("Q1_0", "Q2_0", "Q2_0_G128", "TQ1_0", "TQ2_0")  # types that only models trained for them bear


def check_types(examined: ExaminedModel) -> Findings:
    """Find tensors in a type that is known to make a model worse."""
    bits = {}  # of a weight, by tensor
    for name, tensor in examined.gguf[1].items():
        block, size = block_of(tensor.tensor_type.name)
        bits[name] = 8 * size / block
    kinds = {name: tensor.tensor_type.name for name, tensor in examined.gguf[1].items()}
    head = "output.weight" if "output.weight" in bits else "token_embd.weight"
    if examined.floats.architecture.of_texts:
        head = ""
    trained = trained_for(examined.gguf[1])
    if trained:
        yield note(f"the matrices of the layers are of type {trained}: only a model that was trained for so "
                   "few bits answers well; one that was quantized to them afterwards does not",
                   advice="if its makers do not say that it was trained so, compare it with the original: "
                          "check MODEL --against ORIGINAL")
    if bits.get(head, 16) < FEW_BITS and kinds[head] not in trained.split(", "):
        also = " (it is the embedding too)" if head == "token_embd.weight" else ""
        yield warning(f"the head {head}{also} is of type {kinds[head]}, {bits[head]:.2g} bits a weight: this "
                      "costs more than any other matrix", where=head,
                      advice="quantize again with the head as Q6_K, the usual type")
    routers = [name for name in bits if ".ffn_gate_inp" in name and bits[name] < 16]
    if routers:
        yield warning(f"the routers of experts are quantized ({examples(routers)}, {kinds[routers[0]]}): "
                      "rounding chooses other experts", where=routers[0],
                      advice="quantize again with the routers as F32, the usual type")


def trained_for(stored: Mapping[str, Any]) -> str:
    """The types of the layers' matrices, if all are such as only training gives; "" else."""
    kinds = {tensor.tensor_type.name for name, tensor in stored.items()
             if name.startswith("blk.") and len(tensor.shape) > 1 and ".ffn_gate_inp" not in name}
    return ", ".join(sorted(kinds)) if kinds and kinds <= set(OF_TRAINING) else ""


def check_rope(examined: ExaminedModel) -> Findings:
    """Compare rotary scaling with the context."""
    scaling = stated_scaling(examined)
    context = examined.model.context_length
    kind, factor, original = (scaling.get(key) for key in ("type", "factor", "original"))
    own = examined.settings.context_length
    if factor and original and not own and kind in ("yarn", "linear", "llama3"):
        reach = int(factor * original)
        if kind != "llama3" and context > 1.01 * max(reach, original):
            yield warning(f"the context is {context:,} tokens, but rotary scaling ({kind}, {factor:g} times "
                          f"{original:,}) reaches only {reach:,}", where=scaling["where"],
                          advice=f"serve it with --context-length {reach}, or correct the file",
                          context=context, reach=reach)
    if kind in ("yarn", "linear") and factor is not None and factor < 1:
        yield warning(f"rotary scaling ({kind}) has the factor {factor:g}, which shortens the context",
                      where=scaling["where"], advice="correct the file: a factor is at least 1")
    made = examined.model.architecture
    if kind in ("", "none", "default", None) and not any(made.windows):
        if (turn := longest_turn(made)) and context > turn:
            base = made.attentions[0].rope.base
            yield warning(f"the context is {context:,} tokens, but with a rotary base of {base:,.0f} and no "
                          f"scaling the slowest pair has turned around after {turn:,}", where="rope_theta",
                          context=context,
                          advice="take the base or the scaling from the original's config.json")


def longest_turn(model: Model) -> int:
    """After how many tokens the slowest rotary pair has turned around; 0 if there is none, or heads are so
    small that this is no sign."""
    ropes = [attn.rope for attn in model.attentions]
    learned = isinstance(model.input, Input) and model.input.positions
    if not ropes or min(rope.size for rope in ropes) < 64 or model.has_rope_factors or learned:
        return 0
    return int(max(2 * math.pi * rope.base ** ((rope.size - 2) / rope.size) for rope in ropes))


def stated_scaling(examined: ExaminedModel) -> dict[str, Any]:
    """The type, factor and original context of rotary scaling, as the files state them."""
    if examined.kind == "gguf":
        own = f"{examined.metadata.get('general.architecture')}.rope.scaling."
        value = examined.metadata.get
        return {"type": value(f"{own}type"), "factor": value(f"{own}factor"), "where": f"{own}factor",
                "original": value(f"{own}original_context_length")}
    config = examined.config
    config = config if isinstance(config.get("text_config"), Mapping) is False else config["text_config"]
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name)
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return {"type": "other" if rope else None, "where": name}
    return {"type": rope.get("rope_type", rope.get("type")), "factor": rope.get("factor"), "where": name,
            "original": rope.get("original_max_position_embeddings")}


SAMPLED = 192       # rows of a head that are looked for in the embedding
SAME = 0.9
OTHER = 0.5


def check_head(examined: ExaminedModel) -> Findings:
    """A head that is not the embedding although it should be, or the embedding in another order."""
    model = examined.floats
    made = examined.floats.architecture
    if examined.kind == "hf" and not made.tied and not made.of_texts and says_tied(examined):
        name = FAMILIES[model.family].all_tensors["head"][0]
        yield error("config.json says that the head is the embedding (tie_word_embeddings), but the files "
                    f"have another {name}, which is used", where=name,
                    advice="set tie_word_embeddings to false if the model was trained so; if not, remove it")
    if "head" not in model.tensors or "embed" not in model.tensors or made.rows:
        return
    V = made.vocab_size
    chosen = numpy.sort(numpy.random.default_rng(0).permutation(V)[:SAMPLED])
    head = numpy.concatenate([unit(rows_of(model, "head", range(row, row + 1))) for row in chosen.tolist()])
    best = numpy.full(len(chosen), -2.0)
    at = numpy.zeros(len(chosen), int)
    own = numpy.zeros(len(chosen))
    step = max(1, (1 << 22) // made.width)
    for begin in range(0, V, step):
        span = range(begin, min(begin + step, V))
        alike = head @ unit(rows_of(model, "embed", span)).T  # (chosen, rows)
        here = (chosen >= span.start) & (chosen < span.stop)
        own[here] = alike[here, chosen[here] - begin]
        alike[here, chosen[here] - begin] = -2.0
        found = alike.argmax(1)
        value = alike.max(1)
        at = numpy.where(value > best, begin + found, at)
        best = numpy.maximum(best, value)
    moved = (best > SAME) & (own < OTHER)
    if moved.mean() > 0.5:
        shift = numpy.unique((at - chosen)[moved])
        by = f", shifted by {shift[0]:+,}" if len(shift) == 1 else ""
        yield error(f"the head has the embedding's rows in another order{by}: the model answers with wrong "
                    "tokens", where="lm_head", advice="convert the model again, with a tied head")
    elif own.mean() > 0.999:
        yield note("the head equals the embedding, and takes its memory twice", where="lm_head")


def unit(rows: numpy.ndarray) -> numpy.ndarray:
    """Rows of length 1; those of zeros stay."""
    lengths = numpy.sqrt(numpy.square(rows).sum(1, keepdims=True))
    return rows / numpy.maximum(lengths, 1e-20)


def says_tied(examined: ExaminedModel) -> bool:
    """Whether config.json, or its part on the text model, says that the head is the embedding."""
    config = examined.json("config.json")
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    stated = [part[TIED] for part in parts if TIED in part]
    default = FAMILIES[examined.model.family].config.get(TIED, False)
    return any(stated) if stated else default
