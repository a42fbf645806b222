"""Every dimension of every family at unpublished sizes: decode_core computes the model, or `not_compiled` says why torch does."""

import os
import random
import zlib

import pytest
import torch

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.worker.kernels import attention, cuda, program, tiles
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.kernels.limits import MOST_ON_CPU, MOST_ON_GPU, not_compiled
from chatlm.worker.model.tensors import MappedRows
from chatlm.worker.model.transformer import Transformer
from arrays import array_of, arrays_of, matrix_of
from engines import forward_logits, make_batch
from families import MODELS
from nightly import by_day
from tiny_specs import NO_SIZES, ODD, family_config, spec_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(decode_core() is None, reason="not built")]
SHARE = float(os.environ.get("DECODE_CORE_TEST_SHARE", "1"))
BEYOND = {"head_dim": 528, "experts": 1030, "experts_per_tok": 70, "top_k": 70, "attention_heads": 68}     # a part of a key -> beyond some kernel's limit


def odd_configs(name):
    """(the key that differs, a config) of a family, for all its integers and sizes, or by day for some."""
    config = family_config(name)
    dice = random.Random(zlib.crc32(name.encode()))
    for key, value in config.items():
        if type(value) is not int or key.endswith(NO_SIZES):
            continue
        sizes = ODD | {value + 1, 3 * value, *(size for part, size in BEYOND.items() if part in key)} - {value}
        for size in sorted(sizes):
            if dice.random() < max(SHARE, 0.15):
                yield f"{key} = {size}", config | {key: size}


def random_tensors(spec):
    dice = torch.Generator().manual_seed(1)
    found = {name: torch.randn(*shape, generator=dice) * 0.3 for name, shape in spec.shapes().items()}
    if "layer_embed" in found:
        found["layer_embed"] = MappedRows(array_of(found["layer_embed"]), "f32")
    return found


def odd_adapter(spec):
    """An adapter of all matrices that may have one, each of another rank."""
    dice, ranks = torch.Generator().manual_seed(2), iter([1, 3, 17, 33, 5] * 1000)
    shapes = {name: tensor.shape for name, tensor in spec.tensors().items() if tensor.adapted and "." in name}
    return {name: matrix_of(torch.randn(rank, K, generator=dice) * 0.2, torch.randn(N, rank, generator=dice) * 0.2, torch.full((rank,), 0.5))
            for (name, (N, K)), rank in zip(shapes.items(), ranks)}


def logits(spec, kernels, chunks, adapted):
    """Of the last of 20 tokens that come in such chunks."""
    model = Transformer(spec, arrays_of(random_tensors(spec)), kernels, num_pages=4, num_slots=4, max_tokens=24, max_rows=4, dtype="float32")
    if adapted:
        model.pack_adapter(1, odd_adapter(spec))
    ids, done = [7 * i % spec.vocab_size for i in range(20)], 0
    for count in chunks:
        found = forward_logits(model, make_batch((ids, done, count, [0, 1]))._replace(adapters=[int(adapted)]))
        done += count
    return found


DAILY = "gemma4", "qwen3.5moe", "granite4h", "gpt-oss"


@pytest.mark.parametrize("name", by_day(MODELS, *DAILY))
def test_odd_sizes_run_in_decode_core_or_torch(name, caplog):
    """Odd sizes are computed by decode_core or by torch, with a line in the log."""
    compiled = left = 0
    for what, config in odd_configs(name):
        try:
            spec = spec_of(config)
        except ConfigError:
            continue            # no such model exists
        caplog.clear()
        kernels = load_kernels("cpu", spec, max_tokens=24, max_rows=4)
        said = [line for line in caplog.messages if line.startswith("decode_core has no ") and line.endswith(": torch computes instead")]
        if not kernels.row_invariant:
            assert kernels.backend.name == "torch/reference" and said and not_compiled(spec) in said[0], what
            left += 1
        adapted = bool((compiled + left) % 2)
        whole = logits(spec, kernels, (20,), adapted)
        if kernels.row_invariant:
            assert not said, what
            apart, reference = logits(spec, load_kernels("cpu", spec, max_tokens=24, max_rows=4), (1, 18, 1), adapted), logits(
                spec, load_kernels("cpu"), (20,), adapted)
            assert torch.equal(whole, apart), what
            assert (whole - reference).abs().max() <= 1e-4 * max(1, reference.abs().max()), what
            compiled += 1
    assert compiled + left


def test_the_limits_are_those_that_decode_core_checks():
    assert MOST_ON_CPU == (
        attention.MAX_HEAD_SIZE, 16, program.MAX_EXPERTS, program.MAX_CHOSEN, tiles.LIMIT)
    assert MOST_ON_GPU == (
        cuda.MAX_HEAD_SIZE, 64, cuda.MAX_EXPERTS, cuda.MAX_EXPERTS, cuda.MAX_VOCABULARY)
