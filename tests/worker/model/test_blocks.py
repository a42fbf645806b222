"""Blocks: what follows from their tensors' axes, and how a layer puts them together."""

import dataclasses
import zlib

import numpy as np
import pytest
import torch

from chatlm.common.errors import ConfigError
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.blocks.attention import Attention, HeadNorms
from chatlm.worker.model.blocks.axes import Run, TensorAxes, matrix, padded_places, rank_part
from chatlm.worker.model.blocks.experts import Experts, ExpertsBesideDense, Router
from chatlm.worker.model.blocks.extras import Keep, Lambdas
from chatlm.worker.model.blocks.feed_forward import FeedForward, columns_of
from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.lm_head import LmHead
from chatlm.worker.model.blocks.mixers import DeltaRule, Mamba2, ShortConv
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import LayerNorm, RmsNorm
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.weights.loaded.shards import refuse_ranks
from engines import forward_logits, make_batch

C, V, EPS = 32, 64, 1e-5
RMS = RmsNorm(EPS)
ATTENTION = Attention(4, 2, 8, 8, Rope(8))
MIXERS = {"attention": ATTENTION, "short convolution": ShortConv(3, channels=C), "delta rule": DeltaRule(4, 2, 4, 8, 8, eps=EPS),
          "Mamba": Mamba2(4, 4, 8, 16, eps=EPS)}
FEEDS = {"feed-forward": FeedForward(48), "experts": Experts(4, 16, Router(2)),
         "experts and one that all take": Experts(4, 16, Router(2), shared=FeedForward(16, prefix="shared_"), shared_gate=True),
         "latent experts": Experts(4, 16, Router(2, "sigmoid"), "relu2", latent=8, shared=FeedForward(16, "relu2", prefix="shared_"))}


def model_of_layer(layer, **more):
    return Model(V, C, 64, Input(), (layer,), RMS, LmHead(), **more)


def random_tensors(model):
    found = {}
    for name, shape in model.shapes().items():
        values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
        found[name] = values * 0.2 if len(shape) > 1 else 1 + 0.3 * values
        if name.endswith("decay"):
            found[name] = -np.abs(found[name])
    return found


def traced(model, tensors):
    """The model's x after the mixer and after the layer, of a prompt of 9 tokens; and each row's embedding."""
    transformer = Transformer(model, dict(tensors), load_kernels("cpu"), num_pages=2, max_tokens=16, dtype="float32", num_slots=2)
    ids = [7 * i % V for i in range(9)]
    forward_logits(transformer, make_batch((ids, 0, 9, [0]))._replace(states=True))
    return (transformer.buffers["residual"][:9].clone().double(), transformer.buffers["x"][:9].clone().double(),
            torch.from_numpy(tensors["embed"])[ids].double())


