"""Qwen3-VL, with experts too, and Qwen3.5 see: rotary places in tower and model, deepstack, and the same answers however they come."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from chatlm.common.vision.layout import layout_of
from engines import tensors_of
from families import load
from image_conversations import picture_of_size
from seeing_engine import answer, asking, check_logits, checked_answer, chosen_kernels, logits_of, open_engine
from sight_qwen import KINDS, as_published, make_qwen, qwen_logits, save_qwen, write_qwen


@pytest.fixture(scope="module", params=KINDS)
def qwen(request, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp(request.param), make_qwen(request.param)
    save_qwen(folder, model)
    return folder, model


def expected(engine, model, ids, pictures):
    return qwen_logits(model, ids, pictures, [layout_of(engine.full_text.vision, picture.width, picture.height) for picture in pictures])


@pytest.fixture(params=["decode_core", "reference"])
def kernels(request, monkeypatch):
    yield from chosen_kernels(request, monkeypatch)


@pytest.mark.parametrize("size", [(40, 30), (170, 30)])
def test_qwen_s_pixels_give_transformers_logits(qwen, kernels, size):
    """Logits from pixels are those of transformers."""
    folder, model = qwen
    engine = open_engine(folder, prefill_chunk=512)
    check_logits(engine, kernels, size, partial(expected, engine, model))


def test_qwen_s_picture_answers_match_transformers(qwen):
    """Answers are those of transformers in chunks, cached, together and again."""
    folder, model = qwen
    picture, other = picture_of_size(170, 100), picture_of_size(50, 120, seed=2)
    engine = open_engine(folder)
    ids = asking(engine, picture, other, text="What is this? Look at it well.")
    first = checked_answer(engine, ids, [picture, other], partial(expected, engine, model))
    assert answer(open_engine(folder, prefill_chunk=512, drafts="none"), ids, [picture, other]) == first


def test_a_file_with_an_mmproj_sees_as_the_folder_does(qwen, tmp_path):
    _, model = qwen
    engine = open_engine(write_qwen(tmp_path, model), prefill_chunk=512)
    pictures = (picture_of_size(170, 100), picture_of_size(20, 50, seed=1))
    ids = asking(engine, *pictures)
    assert np.abs(logits_of(engine, ids, pictures) - expected(engine, model, ids, pictures)[-16:]).max() < 1e-4


@pytest.mark.parametrize("hidden", [32, 48, 64, 128])
def test_experts_are_read_in_both_orders(tmp_path, hidden):
    """As transformers writes them and as their makers do, whatever their sizes, even if gates and ups are a square."""
    model = make_qwen("qwen3_vl_moe", hidden=hidden)
    save_qwen(tmp_path, model)
    written = tensors_of(load(tmp_path))
    as_published(tmp_path)
    published = tensors_of(load(tmp_path))
    assert written.keys() == published.keys() and all(torch.equal(tensor, published[name]) for name, tensor in written.items())
    engine = open_engine(tmp_path)
    picture = picture_of_size(40, 30)
    ids = asking(engine, picture)
    assert np.abs(logits_of(engine, ids, (picture,)) - expected(engine, model, ids, (picture,))[-16:]).max() < 1e-4


@pytest.mark.parametrize("part, changes, said", [
    ("vision_config", {"deepstack_visual_indexes": [2, 0]}, "deepstack is after the layers [2, 0]; there are 4"),
    ("vision_config", {"deepstack_visual_indexes": [0, 9]}, "deepstack is after the layers [0, 9]; there are 4"),
    ("vision_config", {"num_position_embeddings": 35}, "the table of places has 35 rows; it must be a square"),
    ("vision_config", {"temporal_patch_size": 3}, "vision_config.temporal_patch_size is 3; it must be 2"),
    ("text_config", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2]}}, "mrope_section"),
    ("text_config", {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": False}}, "mrope_interleaved must be true")])
def test_an_unsupported_sight_leaves_a_text_model(tmp_path, caplog, part, changes, said):
    """A folder that says what is not supported is a model of texts."""
    save_qwen(tmp_path, make_qwen("qwen3_vl"))
    config = json.loads((tmp_path / "config.json").read_text())
    config[part] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_engine(tmp_path).full_text.vision is None
    assert "reads texts alone" in caplog.text and said in caplog.text
