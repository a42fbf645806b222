"""Makes the moving pictures of the page, at the speed that it has here: docs/moving.png, answering with the default model, and
docs/running-tools.png, where the model calls tools with the adapter of tests/fixtures/caller.

    python docs/moving_picture.py [moving] [running-tools]          needs chromium and playwright (in the test extra)

An animated PNG: each frame after the first has only the rectangle that changed, and stays for as long as it did. Where pictures do not
move, the last one is shown.
"""

import json
import re
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests" / "support")]

from browsing import CHROMIUM, answers, ask, button, expect, message_box, open_page, playwright, started_server       # noqa: E402

SIZE = {"width": 960, "height": 640}        # all of the empty page
QUESTIONS = "What is the capital of Japan?", "Show me a Python function that reverses a string."
CALLER = str(DOCS.parent / "tests/fixtures/caller")
TIME = "What time is it in Tokyo?"
STILL_MS, LAST_MS, MOST_MS = 700, 4000, 1500      # before a question, at the end, and for what takes long
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunks(data):
    """(type, content) of each chunk of a PNG."""
    at = len(SIGNATURE)
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        yield data[at + 4:at + 8], data[at + 8:at + 8 + length]
        at += length + 12


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def pixels(data):
    """(height, width, 3) uint8 of a screenshot: a PNG of RGB or RGBA with 8 bits, not interlaced."""
    found = list(chunks(data))
    width, height, depth, colours, _, _, interlaced = struct.unpack(">IIBBBBB", dict(found)[b"IHDR"])
    assert depth == 8 and colours in (2, 6) and not interlaced
    channels = 3 if colours == 2 else 4
    lines = numpy.frombuffer(zlib.decompress(b"".join(content for kind, content in found if kind == b"IDAT")), numpy.uint8)
    lines = lines.reshape(height, 1 + width * channels)
    above = numpy.zeros((width, channels), numpy.uint8)
    image = numpy.empty((height, width, channels), numpy.uint8)
    for row, line in enumerate(lines):
        above = image[row] = unfiltered(line[0], line[1:].reshape(width, channels), above)
    return image[:, :, :3]


def unfiltered(kind, line, above):
    """A line without its filter (section 9 of the PNG specification)."""
    if kind == 0:
        return line
    if kind == 1:
        return numpy.cumsum(line, axis=0, dtype=numpy.uint8)
    if kind == 2:
        return line + above
    done, left, corner = numpy.empty_like(line), [0] * line.shape[1], [0] * line.shape[1]
    for x, (filtered, up) in enumerate(zip(line.tolist(), above.tolist())):
        near = [(a + b) // 2 for a, b in zip(left, up)] if kind == 3 else list(map(paeth, left, up, corner))
        left, corner = [(value + guess) & 255 for value, guess in zip(filtered, near)], up
        done[x] = left
    return done


def paeth(left, up, corner):
    by_left, by_up, by_corner = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
    return left if by_left <= by_up and by_left <= by_corner else up if by_up <= by_corner else corner


def packed(image):
    """The compressed lines of an image, without a filter: text on one colour is smallest that way."""
    return zlib.compress(numpy.insert(image.reshape(len(image), -1), 0, 0, axis=1).tobytes(), 9)


def changed(before, after):
    """(top, bottom, left, right) of the part that differs; None if nothing does."""
    rows, columns = ((before != after).any(axis=2).any(axis=axis).nonzero()[0] for axis in (1, 0))
    return (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if len(rows) else None


def animated(shots):
    """An animated PNG of screenshots: (PNG, how long it is shown in ms). One that shows nothing new prolongs the one before."""
    frames, before, data_before = [], None, None
    for data, duration_ms in shots:
        if data == data_before:
            frames[-1][2] += duration_ms
            continue
        data_before = data
        image = pixels(data)
        area = (0, image.shape[0], 0, image.shape[1]) if before is None else changed(before, image)
        if area is None:
            frames[-1][2] += duration_ms
        else:
            top, bottom, left, right = area
            frames.append([area, packed(image[top:bottom, left:right]), duration_ms])
        before = image
    height, width, _ = before.shape
    parts = [SIGNATURE, chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), chunk(b"acTL", struct.pack(">II", len(frames), 0)),
             chunk(b"IDAT", packed(before))]        # without a chunk fcTL before it: no frame
    number = 0
    for (top, bottom, left, right), content, duration_ms in frames:
        parts.append(chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, right - left, bottom - top, left, top, int(duration_ms), 1000, 0, 0)))
        parts.append(chunk(b"fdAT", struct.pack(">I", number + 1) + content))
        number += 2
    return b"".join([*parts, chunk(b"IEND", b"")])


