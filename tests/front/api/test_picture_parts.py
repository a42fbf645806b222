"""Pictures leave the bodies of all APIs, and come back into the messages where they stood."""

import base64
import copy
import json

import pytest

from chatlm.common.config import LIMITS, Settings
from chatlm.common.errors import RequestError
from chatlm.common.messages.protocol import Known
from chatlm.common.vision.pictures import picture
from chatlm.front.api.picture_parts import Lift, Lifted, fill_in, lift_pictures, picture_bytes, with_pixels
from chatlm.front.api.dialect import Chained
from chatlm.front.api.reading import read_answer
from chatlm.front.intake.envelope import Envelope, make_envelope, unpacked_envelope

CAT, DOG = b"\x89PNG cat", b"\xff\xd8\xff dog"
PICTURES = [picture(2, 1, b"catcat"), picture(1, 2, b"dogdog")]
KNOWN = Known(Settings(), "tagged")


def data_uri(data, media="image/png"):
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def bare(data):
    return base64.b64encode(data).decode()


def part(data):
    return {"type": "image_url", "image_url": {"url": data_uri(data), "detail": "low"}}


def source(data):
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": bare(data)}}


TEXT = {"type": "text", "text": "What is it?"}
TURN = {"role": "user", "content": [{"type": "text", "text": "See "}, part(CAT), TEXT, part(DOG)]}
BOTH = ("user", "See What is it?", ("See ", 0, "What is it?", 1))
BODIES = [
    ("/v1/chat/completions", {"messages": [TURN]}, [BOTH]),
    ("/chat/completions", {"messages": [TURN]}, [BOTH]),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": bare(CAT)}]},
                {"role": "assistant", "content": "A cat."},
                {"role": "user", "content": [TEXT, part(DOG)]},
            ]
        },
        [("user", "", (0,)), ("assistant", "A cat.", ()), ("user", "What is it?", ("What is it?", 0))],
    ),
    (
        "/v1/responses",
        {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "See "},
                        {"type": "input_image", "image_url": data_uri(CAT), "detail": "auto"},
                        {"type": "input_text", "text": "What is it?"},
                        {"type": "input_image", "image_url": data_uri(DOG)},
                    ],
                }
            ]
        },
        [BOTH],
    ),
    (
        "/v1/messages",
        {
            "max_tokens": 5,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "See "}, source(CAT), TEXT, source(DOG)],
                }
            ],
        },
        [BOTH],
    ),
    (
        "/v1/messages",
        {
            "max_tokens": 5,
            "messages": [
                {"role": "user", "content": [TEXT]},
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "a", "name": "look", "input": {}}],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "a",
                            "content": [source(CAT), {"type": "text", "text": "seen"}, source(DOG)],
                        }
                    ],
                },
            ],
        },
        [("user", "What is it?", ()), ("assistant", "", ()), ("tool", "seen", (0, "seen", 1))],
    ),
    (
        "/api/chat",
        {"messages": [{"role": "user", "content": "What is it?", "images": [bare(CAT), bare(DOG)]}]},
        [("user", "What is it?", (0, 1, "What is it?"))],
    ),
    (
        "/api/generate",
        {"prompt": "What is it?", "images": [bare(CAT), data_uri(DOG)]},
        [("user", "What is it?", (0, 1, "What is it?"))],
    ),
    ("/api/generate", {"images": [bare(CAT), bare(DOG)]}, [("user", "", (0, 1, ""))]),
]


@pytest.mark.parametrize(
    "route, body, wanted", BODIES, ids=[f"{number} {route}" for number, (route, *_) in enumerate(BODIES)]
)
def test_every_api_s_pictures_join_the_messages(route, body, wanted):
    """They become those of the messages."""
    fields = copy.deepcopy(body)
    envelope = make_envelope(fields, route)
    assert [data for _, data in envelope.lift.files] == [CAT, DOG] and all(
        bare(data) not in json.dumps(fields) for data in (CAT, DOG)
    )
    assert (
        unpacked_envelope(envelope.packed(envelope.rest(10_000, 9000))) == envelope
        and unpacked_envelope(envelope.packed(b"")).fields is None
    )
    envelope.show(PICTURES)
    envelope.show(PICTURES)  # to another model
    request = with_pixels(read_answer(route, fields, KNOWN).request, PICTURES)
    assert [(message.role, message.content, message.parts) for message in request.messages] == wanted
    assert [shown for message in request.messages for shown in message.pictures] == PICTURES


def test_a_body_without_pictures_stays_as_it_is():
    for content in ("hello", [TEXT], None, [{"type": "text"}], ["text"], [7]):
        body = {
            "messages": [{"role": "user", "content": content}, "no message"],
            "input": "image",
            "images": None,
        }
        before = copy.deepcopy(body)
        lift = lift_pictures(body)
        lift.check("no")
        assert lift == Lift() and body == before


