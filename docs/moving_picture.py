"""Makes docs/moving.png, the moving picture of the README: the page, answering with the default model, at the speed that it has here.

    python docs/moving_picture.py          needs chromium and playwright (in the test extra)

An animated PNG: each frame after the first has only the rectangle that changed, and stays for as long as it did. Where pictures do not
move, the last one is shown.
"""

import struct
import sys
import time
import zlib
from pathlib import Path

import numpy

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests" / "support")]

from browsing import CHROMIUM, answers, ask, message_box, open_page, playwright, started_server       # noqa: E402

SIZE = {"width": 960, "height": 640}        # all of the empty page
QUESTIONS = "What is the capital of Japan?", "Show me a Python function that reverses a string."
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
    """The compressed lines of an image, each as its difference from the one above."""
    lines = numpy.concatenate([image[:1], image[1:] - image[:-1]]).reshape(len(image), -1)
    return zlib.compress(numpy.insert(lines, 0, 2, axis=1).tobytes(), 9)


def changed(before, after):
    """(top, bottom, left, right) of the part that differs; None if nothing does."""
    rows, columns = ((before != after).any(axis=2).any(axis=axis).nonzero()[0] for axis in (1, 0))
    return (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if len(rows) else None


def animated(shots):
    """An animated PNG of screenshots: (PNG, how long it is shown in ms). One that shows nothing new prolongs the one before."""
    frames, before = [], None
    for data, duration_ms in shots:
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


def film(page):
    """Screenshots of the conversation: (PNG, how long it is shown in ms)."""
    def take(duration_ms):
        shots.append((page.screenshot(animations="disabled"), duration_ms))

    shots = []
    take(STILL_MS)
    for count, question in enumerate(QUESTIONS, 1):
        for end in range(2, len(question) + 2, 3):
            message_box(page).fill(question[:end])
            take(70)
        take(STILL_MS)
        ask(page, question)
        running, started = True, time.monotonic()
        while running:
            running = answers(page).count() < count or "tok/s" not in (answers(page).last.text_content() or "")
            picture, now = page.screenshot(animations="disabled"), time.monotonic()
            shots.append((picture, min(1000 * (now - started), MOST_MS)))
            started = now
        page.mouse.move(0, 0)
        take(LAST_MS if question == QUESTIONS[-1] else STILL_MS)
    return shots


def main():
    with playwright.sync_playwright() as driver, started_server("--temperature", "0") as url:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light", reduced_motion="reduce")
        open_page(page, url)
        shots = film(page)
        browser.close()
    target = DOCS / "moving.png"
    target.write_bytes(animated(shots))
    print(f"docs/moving.png: {target.stat().st_size / 1024:.0f} KB, {len(shots)} screenshots, {sum(ms for _, ms in shots) / 1000:.1f} s")


if __name__ == "__main__":
    main()
