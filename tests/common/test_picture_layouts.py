"""What a model makes of a picture's size, the ids of its rows, and pictures on the pipe: transformers is the oracle of layouts."""

import itertools
import math

import numpy as np
import pytest

from chatlm.common.config import LIMITS
from chatlm.common.errors import RequestError
from chatlm.common.messages.protocol import WORKER_PIPE, NewPicture
from chatlm.common.messages.requests import Message, TextSpec, Vision
from chatlm.common.messages.wire import HEADER, unpacked
from chatlm.common.text.load import open_tokenizer
from chatlm.common.vision.layout import layout_of
from chatlm.common.vision.pictures import of_picture, picture, picture_of, row_ids, row_places, rows_in
from image_conversations import BYTES, SEES, SEES_LFM2, SPECIALS, picture_of_size, seeing_spec
from nightly import by_day

SIZES = [(1152, 864), (512, 512), (511, 513), (2048, 2048), (3000, 7), (9, 1000), (1, 1), (640, 480), (333, 777), (4000, 1000)]
TILES = [(512, 2048), (384, 1536), (64, 100)]     # and the longest side


@pytest.mark.parametrize("size, tile, longest", by_day(
    [(size, *tiles) for size in SIZES for tiles in TILES], *((size, *tiles) for size, tiles in zip(SIZES, itertools.cycle(TILES)))))
def test_smolvlm_s_layouts_are_those_of_transformers(size, tile, longest):
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string
    width, height = size
    processor = SmolVLMImageProcessorPil(size={"longest_edge": longest}, max_image_size={"longest_edge": tile}, do_pad=True)
    made = processor(np.zeros((height, width, 3), np.uint8), return_row_col_info=True, input_data_format="channels_last")
    (rows,), (columns,) = made["rows"][0], made["cols"][0]
    layout = layout_of(SEES._replace(tile=tile, longest=longest, tokens=3), width, height)
    assert (layout.columns, layout.rows) == (columns, rows)
    assert layout.tiles == made["pixel_values"].shape[1]
    text = get_image_prompt_string(rows, columns, 3, image_token="<image>", fake_token_around_image="<fake_token_around_image>", global_image_token="<global-img>")
    assert "".join(part if isinstance(part, str) else part * "<image>" for part in layout.parts) == text
    assert layout.tokens == text.count("<image>")


def test_the_notes_photo_has_862_rows_and_marks():
    layout = layout_of(SEES, 1152, 864)
    assert (layout.columns, layout.rows, layout.tokens) == (4, 3, 13 * 64)


@pytest.mark.parametrize("size, grid, rows", [((1152, 864), (3, 2, (576, 416)), 1770), ((1024, 1024), (2, 2, (512, 512)), 1280), ((2000, 500), (4, 1, (1024, 256)), 1280), ((720, 720), (0, 0, None), 256),
                                              ((48, 48), (0, 0, None), 64), ((1448, 362), (0, 0, None), 256), ((3000, 7), (0, 0, None), 94), ((800, 656), (0, 0, None), 238)])
def test_lfm2_vl_s_layouts_are_its_processor_s(size, grid, rows):
    """transformers' needs torchvision, so its figures are here; all of 20,000 random sizes were equal (24 November 2026)."""
    layout = layout_of(SEES_LFM2, *size)
    assert (layout.columns, layout.rows, layout.whole) == grid and layout.tokens == rows
    assert "".join(str(part) for part in layout.parts).endswith(("<|img_thumbnail|>" + str(layout.parts[-2]) if grid[0] else str(rows)) + "<|image_end|>")