@pytest.mark.parametrize(
    "value, said",
    [
        ("http://127.0.0.1/cat.png", "fetches no URLs"),
        ("https://example.org/cat.png", "fetches no URLs"),
        ("HTTPS://x/y", "fetches no URLs"),
        ("file:///etc/passwd", "reads no files"),
        ("ftp://x/y", "reads no files"),
        ("data:image/png,abc", "must be a data URI"),
        ("data:image/png;base64", "must be a data URI"),
        ("/etc/passwd!", "not base64"),
        ("a", "not base64"),
        ("%%%", "not base64"),
        ("", "must be a data URI"),
        (None, "must be a data URI"),
        (7, "must be a data URI"),
        ({"url": 1}, "must be a data URI"),
    ],
)
def test_no_picture_is_fetched(value, said):
    """What is no data is refused."""
    with pytest.raises(RequestError, match=said) as refused:
        picture_bytes(value, "messages[0].content[1].image_url.url")
    assert refused.value.param == "messages[0].content[1].image_url.url" and len(str(refused.value)) < 500


def test_base64_of_all_kinds_is_read():
    data = bytes(range(250, 256)) * 7
    for text in (
        bare(data),
        bare(data).rstrip("="),
        base64.urlsafe_b64encode(data).decode(),
        "\n".join(bare(data)),
        data_uri(data),
        "DATA:IMAGE/PNG;charset=x;BASE64," + bare(data),
    ):
        assert picture_bytes(text, "x") == data


def test_too_many_or_too_large_pictures_are_refused():
    """The error names them."""
    with pytest.raises(RequestError, match="images: 17 given, at most 16 allowed"):
        lift_pictures({"messages": [{"role": "user", "content": [part(CAT)] * (LIMITS.pictures + 1)}]}).check(
            ""
        )
    with pytest.raises(RequestError, match="exceeds the maximum size of 10485760 bytes") as refused:
        lift_pictures(
            {"messages": [{"role": "user", "content": [TEXT, part(bytes(LIMITS.picture_bytes + 2000))]}]}
        ).check("")
    assert refused.value.status == 413 and refused.value.param == "messages[0].content[1].image_url.url"
    assert len(picture_bytes(bare(bytes(LIMITS.picture_bytes)), "x")) == LIMITS.picture_bytes


def test_a_blind_model_says_so_before_reading_files():
    with pytest.raises(
        RequestError, match=r"^messages\[0\].content\[1\].image_url.url: this model cannot see images$"
    ) as refused:
        lift_pictures(
            {
                "messages": [
                    {"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": "%%%"}}]}
                ]
            }
        ).check("this model cannot see images")
    assert refused.value.code == "unsupported_content"


@pytest.mark.parametrize(
    "part, said",
    [
        ({"type": "image", "picture": 0}, "source must be"),
        ({"type": "image", "picture": [2, 1, "00"]}, "source must be"),
        ({"type": "image", "source": {"type": "file"}}, "source.type must be base64"),
        ({"type": "image", "source": {"type": "url", "url": "https://x/y"}}, "fetches no URLs"),
        ({"type": "input_image", "file_id": "file-1"}, "keeps no pictures"),
        ({"type": "input_audio", "input_audio": {}}, "must be a text or an image"),
    ],
    ids=str,
)
def test_parts_that_are_no_pictures_are_refused(part, said):
    """They are none of the body's."""
    body = {"messages": [{"role": "user", "content": [part]}]}
    with pytest.raises(RequestError, match=said):
        lift = lift_pictures(body)
        lift.check("")
        fill_in(body, [PICTURES[0] for _ in lift.files])
        read_answer("/v1/chat/completions", body, KNOWN)


def test_a_picture_in_the_wrong_place_is_an_error():
    """It is not taken for another's."""
    forged = {"type": "image", "picture": [2, 1, PICTURES[0].digest.hex()]}
    body = {"max_tokens": 5, "system": [forged], "messages": [{"role": "user", "content": "x"}]}
    assert lift_pictures(body) == Lift()
    with pytest.raises(RequestError, match="not among"):
        with_pixels(read_answer("/v1/messages", body, KNOWN).request, [])


def test_a_body_nested_too_deeply_is_refused():
    deep = []
    for _ in range(2000):
        deep = [deep]
    with pytest.raises(RequestError, match="nested too deeply"):
        Envelope({"messages": deep}, "", False, Chained(), Lift([Lifted("x", b"data")])).rest(9, 9)


def test_fields_large_without_pictures_stay():
    """They stay where they are."""
    envelope = make_envelope(
        {"messages": [{"role": "user", "content": [part(CAT), {"type": "text", "text": "x" * 800}]}]},
        "/v1/chat/completions",
    )
    size = len(json.dumps([envelope.fields, None, None]))
    assert len(envelope.rest(size, size)) == size and envelope.rest(size, size - 1) == b""


def test_packed_files_keep_their_names():
    lift = Lift(
        [Lifted("x", b""), Lifted("y", b"\0\1")], "x", RequestError("no", status=413, code="large", param="z")
    )
    came = unpacked_envelope(
        Envelope({"a": "ü"}, "ü", True, Chained(), lift).packed(json.dumps([{"a": "ü"}, None, None]).encode())
    )
    assert (
        came.fields == {"a": "ü"}
        and came.model == "ü"
        and came.lift.files == lift.files
        and came.lift.first == "x"
    )
    assert (
        str(came.lift.problem),
        came.lift.problem.status,
        came.lift.problem.code,
        came.lift.problem.param,
    ) == ("no", 413, "large", "z")
