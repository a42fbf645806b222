"""`--against ORIGINAL`: what a model has lost against the one that it was made from, on a built-in text.

Three looks, from the cheapest: what the files state about the arithmetic, how far each tensor is from the
original's, and what both predict for each token of the text, also with the original's tensors of one kind, or
with one of them alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence as Seq
from dataclasses import replace
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

from chatlm.common.memory import available_memory
from chatlm.worker.arrays.kinds import floats
from chatlm.worker.doctor.findings import Findings, error, examples, note, warning
from chatlm.worker.doctor.tensor_statistics import head_rows, joined_parts
from chatlm.worker.doctor.running import ready, row_bytes, step
from chatlm.worker.doctor.sample_text import TEXT
from chatlm.worker.model.tensors import Cut, MappedRows
from chatlm.worker.weights.differences import differences
from chatlm.worker.weights.load import open_model
from chatlm.worker.weights.loaded.sizes import weight_bytes

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.worker.doctor.examined_model import ExaminedModel
    from chatlm.worker.model.blocks.model import Model
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.weights.loaded.model import LoadedModel

CHUNK = 128            # tokens in a step
TEXT_TOKENS = 1024     # of the text
FEWER = 3 * CHUNK      # tokens for trying tensors of one kind
SKIPPED = 8            # the first tokens, which no context precedes
KINDS_S = 90.0         # seconds for trying the original's tensors, one kind after the other
TENSORS_S = 45.0       # and for trying them one by one
NAMED_TENSORS = 6      # on a terminal; --json has all
# nats: a usual 4-bit file of a model of 135 million weights has 0.08
MOST_KL = 0.3
BROKEN_KL = 1.5
FAR = 0.5              # of a tensor from its original, relative to its length; 2 bits: up to 0.4
KINDS = {"embedding and head": ("embed", "head", "layer_embed", "value_embed"),
         "attention": ("qkv", "mix_in"), "attention output": ("output", "mix_out"),
         "feed-forward up": ("gate_up", "up", "expert_gate_up", "expert_up", "shared_gate_up", "shared_up"),
         "feed-forward down": ("down", "expert_down", "shared_down")}


def check_against(examined: ExaminedModel) -> Findings:
    original = examined.original
    assert original is not None
    if examined.tokenizer.encode(TEXT) != original.tokenizer.encode(TEXT):
        yield error("the original has another vocabulary: the same text becomes other tokens, so the two "
                    "cannot be compared", where=original.source.name,
                    advice="give the model that this one was made from")
        return
    yield from other_arithmetic(examined.model, original.model)
    if shapes_of(examined.model.architecture) != shapes_of(original.model.architecture):
        yield error("the original's tensors have other shapes, so the two cannot be compared",
                    where=original.source.name, advice="give the model that this one was made from")
        return
    far = distances(examined.floats, original.floats)
    yield from strange_distances(far) if far else ()
    if examined.model.architecture.of_texts or examined.model.head.size or examined.model.ranking is not None:
        return
    needed = max(memory_of(examined), memory_of(original))
    free = available_memory()
    if needed > free:
        yield note(f"what they predict was not compared: that takes {needed / 1e9:,.1f} GB, and "
                   f"{free / 1e9:,.1f} GB are free")
        return
    yield from predictions(examined, original, far)


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """The shapes of all matrices but those of the vocabulary, which may be padded, or shared as embedding and
    head."""
    return {name: shape for name, shape in model.shapes().items()
            if name not in ("head", "embed", "head_bias")}


def other_arithmetic(own: LoadedModel, original: LoadedModel) -> Findings:
    """The settings of the arithmetic about which the files of the two models disagree."""
    for name, ours, theirs in differences(own.spec, original.spec):
        yield error(f"{name} is {ours}; the original's is {theirs}", where=name,
                    advice="correct the file, or convert the original again")
    if own.context_length != original.context_length:
        yield note(f"the context is {own.context_length:,} tokens, the original's "
                   f"{original.context_length:,}")


def reordered(own: LoadedModel, original: LoadedModel, name: str) -> bool:
    """Whether the original has a tensor's rows or columns in another order, because its format does."""
    layer, _, part = name.rpartition(".")
    if not part.startswith("mix_"):
        return False
    ours, theirs = (model.architecture.layers[int(layer)].mixer for model in (own, original))
    return ours != theirs


