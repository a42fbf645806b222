"""Models that see: from pixels to logits as transformers, encoded once, and the same answers however they come."""

from functools import partial

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quantize

from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import AnswerParams, Failed, Piece, SamplingParams
from chatlm.common.vision.layout import layout_of
from chatlm.worker.engine.sequence import Assignment
from chatlm.worker.tower import tiles_of
from image_conversations import picture_of_size
from models_that_draft import draft_always
from seeing_engine import answer, asking, check_logits, checked_answer, chosen_kernels, collect, logits_of, open_engine, run
from tiny_sight import expected_logits, make_smolvlm, pixel_values, save_sight, write_mmproj, write_model

KINDS = "smolvlm", "idefics3"


@pytest.fixture(scope="module", params=KINDS)
def seeing(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = make_smolvlm(request.param)
    save_sight(folder, request.param, model)
    return request.param, folder, model


@pytest.fixture(params=["decode_core", "reference"])
def kernels(request, monkeypatch):
    yield from chosen_kernels(request, monkeypatch)


@pytest.mark.parametrize("size", [(40, 30), (64, 64), (300, 20)])
def test_smolvlm_s_pixels_give_transformers_logits(seeing, kernels, size):
    """Logits from pixels are those of transformers."""
    kind, folder, model = seeing
    engine = open_engine(folder, prefill_chunk=512)
    check_logits(engine, kernels, size, partial(expected_logits, model, kind))


def test_picture_answers_are_the_same_however_they_come(seeing):
    """Alone, in other chunks, batched, cached, preempted: and as transformers' greedy tokens."""
    kind, folder, model = seeing
    picture = picture_of_size(90, 60)
    engine = open_engine(folder)
    ids = asking(engine, picture)
    first = checked_answer(engine, ids, [picture], partial(expected_logits, model, kind))
    other = picture_of_size(64, 64, seed=3)
    ids_of_other = asking(engine, other, text="And this?")
    engine.add(Assignment("b", ids, AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True), 8, pictures=(picture,)))
    engine.add(Assignment("c", asking(engine), AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True), 8))
    together = answer(engine, ids_of_other, [other], "d")
    whole = open_engine(folder, prefill_chunk=512)
    assert answer(whole, ids, [picture]) == first
    assert answer(whole, ids_of_other, [other]) == together


def test_a_second_picture_question_runs_no_tower(seeing):
    """A worker that has the pages of the prompt needs neither rows nor pixels."""
    _, folder, _ = seeing
    picture, engine = picture_of_size(90, 60), open_engine(folder)
    first = asking(engine, picture, text="What is this? It is a long question, so that pages are full after the picture.")
    answer(engine, first, [picture])
    engine.pictures.by_digest.clear()                        # as if others had come since
    answer(engine, first[:-3] + asking(engine, text="x")[-3:], [picture])
    assert engine.pictures.encoded == 1


def test_answers_step_between_a_picture_s_parts(seeing):
    _, folder, _ = seeing
    engine = open_engine(folder, prefill_chunk=16)
    engine.add(Assignment("text", asking(engine), AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True), 900))
    while not engine.queue.running or engine.queue.running[0].prefilling:
        engine.step()
    picture = picture_of_size(90, 60)
    engine.add(Assignment("picture", asking(engine, picture), AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True), 4, pictures=(picture,)))
    before, parts = 0, 0
    while engine.pictures.encoded == 0:
        pieces = [event for name, event in engine.step() if name == "text" and isinstance(event, Piece)]
        if engine.pictures.work:
            parts += 1
            before += sum(len(event.tokens) for event in pieces)
    assert parts > 3 and before >= parts - 2
    engine.cancel("text")
    collect(engine)


def test_pictures_of_another_prompt_fail_alone(seeing):
    _, folder, _ = seeing
    engine, picture = open_engine(folder), picture_of_size(30, 30)
    ids = asking(engine, picture)
    engine.add(Assignment("wrong", ids, AnswerParams(), 4, pictures=(picture_of_size(30, 30, seed=9),)))
    assert [(name, type(event)) for name, event in engine.step()] == [("wrong", Failed)]
    assert answer(engine, ids, [picture])


def test_penalties_and_drafts_know_no_rows(seeing):
    _, folder, _ = seeing
    engine, picture = open_engine(folder), picture_of_size(90, 60)
    ids = asking(engine, picture, picture, text="again and again and again")
    plain = answer(engine, ids, [picture, picture], tokens=24)
    sampling = SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5)
    engine.add(Assignment("p", ids, AnswerParams(sampling=sampling, ignore_eos=True), 24, pictures=(picture, picture)))
    assert len(collect(engine)["p"]) == 24
    drafting = open_engine(folder, drafts="none")
    assert answer(drafting, ids, [picture, picture], tokens=24) == plain