class Film:
    """Screenshots of a page: (PNG, how long it is shown in ms)."""

    def __init__(self, page):
        self.page = page
        self.shots = []

    def take(self, duration_ms=STILL_MS):
        self.shots.append((self.page.screenshot(animations="disabled"), duration_ms))

    def ask(self, question):
        """Type a question, piece by piece, and send it."""
        for end in range(2, len(question) + 2, 3):
            message_box(self.page).fill(question[:end])
            self.take(70)
        self.take()
        ask(self.page, question)

    def run_until(self, has_ended):
        """Take pictures as fast as the page gives them, until something has ended."""
        running, started = True, time.monotonic()
        while running:
            running = not has_ended()
            picture, now = self.page.screenshot(animations="disabled"), time.monotonic()
            self.shots.append((picture, min(1000 * (now - started), MOST_MS)))
            started = now

    def click(self, element):
        """Show where the click goes, and click."""
        element.hover()
        self.take()
        element.click()

    def end(self):
        self.page.mouse.move(0, 0)
        self.take(LAST_MS)


def answered(page, count):
    return answers(page).count() >= count and "tok/s" in (answers(page).last.text_content() or "")


def film_answers(page):
    film = Film(page)
    film.take()
    for count, question in enumerate(QUESTIONS, 1):
        film.ask(question)
        film.run_until(lambda: answered(page, count))
        page.mouse.move(0, 0)
        film.take()
    film.end()
    return film.shots


def film_tools(page):
    """A tool is chosen, the model calls it, the reader agrees, and the model says what it was told."""
    film = Film(page)
    expect(button(page, "Tools")).to_be_visible()
    film.take()
    film.click(button(page, "Tools"))
    dialog = page.get_by_role("dialog", name="Tools")
    film.take()
    film.click(dialog.get_by_role("checkbox", name=re.compile("^time")))
    film.take()
    button(dialog, "Done").click()
    film.ask(TIME)
    card = page.get_by_role("region", name="Call of time__get_current_time")
    film.run_until(lambda: button(card, "Once").count())
    film.take(LAST_MS // 2)
    film.click(button(card, "Once"))
    film.run_until(lambda: page.evaluate("Chat.lastNode().timings && !Chat.lastNode().calls"))
    film.end()
    return film.shots


def recorded(name, film, *flags):
    """Write docs/NAME.png: what a film shows of a server with these flags."""
    with playwright.sync_playwright() as driver, started_server(*flags, "--temperature", "0") as url:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light", reduced_motion="reduce")
        open_page(page, url)
        shots = film(page)
        browser.close()
    target = DOCS / f"{name}.png"
    target.write_bytes(animated(shots))
    print(f"docs/{name}.png: {target.stat().st_size / 1024:.0f} KB, {len(shots)} screenshots, {sum(ms for _, ms in shots) / 1000:.1f} s")


def main():
    wanted = sys.argv[1:] or ["moving", "running-tools"]
    if "moving" in wanted:
        recorded("moving", film_answers)
    if "running-tools" in wanted:
        with tempfile.TemporaryDirectory() as folder:
            config = Path(folder) / "mcp.json"
            config.write_text(json.dumps({"mcpServers": {"time": {"command": sys.executable, "args": ["-m", "mcp_server_time"]}}}))
            recorded("running-tools", film_tools, "--lora", CALLER, "--mcp-config", str(config))


if __name__ == "__main__":
    main()