def distances(own: LoadedModel, original: LoadedModel) -> dict[str, float]:
    """For each matrix, the length of its difference from the original, relative to the length of the
    original."""
    found = {}
    for name, tensor in own.tensors.items():
        other = original.tensors.get(name)
        if other is None or isinstance(tensor, MappedRows) or isinstance(other, MappedRows) or len(
                tensor.cut.full) < 2 or reordered(own, original, name):
            continue
        rows = min(tensor.cut.full[0], other.cut.full[0])
        heads = head_rows(own)
        step = max((1 << 24) // tensor.cut.full[1] // heads, 1) * heads
        apart = 0.0
        length = 0.0
        for begin in range(0, rows, step):
            span = range(begin, min(begin + step, rows))
            ours, theirs = (floats(joined_parts(one.less(Cut(
                one.cut.full, (len(span), one.cut.full[1]), 0, [span])).read())) for one in (tensor, other))
            apart += float(numpy.square(ours - theirs).sum(dtype=numpy.float64))
            length += float(numpy.square(theirs).sum(dtype=numpy.float64))
        found[name] = math.sqrt(apart / length) if length else float(apart > 0)
    return found


def strange_distances(far: Mapping[str, float]) -> Findings:
    usual = float(numpy.median([*far.values()]))
    if usual > FAR:
        yield error(f"most tensors have nothing in common with the original's (half of them are at least "
                    f"{usual:.0%} of their length away)", advice="give the model that this one was made from")
        return
    strange = [name for name in sorted(far, key=lambda name: -far[name])
               if not far[name] <= max(FAR, 2 * usual)]
    for name in strange[:8]:
        yield error(f"{name} is {far[name]:.0%} of its length away from the original's; most are {usual:.1%}",
                    where=name, advice="convert or quantize the original again")
    if more := strange[8:]:
        yield error(f"so are {examples(more)}")
    largest = sorted(far, key=far.__getitem__, reverse=True)[:4]
    yield note("farthest from the original: " + ", ".join(f"{name} ({far[name]:.1%})" for name in largest)
               + f"; half are at most {usual:.1%}", distances={name: round(far[name], 4) for name in far})


class Compared(NamedTuple):
    """Two models on the text: mean KL from the original's predictions in nats, the share of positions where
    both think the same token likeliest, and both perplexities."""

    kl: float
    same: float
    perplexity: float
    of_original: float
    positions: int


def settings_for(settings: Settings) -> Settings:
    """With the arithmetic that is closest to exact, and steps of CHUNK rows."""
    return replace(settings, arithmetic="fine", max_batch=CHUNK, prefill_chunk=CHUNK, drafts="none")


def memory_of(examined: ExaminedModel) -> int:
    """The bytes of a model, its activations, and the original's predictions."""
    made = examined.model.architecture
    predicted = 2 * 4 * TEXT_TOKENS * made.vocab_size
    return weight_bytes(examined.model, examined.settings.quantize) + 2 * CHUNK * row_bytes(made) + predicted


def computed(examined: ExaminedModel, model: LoadedModel, shared: Mapping[str, Any] = {}) -> Transformer:
    return ready(model, settings_for(examined.settings), TEXT_TOKENS, shared)


def open_exactly(examined: ExaminedModel) -> LoadedModel:
    return open_model(examined.source, settings_for(examined.settings), "cpu")


def logits_of(transformer: Transformer, ids: Seq[int]) -> Iterator[numpy.ndarray]:
    """(n, V) float32 after each of n tokens, step by step."""
    for begin in range(0, len(ids), CHUNK):
        end = min(begin + CHUNK, len(ids))
        yield transformer.arrays.numpy(step(transformer, ids, begin, end, range(end - begin))).copy()


def log_shares(logits: numpy.ndarray) -> numpy.ndarray:
    logits = logits - logits.max(1, keepdims=True)
    return logits - numpy.log(numpy.exp(logits).sum(1, keepdims=True))


def compare(transformer: Transformer, judged: Seq[numpy.ndarray], ids: Seq[int]) -> Compared:
    """judged: the original's `log_shares`, step by step."""
    kl = list[float]()
    same = list[bool]()
    surprise = (list[float](), list[float]())
    for at, q, p in zip(range(0, len(ids), CHUNK), logits_of(transformer, ids[:-1]), judged):
        V = min(q.shape[1], p.shape[1])
        rows = slice(max(SKIPPED - at, 0), None)
        p = p[:len(q)][rows, :V]
        q = log_shares(q[rows, :V])
        # each token adds p log(p / q) - p + q, which is never negative
        shares = numpy.exp(p)
        kl += (shares * (p - q) - shares + numpy.exp(q)).sum(1).tolist()
        same += (p.argmax(1) == q.argmax(1)).tolist()
        target = numpy.array(ids[at + 1:at + 1 + CHUNK])[rows][:len(q)]
        for each, found in zip((q, p), surprise):
            found += (-each[numpy.arange(len(each)), target]).tolist()
    own, original = (math.exp(min(float(numpy.mean(found)), 700)) for found in surprise)
    return Compared(float(numpy.mean(kl)), float(numpy.mean(same)), own, original, len(kl))


def predictions(examined: ExaminedModel, original: ExaminedModel, far: Mapping[str, float]) -> Findings:
    ids = examined.tokenizer.encode(TEXT)[:min(TEXT_TOKENS, examined.model.context_length) - 1]
    if examined.text.add_bos and examined.text.bos_token is not None:
        ids = [examined.text.bos_token, *ids]
    began = time.monotonic()
    judged = []
    for logits in logits_of(computed(original, open_exactly(original)), ids[:-1]):
        judged.append(log_shares(logits))
    own = computed(examined, open_exactly(examined))
    whole = compare(own, judged, ids)
    facts = {"kl": round(whole.kl, 5), "top_1": round(whole.same, 4), "positions": whole.positions,
             "perplexity": round(whole.perplexity, 4), "perplexity_of_original": round(whole.of_original, 4)}
    words = (f"on {whole.positions:,} tokens of a built-in text: mean KL {whole.kl:.3g} nats, the likeliest "
             f"token is the same at {whole.same:.1%}, perplexity {whole.perplexity:,.2f} against "
             f"{whole.of_original:,.2f}")
    if not whole.kl <= BROKEN_KL:
        yield error(f"{words}: this is hardly the same model", advice="convert or quantize it again", **facts)
    elif whole.kl > MOST_KL:
        yield warning(f"{words}: much is lost", advice="take a type of more bits", **facts)
    else:
        yield note(words, **facts)
    if whole.kl > 1e-4:
        yield from kinds_that_cost(examined, original, own, judged, ids[:FEWER], far, began + KINDS_S)
        yield from tensors_that_cost(examined, original, own, judged, ids[:FEWER], far,
                                     time.monotonic() + TENSORS_S)


def kinds_that_cost(examined: ExaminedModel, original: ExaminedModel, own: Transformer,
                    judged: Seq[numpy.ndarray], ids: Seq[int], far: Mapping[str, float],
                    until: float) -> Findings:
    """How much smaller the KL becomes with the original's tensors of one kind, for each kind, on the
    beginning of the text."""
    regained = dict[str, float]()
    left = list[str]()
    base = compare(own, judged, ids).kl
    for kind, parts in KINDS.items():
        if all(far[name] < 1e-6 for name in far if name.rpartition(".")[2] in parts):
            continue  # they are the original's
        if time.monotonic() > until:
            left.append(kind)
        elif (kl := with_original(examined, original, own, judged, of_parts(parts), ids)) is not None:
            regained[kind] = (base - kl) / base
    if regained:
        costs = sorted(regained.items(), key=lambda pair: -pair[1])
        yield note(f"of this KL, on the first {len(ids):,} tokens, the original's tensors of one kind "
                   "regain: " + ", ".join(f"{kind} {share:.0%}" for kind, share in costs)
                   + (f"; there was no time for {examples(left)}" if left else ""),
                   regained={kind: round(share, 4) for kind, share in costs})


def tensors_that_cost(examined: ExaminedModel, original: ExaminedModel, own: Transformer,
                      judged: Seq[numpy.ndarray], ids: Seq[int], far: Mapping[str, float],
                      until: float) -> Findings:
    """How much smaller the KL becomes with the original's tensor in place of each that differs. Those that
    are farthest from the original's come first, as far as there is time."""
    base = compare(own, judged, ids).kl
    changed = sorted((name for name in far if far[name] >= 1e-6), key=lambda name: -far[name])
    regained = dict[str, float]()
    for name in changed:
        if time.monotonic() > until:
            break
        kl = with_original(examined, original, own, judged, name.__eq__, ids)
        if kl is not None:
            regained[name] = (base - kl) / base
    if len(regained) > 1:
        costs = sorted(regained.items(), key=lambda pair: -pair[1])
        tried = "" if len(regained) == len(changed) else f" ({len(regained)} of {len(changed)} were tried)"
        yield note("the original's tensor alone regains most for: " + ", ".join(
            f"{name} {share:.1%}" for name, share in costs[:NAMED_TENSORS]) + tried,
            regained_by_tensor={name: round(share, 5) for name, share in costs})


def of_parts(parts: Seq[str]) -> Callable[[str], bool]:
    return lambda name: name.rpartition(".")[2] in parts


def with_original(examined: ExaminedModel, original: ExaminedModel, own: Transformer,
                  judged: Seq[numpy.ndarray], is_replaced: Callable[[str], bool],
                  ids: Seq[int]) -> float | None:
    """The KL of the model with some of the original's tensors; None if it has none of them."""
    model = open_exactly(examined)
    other = open_exactly(original)
    names = [name for name in model.tensors if is_replaced(name) and name in other.tensors
             and not reordered(model, other, name)]
    if not names or {"embed", "head"} & {*names} and model.architecture.tied != other.architecture.tied:
        return None
    model.tensors = {name: other.tensors[name] if name in names else tensor
                     for name, tensor in model.tensors.items()}
    shared = {name: weight for name, weight in own.weights.items()
              if name not in names and not (name == "head" and model.architecture.tied)}
    return compare(computed(examined, model, shared), judged, ids).kl
