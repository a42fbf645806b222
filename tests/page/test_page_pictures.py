"""Pictures in the page: attached, shown, sent as parts, kept with the chat, and small enough to send."""

import base64
import io
import json
import random

import pytest

from browsing import answers, ask, button, chats, expect, expect_accessible, expect_answered, menu, message_box, needs_browser, open_page, questions, reload, settled

Image = pytest.importorskip("PIL.Image")

pytestmark = needs_browser


def file_of(size=(60, 40), kind="PNG", colour="tomato"):
    target = io.BytesIO()
    Image.new("RGB", size, colour).save(target, kind)
    return target.getvalue()


def attach(page, name, content, media="image/png"):
    page.locator("#files-picker").set_input_files({"name": name, "mimeType": media, "buffer": content})


@pytest.fixture
def seeing(stand_in, page):
    stand_in.model["capabilities"]["vision"] = True
    open_page(page, stand_in.url)
    return stand_in


def sent(stand_in, index=-1):
    return stand_in.bodies[index]["messages"][-1]["content"]


def data_of(part):
    head, _, data = part["image_url"]["url"].partition(",")
    return head, base64.b64decode(data)


def test_a_picture_is_attached_and_shown_larger(page, seeing, theme):
    data = file_of()
    attach(page, "tomato.png", data)
    chip = page.locator("#files li")
    expect(chip).to_contain_text("tomato.png")
    expect(chip.locator("img")).to_be_visible()
    expect_accessible(page, theme=theme)
    ask(page, "What is it?")
    expect_answered(page)
    picture, text = sent(seeing)
    assert (data_of(picture), text) == (("data:image/png;base64", data), {"type": "text", "text": "What is it?"})
    expect(page.locator("#files li")).to_have_count(0)
    thumbnail = questions(page).get_by_role("button", name="tomato.png")
    thumbnail.click()
    opened = page.locator("#picture-dialog img")
    expect(opened).to_be_visible()
    assert opened.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [60, 40]
    expect_accessible(page, theme=theme)
    opened.click()
    expect(opened).to_be_hidden()


CARRY = """([kind, data, name]) => {
  const carried = new DataTransfer(), box = document.getElementById("message");
  carried.items.add(new File([Uint8Array.from(atob(data), letter => letter.charCodeAt(0))], name, {type: "image/png"}));
  box.dispatchEvent(kind === "drop" ? new DragEvent(kind, {dataTransfer: carried, bubbles: true, cancelable: true})
                                    : new ClipboardEvent(kind, {clipboardData: carried, bubbles: true, cancelable: true}));
}"""


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_a_dropped_or_pasted_picture_is_attached(page, seeing, how):
    data = file_of()
    page.evaluate(CARRY, [how, base64.b64encode(data).decode(), "tomato.png"])
    expect(page.locator("#files li img")).to_be_visible()
    ask(page, "What is it?")
    expect_answered(page)
    assert data_of(sent(seeing)[0]) == ("data:image/png;base64", data)


def test_a_picture_goes_with_every_later_question(page, seeing):
    attach(page, "tomato.png", file_of())
    button(page, "Send").click()
    expect_answered(page)
    assert [part["type"] for part in sent(seeing)] == ["image_url"]
    expect(chats(page)).to_have_text(["tomato.png"])
    reload(page)
    expect(questions(page).locator("img")).to_be_visible()
    ask(page, "And now?")
    expect_answered(page, 2)
    messages = seeing.bodies[-1]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"] and messages[0]["content"][0]["type"] == "image_url" and messages[2]["content"] == "And now?"
    questions(page).first.hover()
    button(questions(page).first, "Edit").click()
    page.get_by_label("Edit the message").or_(page.locator("article textarea")).first.fill("Which colour?")
    button(page, "Update").click()
    expect(answers(page).last).to_contain_text("Which colour?")
    assert [part.get("text", "image") for part in sent(seeing)] == ["image", "Which colour?"]


def test_a_draft_keeps_its_picture(page, seeing):
    attach(page, "tomato.png", file_of())
    message_box(page).fill("refuse this")
    settled(page)
    reload(page)
    expect(page.locator("#files li")).to_contain_text("tomato.png")
    button(page, "Send").click()
    expect(page.get_by_role("alert")).to_contain_text("the limit is 8,000")
    expect(page.locator("#files li img")).to_be_visible()
    button(page, "Remove tomato.png").click()
    expect(page.locator("#files li")).to_have_count(0)


def test_a_photo_is_made_small_and_becomes_jpeg(page, seeing):
    noise = Image.frombytes("RGB", (130, 100), random.Random(0).randbytes(130 * 100 * 3)).resize((2600, 2000))
    target = io.BytesIO()
    noise.save(target, "JPEG", quality=95)
    attach(page, "photo.jpg", target.getvalue(), "image/jpeg")
    expect(page.locator("#files li img")).to_be_visible()
    attach(page, "old.bmp", file_of(kind="BMP"), "image/bmp")
    expect(page.locator("#files li img")).to_have_count(2)
    button(page, "Send").click()
    expect_answered(page)
    (head, photo), (second, old) = map(data_of, sent(seeing))
    assert head == second == "data:image/jpeg;base64"
    width, height = Image.open(io.BytesIO(photo)).size
    assert 3.9e6 < width * height <= 4.1e6 and abs(width / height - 1.3) < 0.01
    assert Image.open(io.BytesIO(old)).size == (60, 40)


def test_a_blind_model_and_a_bad_picture_are_said(page, stand_in):
    open_page(page, stand_in.url)
    attach(page, "tomato.png", file_of())
    expect(page.get_by_role("alert")).to_contain_text("stand-in-135m cannot see images")
    expect(page.locator("#files li")).to_have_count(0)
    stand_in.model["capabilities"]["vision"] = True
    open_page(page, stand_in.url)
    attach(page, "broken.png", b"no picture")
    expect(page.get_by_role("alert")).to_contain_text("broken.png is no image that this browser can read")


def test_a_picture_goes_out_and_in_with_its_chat(page, seeing, tmp_path):
    data = file_of()
    attach(page, "tomato.png", data)
    ask(page, "What is it?")
    expect_answered(page)
    paths = {}
    for name in ("This chat (JSON)", "Markdown", "HTML page"):
        with page.expect_download() as download:
            menu(page, "Export", name)
        paths[name] = tmp_path / download.value.suggested_filename
        download.value.save_as(paths[name])
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    file = json.loads(paths["This chat (JSON)"].read_text())
    assert file["conversations"][0]["nodes"][0]["pictures"] == [{"name": "tomato.png", "picture": uri}]
    assert f"![tomato.png]({uri})" in paths["Markdown"].read_text()
    page.locator("#import-file").set_input_files(paths["This chat (JSON)"])
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("checkbox").set_checked(False)
    button(dialog, "Import").click()
    expect(chats(page)).to_have_count(2)
    expect(questions(page).locator("img")).to_be_visible()
    file["conversations"][0]["nodes"][0]["pictures"][0]["picture"] = "https://example.org/pixel.png"
    paths["This chat (JSON)"].write_text(json.dumps(file))
    page.locator("#import-file").set_input_files(paths["This chat (JSON)"])
    dialog.get_by_role("checkbox").set_checked(False)
    button(dialog, "Import").click()
    expect(chats(page)).to_have_count(3)
    expect(questions(page).locator("img")).to_have_count(0)         # nothing is fetched from elsewhere
    page.goto(paths["HTML page"].as_uri())
    expect(page.locator("img")).to_be_visible()
    assert page.locator("img").evaluate("image => image.naturalWidth") == 60