def normed(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * torch.from_numpy(weight).double()


# ---- layers

@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_norm_after_a_block_is_of_what_it_adds(mixer, feed):
    """Once these norms were skipped after experts."""
    plain = Layer(MIXERS[mixer], FEEDS[feed], RMS, RMS)
    both = dataclasses.replace(plain, output_norm=RMS, down_norm=RMS)
    tensors = random_tensors(model_of_layer(both))
    mixed, _, x = traced(model_of_layer(plain), {name: value for name, value in tensors.items() if name in model_of_layer(plain).tensors()})
    found, after, _ = traced(model_of_layer(both), tensors)
    torch.testing.assert_close(found, x + normed(mixed - x, tensors["0.output_norm"]), rtol=1e-4, atol=1e-4)
    only_last = dataclasses.replace(plain, mixer=None, attention_norm=None, down_norm=RMS)
    alone = dataclasses.replace(only_last, down_norm=None)
    own = {name: value for name, value in tensors.items() if name in model_of_layer(only_last).tensors()}
    _, fed, x = traced(model_of_layer(alone), {name: value for name, value in own.items() if name != "0.down_norm"})
    _, after, _ = traced(model_of_layer(only_last), own)
    torch.testing.assert_close(after, x + normed(fed - x, own["0.down_norm"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("feed", FEEDS)
def test_a_norm_of_the_sum_takes_what_a_block_adds(feed):
    """A norm of the sum is of x and what any block adds."""
    norm = LayerNorm(EPS, bias=True)
    plain = Layer(None, FEEDS[feed])
    summed = dataclasses.replace(plain, down_norm=norm, norms_of_sums=True)
    tensors = random_tensors(model_of_layer(summed))
    _, total, _ = traced(model_of_layer(plain), {name: value for name, value in tensors.items() if "down_norm" not in name})
    _, found, _ = traced(model_of_layer(summed), tensors)
    weight, bias = (torch.from_numpy(tensors[f"0.down_norm{part}"]).double() for part in ("", "_bias"))
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(total, (C,), weight, bias, EPS), rtol=1e-4, atol=1e-4)


def test_a_layer_may_lack_a_mixer_or_feed_forward():
    tensors = random_tensors(model_of_layer(Layer()))
    mixed, after, x = traced(model_of_layer(Layer()), tensors)
    assert torch.equal(mixed, x) and torch.equal(after, x)


# ---- axes

def test_padding_spreads_each_run_and_part():
    """Padding spreads each run and each part of a unit."""
    axis, wide = (Run(2, 3, parts=2), Run(1, 2)), (Run(2, 4, parts=2), Run(1, 4))
    assert padded_places(axis, wide).tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17]


def test_a_rank_has_its_units_of_each_run():
    gate_up = matrix((Run(6, of="columns"),) * 2, C)
    assert rank_part(gate_up, {"columns": range(2, 4)}) == (0, (range(2, 4), range(8, 10)))
    assert rank_part(matrix(C, (Run(6, 4, "heads"),)), {"heads": range(1, 3)}) == (1, (range(4, 12),))
    assert rank_part(gate_up, {"heads": range(2)}) == (0, ())          # nothing of it is divided


def test_only_the_first_rank_adds_a_summed_bias():
    """The first rank alone adds the bias of products that ranks sum."""
    layer = Layer(dataclasses.replace(ATTENTION, biases=("qkv", "output")), FeedForward(48, biased=True), RMS, RMS)
    parts = [model_of_layer(layer).of_rank(rank, 2)[1] for rank in range(2)]
    assert [part["0.output_bias"] for part in parts] == [(0, ()), None] == [part["0.down_bias"] for part in parts]
    assert all(part["0.qkv_bias"].ranges and part["0.gate_up_bias"].ranges for part in parts)


def test_few_columns_are_divided_in_smaller_blocks():
    """Columns are divided in smaller blocks where there are too few."""
    assert [columns_of(96, rank, 2, 256) for rank in range(2)] == [range(0, 64), range(64, 96)]
    assert [columns_of(3, rank, 2, 256) for rank in range(2)] == [range(0, 2), range(2, 3)]


def test_the_first_ranks_compute_a_narrow_expert():
    """A narrow expert that all tokens take is computed by the first ranks alone."""
    experts = Experts(4, 16, Router(2), shared=FeedForward(1, prefix="shared_"))
    model = model_of_layer(Layer(ATTENTION, experts, RMS, RMS))
    refuse_ranks(model, 2, 1)
    shared = [model.of_rank(rank, 2)[0].layers[0].feed.shared for rank in range(2)]
    assert shared == [FeedForward(1, prefix="shared_"), None]


@pytest.mark.parametrize("feed", [FeedForward(3), ExpertsBesideDense(4, 16, Router(2), FeedForward(3, prefix="shared_"), RMS)])
def test_a_layer_too_small_for_its_ranks_is_refused(feed):
    """A layer of which a rank would get nothing is refused."""
    wide = Layer(ATTENTION, Experts(4, 16, Router(2)), RMS, RMS)
    model = dataclasses.replace(model_of_layer(wide), layers=(wide, Layer(ATTENTION, feed, RMS, RMS)))
    with pytest.raises(ConfigError, match="cannot be divided among 4 ranks: the feed-forward part of a layer has 3 columns"):
        refuse_ranks(model, 4, 1)


# ---- padding, stages

def test_heads_of_two_sizes_with_norms_stay_as_are():
    """Their norms have one eps each, but zeros make means smaller by another factor."""
    heads = [dataclasses.replace(ATTENTION, head_size=size, value_size=size, norms=HeadNorms("before_rope", EPS)) for size in (20, 24)]
    model = Model(V, C, 64, Input(), tuple(Layer(each, FeedForward(48), RMS, RMS) for each in heads), RMS, LmHead())
    assert [attn.head_size for attn in model.padded().by_layer] == [20, 24]
    alike = dataclasses.replace(model, layers=model.layers[:1])
    [padded] = alike.padded().by_layer
    assert (padded.head_size, padded.norms.count, padded.norms.eps) == (32, 20, EPS * 20 / 32)


def test_what_a_layer_keeps_reaches_the_head():
    """What a layer keeps for the head is passed on through all stages after it."""
    layers = tuple(Layer(ATTENTION, FeedForward(48), RMS, RMS, before=(Lambdas(),), after=(Keep(),) * (number == 0)) for number in range(3))
    model = Model(V, C, 64, Input(keeps=True), layers, RMS, LmHead(backout=True))
    stages = [model.of_layers(range(number, number + 1)) for number in range(3)]
    assert [stage.passed_on(0) for stage in stages] == [["x", "x0"], ["x", "x0", "middle"], ["x", "x0", "middle"]]
    assert [stage.passed_on(1) for stage in stages] == [["x", "x0", "middle"]] * 3
    assert all({*stage.passed_on(1)} <= {*stage.scratch()} for stage in stages)


def test_a_layer_finds_borrowed_keys_in_its_stage():
    """A layer that reads another's keys finds it in its stage."""
    layers = (Layer(ATTENTION, FeedForward(48)), Layer(ATTENTION, FeedForward(48)), Layer(dataclasses.replace(ATTENTION, source=1), FeedForward(48)))
    model = Model(V, C, 64, Input(), layers, RMS, LmHead(tied=True))
    last = model.of_layers(range(1, 3))
    assert [attn.source for attn in last.by_layer] == [None, 0] and last.input is None and last.head == LmHead()


def test_a_tensor_states_its_shape():
    qkv = ATTENTION.tensors(C)["qkv"]
    assert qkv.shape == (4 * 8 + 2 * 8 + 2 * 8, C) and qkv.packed and qkv.adapted
    assert dataclasses.replace(ATTENTION, gated=True).tensors(C)["qkv"].shape == (2 * 4 * 8 + 2 * 8 + 2 * 8, C)
    assert TensorAxes((Run(4),)).shape == (4,) and not TensorAxes((Run(4),)).packed