def test_a_draft_model_drafts_for_texts_alone(seeing, monkeypatch):
    """A second model drafts for texts alone beside answers about pictures."""
    draft_always(monkeypatch, 4)
    _, folder, _ = seeing
    engine, picture = open_engine(folder, draft_model=str(folder), drafts="model"), picture_of_size(90, 60)
    plain = open_engine(folder, drafts="none")
    about, text = asking(engine, picture, picture, text="again and again and again"), asking(engine, text="And you?")
    sampling = AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True)
    engine.add(Assignment("about", about, sampling, 24, pictures=(picture, picture)))
    engine.add(Assignment("text", text, sampling, 24))
    found = collect(engine)
    assert found == {"about": answer(plain, about, [picture, picture], tokens=24), "text": answer(plain, text, [], tokens=24)}
    assert engine.drafting.accepted.model > 0


@pytest.fixture(scope="module")
def seeing_files(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("files"), make_smolvlm("smolvlm")
    return write_model(folder / "tiny-F32.gguf", model), model


@pytest.mark.parametrize("how", ["beside", "named", "exchanged"])
def test_files_with_an_mmproj_see_as_folders_do(seeing_files, tmp_path, how):
    path, model = seeing_files
    own = tmp_path / path.name
    own.symlink_to(path) if how == "named" else own.write_bytes(path.read_bytes())
    file = write_mmproj(tmp_path / ("eyes.gguf" if how == "named" else "mmproj-tiny-F32.gguf"), model, exchanged=how == "exchanged")
    engine = open_engine(own, prefill_chunk=512, **({"mmproj": str(file)} if how == "named" else {}))
    pictures = (picture_of_size(40, 30), picture_of_size(20, 50, seed=1))
    ids = asking(engine, *pictures)
    wanted = expected_logits(model, "smolvlm", ids, pictures)[-16:]
    assert np.abs(logits_of(engine, ids, pictures) - wanted).max() < 1e-4


def test_an_mmproj_of_half_floats_stays_so(seeing_files, tmp_path):
    path, model = seeing_files
    own = tmp_path / path.name
    own.write_bytes(path.read_bytes())
    write_mmproj(tmp_path / "mmproj-f16.gguf", model, half=True)
    engine = open_engine(own, prefill_chunk=512, dtype=None)
    picture = picture_of_size(40, 30)
    ids = asking(engine, picture)
    assert np.abs(logits_of(engine, ids, (picture,)) - expected_logits(model, "smolvlm", ids, [picture])[-16:]).max() < 0.3
    assert len(answer(engine, ids, [picture])) == 8


def test_beside_a_quantized_model_so_is_the_tower(tmp_path):
    """Its rows are nearly those of floats, though not the same; beside a model of floats it stays as it is."""
    model, picture = make_smolvlm("smolvlm"), picture_of_size(90, 60)
    quantized = GGMLQuantizationType.Q8_0
    write_model(tmp_path / "a.gguf", model, lambda name, weight: weight if weight.ndim == 1 else (quantize(weight, quantized), quantized))
    write_mmproj(tmp_path / "mmproj-f16.gguf", model, half=True)
    with torch.no_grad():
        wanted = torch.cat([*model.model.get_image_features(pixel_values(picture, "smolvlm")).pooler_output]).reshape(-1, 64).numpy()
    engine = open_engine(tmp_path / "a.gguf", dtype=None)
    tower = engine.pictures.tower
    rows = run(tower.encode(tiles_of(picture, layout_of(engine.full_text.vision, 90, 60), tower.stored.filter)))
    cosine = (rows * wanted).sum(axis=1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(wanted, axis=1)
    assert tower.stages[0].matrix_types[0] == "q8_0" and cosine.min() > 0.999 and np.abs(rows - wanted).max() > 1e-5


@pytest.mark.parametrize("what, message", [
    ({"clip.projector_type": "internvl"}, "clip.projector_type is \"internvl\"; it must be one of idefics3"),
    ({"clip.vision.image_size": 50}, "clip.vision.image_size"),
    ({"clip.vision.block_count": 4}, "missing v.blk.3"),
    (None, "there is no such file")])
def test_a_wrong_mmproj_is_named(seeing_files, tmp_path, what, message):
    """One that was named ends the start; one beside the model leaves it a model of texts."""
    path, model = seeing_files
    file = tmp_path / "mmproj-x.gguf"
    if what is not None:
        write_mmproj(file, model, **what)
    with pytest.raises(ConfigError, match=message):
        open_engine(path, mmproj=str(file))
    if what is not None:
        (tmp_path / "m.gguf").write_bytes(path.read_bytes())
        assert open_engine(tmp_path / "m.gguf").full_text.vision is None
