"""LFM2-VL, Gemma 3, Gemma 4 and Mistral's with a Pixtral tower: from pixels to logits as transformers, as folders and as files."""

import json
from functools import partial

import numpy as np
import pytest

from chatlm.common.messages.requests import AnswerParams, SamplingParams
from chatlm.common.vision.layout import layout_of
from chatlm.worker.engine.sequence import Assignment
from chatlm.worker.weights.formats.gguf.file import read_gguf
from families import load, make_model, save
from image_conversations import picture_of_size
from seeing_engine import answer, asking, check_logits, checked_answer, chosen_kernels, logits_of, open_engine
from sight_families import FAMILIES, family_logits, make_pixtral, save_family, write_family
from tiny_gguf import write_gguf


@pytest.fixture(scope="module", params=FAMILIES)
def seeing(request, tmp_path_factory):
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = FAMILIES[kind][0]()
    save_family(folder, kind, model)
    return kind, folder, model


def expected(engine, kind, model, ids, pictures):
    vision = engine.full_text.vision
    return family_logits(model, kind, ids, pictures, [layout_of(vision, picture.width, picture.height) for picture in pictures])


@pytest.fixture(params=["decode_core", "reference"])
def kernels(request, monkeypatch):
    yield from chosen_kernels(request, monkeypatch)


@pytest.mark.parametrize("size", [(40, 30), (170, 100)])
def test_other_families_pixels_match_transformers(seeing, kernels, size):
    """Logits from pixels are those of transformers."""
    kind, folder, model = seeing
    engine = open_engine(folder, prefill_chunk=512)
    check_logits(engine, kernels, size, partial(expected, engine, kind, model))


def test_picture_answers_are_the_same_in_chunks(seeing):
    """Answers are the same in chunks, cached and again."""
    kind, folder, model = seeing
    picture = picture_of_size(170, 100)
    engine = open_engine(folder)
    ids = asking(engine, picture, text="What is this? Look at it well.")
    first = checked_answer(engine, ids, [picture], partial(expected, engine, kind, model))
    assert answer(open_engine(folder, prefill_chunk=512), ids, [picture]) == first


def test_files_with_an_mmproj_see_as_folders_do(seeing, tmp_path):
    kind, _, model = seeing
    engine = open_engine(write_family(tmp_path, kind, model), prefill_chunk=512)
    pictures = (picture_of_size(170, 100), picture_of_size(20, 50, seed=1))
    ids = asking(engine, *pictures)
    assert np.abs(logits_of(engine, ids, pictures) - expected(engine, kind, model, ids, pictures)[-16:]).max() < 1e-4


def test_a_model_with_latents_sees(tmp_path):
    """Mistral Small 4 has a Pixtral tower too."""
    model = make_pixtral("mistral4")
    save_family(tmp_path, "pixtral", model)
    engine = open_engine(tmp_path, prefill_chunk=512)
    pictures = (picture_of_size(170, 100), picture_of_size(20, 50, seed=1))
    ids = asking(engine, *pictures)
    assert np.abs(logits_of(engine, ids, pictures) - expected(engine, "pixtral", model, ids, pictures)[-16:]).max() < 1e-4


@pytest.mark.parametrize("part, changes, said", [
    ("vision_config", {"model_type": "siglip_vision_model"}, "vision_config.model_type is"), ("vision_config", {"head_dim": 8}, "vision_config.head_dim is 8; it must be 16"),
    ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act"), ("", {"vision_feature_layer": -2}, "vision_feature_layer is -2; it must be -1"),
    ("", {"spatial_merge_size": 4}, "patch_merger.merging_layer.weight is (64, 256) instead of (64, 1024)"), ("", {"multimodal_projector_bias": True}, "missing multi_modal_projector.linear_1.bias")])
def test_another_pixtral_tower_leaves_a_text_model(tmp_path, caplog, part, changes, said):
    """A folder that says what is not supported is a model of texts, and the log says why."""
    save_family(tmp_path, "pixtral", make_pixtral())
    config = json.loads((tmp_path / "config.json").read_text())
    (config[part] if part else config).update(changes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_engine(tmp_path).full_text.vision is None
    assert "reads texts alone" in caplog.text and said in caplog.text


def test_an_unknown_tower_leaves_a_text_model(tmp_path, caplog):
    """Muse Glimmer's tower is not computed yet."""
    assert load(save(make_model("muse-glimmer"), tmp_path)).text.vision is None
    assert "reads texts alone" in caplog.text and "cannot compute the vision tower of a \"muse_glimmer\" yet" in caplog.text


def test_an_mmproj_of_pixtral_12b_is_refused(tmp_path, caplog):
    """Its projector merges no patches."""
    path = write_family(tmp_path, "pixtral", make_pixtral())
    metadata, stored = read_gguf(tmp_path / "mmproj-tiny-F32.gguf")
    (tmp_path / "mmproj-tiny-F32.gguf").rename(tmp_path / "whole")
    numbers = {name: value for name, value in metadata.items() if name.startswith("clip.")}
    write_gguf(tmp_path / "mmproj-tiny-F32.gguf", {name: tensor.data for name, tensor in stored.items() if name != "mm.patch_merger.weight"}, numbers, {"general.architecture": "clip"})
    assert open_engine(path).full_text.vision is None
    assert "mm.patch_merger.weight is missing, as in Pixtral 12B" in caplog.text


def test_no_chunk_or_page_cuts_a_two_sided_picture(tmp_path):
    """Pages end amid pictures, chunks of 20 tokens would, and prompts come together."""
    model = FAMILIES["gemma3"][0]()
    save_family(tmp_path, "gemma3", model)
    engine, pictures = open_engine(tmp_path, prefill_chunk=20), [picture_of_size(60, 50, seed=seed) for seed in range(3)]
    for number in range(4):
        text = "What?!."[:number + 3] * 2
        ids = asking(engine, *pictures[:2 + number % 2], text=text)
        shown = pictures[:2 + number % 2]
        engine.add(Assignment("beside", asking(engine, pictures[2], text=f"{number}"), AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True), 8, pictures=(pictures[2],)))
        assert answer(engine, ids, shown) == answer(open_engine(tmp_path, prefill_chunk=512), ids, shown)
    assert engine.pictures.encoded == 3
    sequence = engine.pictures.placeholders_of(Assignment("x", ids, AnswerParams(), 1, pictures=tuple(shown)))[0]
    begin, end = sequence.spans(0, len(ids))[0]
    assert end - begin == 16 and begin % 16 and sequence.spans(end - 1, end) == [(begin, end)] and not sequence.spans(end, end + 1)