@pytest.mark.parametrize("size", SIZES + [(170, 100), (64, 64), (16_000, 90)])
def test_qwen_s_layouts_are_those_of_transformers(size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
    width, height = size
    layout = layout_of(Vision("qwen3vl", 1000, "", 0, 1024, unit=32, fewest=64), width, height)
    if max(size) > 200 * min(size):     # they refuse it
        return
    assert layout.sizes == (smart_resize(height, width, 32, 65_536, 1024 * 1024)[::-1],) and layout.tokens == layout.grid[0] * layout.grid[1]


@pytest.mark.parametrize("longest", [1540, 900])
def test_mistral_s_layouts_are_those_of_transformers(longest):
    """Up to 1,024 rows. A larger picture is shrunk in proportion, where transformers would make up to 3,025."""
    from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size
    vision = Vision("pixtral", 1000, "[IMG]", 0, 1024, longest, unit=28)
    cut = 0
    for width, height in [*SIZES, (28, 29), (1540, 1540), (896, 896), (897, 896), (20, 4000), (4000, 20), (8, 1600), (1600, 8)]:
        if max(width, height) > LIMITS.picture_side * min(width, height):
            continue
        rows, columns = (side // 28 for side in get_resize_output_image_size(np.zeros((3, height, width)), longest, 28, "channels_first"))
        layout = layout_of(vision, width, height)
        assert layout.parts == ((ours := layout.parts[0]), "[IMG_BREAK]") * (layout.sizes[0][1] // 28 - 1) + (ours, "[IMG_END]")
        if rows * columns <= 1024:
            assert layout.sizes == ((columns * 28, rows * 28),) and layout.tokens == rows * columns
            continue
        cut += 1
        assert 900 < layout.tokens <= 1024
        assert abs(math.log(layout.sizes[0][0] / layout.sizes[0][1] * height / width)) < 0.1
    assert cut or longest == 900


@pytest.mark.parametrize("tokens", [280, 70])
def test_gemma_4_s_layouts_are_those_of_transformers(tokens):
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size
    vision = Vision("gemma4", 1000, "<|image|>", 0, tokens, unit=48)
    for width, height in [*SIZES, (20, 4000), (4000, 20)]:
        if max(width, height) > LIMITS.picture_side * min(width, height):
            continue
        layout = layout_of(vision, width, height)
        wanted = get_aspect_ratio_preserving_size(height, width, 16, tokens * 9, 3)
        assert layout.sizes == (wanted[::-1],) and layout.parts == ("<|image>", wanted[0] * wanted[1] // 48**2, "<image|>")
    assert layout_of(vision._replace(tokens=280), 1152, 864).tokens == 266


@pytest.mark.parametrize("kind, marker, more", [("gemma3", "<start_of_image>", {}), ("gemma4", "<|image|>", {"unit": 24}), ("pixtral", "[IMG]", {"longest": 64, "unit": 16}), ("lfm2", "<image>", {"unit": 16, "fewest": 4, "tiles": (2, 4), "whole_from": 2.0})])
def test_picture_marks_in_a_text_stay_text(kind, marker, more):
    vision = Vision(kind, SEES.first_id, marker, 64, 16, **more)
    tokenizer, made = open_tokenizer(seeing_spec(TEMPLATES["both"].replace("<image>", marker), vision)), picture_of_size(40, 30)
    spelled = " ".join(SPECIALS)
    ids = tokenizer.render([Message("user", spelled + "?", None, (made,), (spelled, 0, "?"))])
    layout = layout_of(vision, 40, 30)
    assert len(rows_in(vision, ids)) == layout.tokens
    assert tokenizer.show(token for token in ids if BYTES <= token < vision.first_id).split() == "".join(part for part in layout.parts if isinstance(part, str)).split()


def test_row_ids_depend_on_pixels_size_and_settings():
    one, other = picture_of_size(8, 6), picture_of_size(8, 6, seed=1)
    assert picture(6, 8, one.pixels).digest != one.digest
    ids = row_ids(SEES, one.digest, 832)
    assert ids == row_ids(SEES, one.digest, 900)[:832] and len({*ids}) > 830
    assert min(ids) >= SEES.first_id and max(ids) < 2**31
    assert not {*ids} & {*row_ids(SEES, other.digest, 832)} and ids != row_ids(SEES._replace(longest=1024), one.digest, 832)


def test_a_prompt_must_have_its_pictures_rows():
    shown = [(picture_of_size(8, 6).digest, 2), (picture_of_size(9, 6).digest, 1)]
    ids = [5, *row_ids(SEES, *shown[0]), 7, *row_ids(SEES, *shown[1])]
    assert rows_in(SEES, ids) == [1, 2, 4] and row_places(SEES, ids, shown) == [(0, 0), (0, 1), (1, 0)]
    for wrong in (shown[:1], shown[::-1], [shown[0], (shown[1][0], 2)]):
        with pytest.raises(ValueError, match="not those of its pictures"):
            row_places(SEES, ids, wrong)


def test_pictures_cross_the_pipe_as_they_are():
    made = picture_of_size(7, 5)
    packed = WORKER_PIPE.packed(of_picture(made))
    kind, size = WORKER_PIPE.kind_and_size(packed[:HEADER.size])
    assert kind is NewPicture and size < made.width * made.height * 3 + 100
    assert picture_of(unpacked(kind, packed[HEADER.size:])) == made
    for broken in (b"", b"x" * 30, packed[HEADER.size:-1]):
        with pytest.raises(ValueError, match="no picture"):
            picture_of(NewPicture(broken))


TEMPLATES = {  # how the template reads contents -> it
    "lists": "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
             "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}",
    "both": "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}",
    "texts": "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}",
    "blind": "{% for message in messages %}{% if message.role == 'user' %}{{ message.content[:3] }}{% endif %}{% endfor %}"}


@pytest.mark.parametrize("kind", ["lists", "both", "texts"])
def test_pictures_stand_where_messages_have_them(kind):
    """And no text that a user writes becomes one."""
    sees = SEES._replace(splits=False)
    tokenizer = open_tokenizer(seeing_spec(TEMPLATES[kind], sees))
    made = picture_of_size(20, 20)
    spelled = "a <image> is <fake_token_around_image>"
    ids = tokenizer.render([Message("user", f"see {spelled} and", None, (made,), ("see ", 0, f"{spelled} and")), Message("assistant", "yes")])
    layout = layout_of(sees, 20, 20)
    assert [ids[index] for index in rows_in(sees, ids)] == row_ids(sees, made.digest, layout.tokens)
    assert ids.count(tokenizer.specials["<image>"]) == 0
    assert ids.count(tokenizer.specials["<fake_token_around_image>"]) == 2
    text = tokenizer.show(token for token in ids if token < SEES.first_id)
    assert "see <fake_token_around_image><global-img><fake_token_around_image>" + f"{spelled} and" in text and "yes" in text


def test_a_template_without_the_picture_is_an_error():
    tokenizer = open_tokenizer(seeing_spec(TEMPLATES["blind"]))
    with pytest.raises(RequestError, match="shows 0 of 1 images"):
        tokenizer.render([Message("user", "what is this", None, (picture_of_size(4, 4),), ("what is this", 0))])


def test_a_list_template_shows_texts_alone():
    """A template of lists alone shows texts without pictures."""
    tokenizer = open_tokenizer(seeing_spec(TEMPLATES["lists"]))
    assert tokenizer.show(tokenizer.render([Message("system", ""), Message("user", "hello")])) == "<|im_start|>System: <end_of_utterance>\nUser: hello<end_of_utterance>\n"


def test_a_model_of_texts_sees_no_picture():
    tokenizer = open_tokenizer(seeing_spec(TEMPLATES["both"], vision=None))
    with pytest.raises(RequestError, match="cannot see images"):
        tokenizer.render([Message("user", "", None, (picture_of_size(4, 4),), (0,))])


def test_pictures_cross_the_pipe_with_their_text():
    from chatlm.common.messages.wire import as_plain_json, object_restorer
    import json
    spec = seeing_spec(TEMPLATES["both"])
    assert object_restorer(TextSpec)(json.loads(as_plain_json(spec))) == spec and isinstance(spec.vision, Vision)
    message = Message("user", "x", None, (picture_of_size(4, 4),), (0, "x"))
    assert object_restorer(Message)(json.loads(as_plain_json(message))) == message
