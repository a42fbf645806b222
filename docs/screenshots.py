"""Makes the pictures of the documents: the page in light and dark, on a phone, and the terminal, with the default model.

    python docs/screenshots.py          needs chromium, playwright (in the test extra) and tmux
"""

import base64
import html
import io
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from browsing import (CHROMIUM, SLOW_MS, answers, ask, button, expect, expect_answered, fake_front, inside, menu, message_box,      # noqa: E402
                      open_page, playwright, questions, started_server)
import tiny_training                                                        # noqa: E402
import torch                                                                # noqa: E402
from page_server import StandIn                                              # noqa: E402

DROP = """([data, name]) => {
  const carried = new DataTransfer();
  carried.items.add(new File([Uint8Array.from(atob(data), letter => letter.charCodeAt(0))], name, {type: "image/png"}));
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: carried, bubbles: true, cancelable: true}));
}"""
FLAG = """Here it is:

```svg
<svg xmlns="http://www.w3.org/2000/svg" width="240" height="160" viewBox="0 0 3 2">
  <rect width="3" height="2" fill="#fff" stroke="#ddd" stroke-width=".02"/>
  <circle cx="1.5" cy="1" r=".6" fill="#bc002d"/>
</svg>
```
"""
QUESTIONS = ("What is the capital of Japan?", "Show me a Python function that reverses a string")
SIZES = {"light": ({"width": 1200, "height": 760}, "light"), "dark": ({"width": 1200, "height": 760}, "dark"),
         "phone": ({"width": 390, "height": 760}, "light")}
SGR = {"1": "font-weight:bold", "2": "color:#8b949e", "3": "font-style:italic", "4": "text-decoration:underline",
       "31": "color:#ff7b72", "36": "color:#56d4bc"}


def picture_of_page(browser, url, name):
    size, scheme = SIZES[name]
    phone = {"is_mobile": True, "has_touch": True, "device_scale_factor": 2} if name == "phone" else {}
    context = browser.new_context(viewport=size, color_scheme=scheme, **phone)
    page = context.new_page()
    open_page(page, url)
    ask(page, "/temperature 0")
    for count, question in enumerate(QUESTIONS, 1):
        ask(page, question)
        expect_answered(page, count)
    page.mouse.move(0, 0)
    page.evaluate("() => Promise.all(Parts.libraries.values()).then(() => null)")
    if name != "phone":
        questions(page).first.scroll_into_view_if_needed()
    page.screenshot(path=DOCS / f"{name}.png")
    context.close()


def look_through(page):
    inside(answers(page).last, "Token lens")
    page.get_by_role("listbox", name="Tokens of the answer").locator("span").nth(11).click()


def look_at_the_server(page):
    page.evaluate("Views.openStatus()")
    page.evaluate("for (const topic of ['rivers', 'hills', 'stars']) Server.post(Server.ROUTES.v1, {messages: [{role: 'user', content: topic}], max_tokens: 120})")
    page.wait_for_function("() => Status.shown.samples.length > 6 && Status.shown.samples.at(-1).speed < 20")
    page.evaluate("document.getElementById('status-charts').scrollIntoView()")


def compare(page):
    inside(answers(page).last, "Compare")
    button(page.get_by_role("dialog", name="Compare"), "Compare").click()
    expect(button(page, "Continue with this")).to_have_count(2, timeout=SLOW_MS)


def look_at_the_prompt(page):
    inside(answers(page).last, "Prompt")
    expect(page.locator("#prompt-facts")).to_contain_text("tokens")


def keep_prompts(page):
    page.evaluate("Prompts.keep([{name: 'Pirate', text: 'Talk like a pirate.'}, {name: 'Shorter', text: 'Say this in ten words: ', starter: true}])")
    menu(page, "Prompts")


def set_parameters(page):
    button(page, "Settings").click()
    page.get_by_role("dialog", name="Settings").get_by_role("heading", name="Settings").click()


LOOKS = {"settings": (set_parameters, 1200, 620, "dark"), "lens": (look_through, 1200, 620, "light"), "server": (look_at_the_server, 390, 760, "dark"), "compare": (compare, 1200, 620, "dark"),
         "prompt": (look_at_the_prompt, 900, 620, "light"), "prompts": (keep_prompts, 900, 620, "light")}


def picture_of_looks(browser, url, name):
    act, width, height, scheme = LOOKS[name]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=2 if width < 500 else 1)
    open_page(page, url)
    for text in ("/temperature 1", "/seed 3", "/maxtokens 60", "Why is the sky blue? Answer in two sentences."):
        ask(page, text)
    expect_answered(page)
    act(page)
    page.screenshot(path=DOCS / f"{name}.png")
    page.context.close()


def picture_of_a_run(browser):
    """A tiny model that learns a text as base, then again as SFT and RL. The text is its held-out text too."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        shutil.copytree(ROOT / "tests/fixtures/nanochat/gen1/tokenizer", base / "tokenizer")
        tokenizer = pickle.loads((base / "tokenizer/tokenizer.pkl").read_bytes())
        (text := Path(folder) / "text.txt").write_text(tiny_training.TEXT)
        ids = tokenizer.encode_ordinary(tiny_training.TEXT)
        for _, model in tiny_training.train(base, 60, 5, ids=ids):
            pass
        picture_of_evaluations(browser, base)
        tokens = torch.tensor(ids)[:tiny_training.CONFIG["sequence_len"]]
        for step in range(5, 65, 5):
            note_loss(base / "base_checkpoints" / "d2", step, tokens)
        train_on(model, tokens, base / "chatsft_checkpoints" / "d2", "sft.log", lambda step, loss: f"step {step:05d} (50.0%) | loss: {loss:.6f} | lrm: 1.00")
        train_on(model, tokens, base / "chatrl_checkpoints" / "d2", "rl.log", lambda step, loss: f"Step {step}/30 | Average reward: {1 - 4 * loss:.4f} | Average sequence length: 9")
        with started_server("--watch", str(base), "--watch-text", str(text), "--results", str(Path(folder) / "results"), "--nice", "0") as url:
            page = browser.new_page(viewport={"width": 1200, "height": 1080})
            open_page(page, url, "#run/d2")
            expect(page.get_by_role("img", name=re.compile("^d2-base@5: .*d2-base@60: .*d2-rl@30: "))).to_be_visible(timeout=20 * SLOW_MS)
            expect(page.locator("#run-now")).not_to_contain_text("for a score", timeout=10 * SLOW_MS)
            page.evaluate("() => { for (let at = 0; at < 3; at++) document.getElementById('run-step').stepDown(); document.getElementById('run-step').oninput({target: document.getElementById('run-step')}); }")
            page.screenshot(path=DOCS / "run.png")
            page.context.close()


def note_loss(folder, step, tokens):
    """Write the average of the loss, which begins at 0, into the meta file of a base checkpoint, as upstream does."""
    model, meta = tiny_training.load(folder / f"model_{step:06d}.pt"), folder / f"meta_{step:06d}.json"
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens[:-1]), tokens[1:]).item()
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"loop_state": {"smooth_train_loss": loss * (1 - 0.9 ** step)}}))


def train_on(model, tokens, folder, log, line):
    """Another stage: 30 steps, of which five are saved, with a log beside them."""
    lines = []
    for step in range(1, 31):
        lines.append(line(step, model.learn(tokens)))
        if step % 6 == 0:
            tiny_training.save(model, folder, step)
    (folder / log).write_text("\n".join(lines) + "\n")


def picture_of_evaluations(browser, base):
    """The samples and the judged items of a run's steps."""
    folder, text = base.parent, tiny_training.TEXT
    (folder / "prompts.txt").write_text("\n".join(text[at:at + 24].strip() for at in (0, 24, 60)))
    words = text.split()
    rows = [{"context": " ".join(words[at:at + 5]), "continuation": words[at + 5]} for at in range(len(words) - 5)]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with started_server("--watch", str(base), "--watch-prompts", str(folder / "prompts.txt"), "--watch-suite", str(folder / "words.jsonl"),
                        "--results", str(folder / "results"), "--nice", "0") as url:
        page = browser.new_page(viewport={"width": 1200, "height": 760})
        open_page(page, url, "#run/d2")
        expect(page.locator("#run-samples tbody tr")).to_have_count(12, timeout=10 * SLOW_MS)
        expect(page.locator("#flips-after option")).to_have_count(12, timeout=10 * SLOW_MS)
        page.locator("#flips-before").select_option("30")
        button(page, "Show items").click()
        expect(page.locator("#flips li").first).to_be_visible()
        page.evaluate("document.querySelector('#run-more').scrollIntoView()")
        page.screenshot(path=DOCS / "steps.png")
        page.context.close()


def picture_of_a_preview(browser):
    stand_in = StandIn()
    page = browser.new_page(viewport={"width": 900, "height": 620})
    open_page(page, stand_in.url)
    page.evaluate("text => Chats.importAll(Tree.importOf(text), 'it')", json.dumps({"messages": [
        {"role": "user", "content": "Draw the flag of Japan as SVG."}, {"role": "assistant", "content": FLAG}]}))
    button(page, "Preview").click()
    expect(page.frame_locator("iframe").locator("circle")).to_be_visible()
    page.mouse.move(0, 0)
    page.wait_for_function("() => document.querySelector('iframe').style.height")
    page.screenshot(path=DOCS / "preview.png")
    page.context.close()
    stand_in.close()


def picture_of_calls(browser):
    stand_in = StandIn()
    stand_in.model["capabilities"]["tools"] = True
    page = browser.new_page(viewport={"width": 900, "height": 700})
    open_page(page, stand_in.url)
    ask(page, "call")
    expect(page.get_by_role("region", name="Call of look_up")).to_be_visible()
    page.screenshot(path=DOCS / "calls.png")
    page.context.close()
    stand_in.close()


def landscape():
    """A PNG of a sun over a sea with a sail."""
    from PIL import Image, ImageDraw
    image = Image.linear_gradient("L").resize((720, 480))
    image = Image.merge("RGB", [image.point(lambda value, low=low, high=high: low + (high - low) * value // 255) for low, high in ((96, 250), (150, 214), (222, 170))])
    draw = ImageDraw.Draw(image)
    draw.ellipse((470, 110, 570, 210), fill="#fff3c4")
    draw.rectangle((0, 310, 720, 480), fill="#1f5f8b")
    for row in range(12):
        draw.line((60 * row % 400, 330 + 12 * row, 60 * row % 400 + 180, 330 + 12 * row), fill="#3f86b3", width=2)
    draw.polygon(((190, 140), (190, 320), (300, 320)), fill="#f6f2ea")
    draw.polygon(((180, 170), (180, 320), (110, 320)), fill="#d9503f")
    draw.polygon(((100, 330), (310, 330), (270, 370), (140, 370)), fill="#4a2f23")
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def picture_of_an_image(browser):
    """A question about an image; another image is dropped for the next question."""
    stand_in, drawn = StandIn(), landscape()
    stand_in.model["capabilities"]["vision"] = True
    page = browser.new_page(viewport={"width": 900, "height": 700})
    open_page(page, stand_in.url)
    data = base64.b64encode(drawn).decode()
    page.evaluate("text => Chats.importAll(Tree.importOf(text), 'it')", json.dumps({"messages": [
        {"role": "user", "content": "Which colours have the sails?", "pictures": [{"name": "sails.png", "picture": f"data:image/png;base64,{data}"}]},
        {"role": "assistant", "content": "The boat has **two sails**: the large one is white, the small one before the mast is red."}]}))
    page.reload()
    expect(questions(page).get_by_role("img")).to_be_visible()
    page.evaluate(DROP, [data, "evening.png"])
    expect(page.locator("#files li img")).to_be_visible()
    message_box(page).fill("And is it morning or evening?")
    page.mouse.move(0, 0)
    page.screenshot(path=DOCS / "images.png")
    page.context.close()
    stand_in.close()


def picture_of_a_text(browser):
    with fake_front(pieces=[" there", " was", " a", " mill"], chats=False) as url:
        page = browser.new_page(viewport={"width": 900, "height": 400}, color_scheme="dark")
        open_page(page, url)
        for count, text in enumerate(("Once upon a time", " by the river, and in it"), 1):
            ask(page, text)
            expect_answered(page, count)
        page.screenshot(path=DOCS / "text.png")
        page.context.close()


def terminal_lines(columns, rows):
    """The lines that `chat` shows in a terminal, with SGR sequences, as tmux sees them."""
    name = f"screenshot-{time.time_ns()}"
    chat = shlex.join([sys.executable, str(ROOT / "chat_server.py"), "chat", "-t", "0", "--no-history"])
    tmux = lambda *words: subprocess.run(["tmux", *words], check=True, capture_output=True, text=True).stdout       # noqa: E731
    tmux("new-session", "-d", "-s", name, "-x", str(columns), "-y", str(rows), f"{chat} 2>/dev/null")
    try:
        shown = lambda: tmux("capture-pane", "-t", name, "-p", "-e")         # noqa: E731
        await_text(shown, "lists the commands")
        for count, text in enumerate(QUESTIONS, 1):
            tmux("send-keys", "-t", name, text, "Enter")
            await_text(lambda: "first token after" * (shown().count("after") >= count), "first token after")
        tmux("send-keys", "-t", name, "/show", "Enter")
        await_text(shown, "max_tokens")
        return shown().rstrip().split("\n")
    finally:
        tmux("kill-session", "-t", name)


def await_text(shown, text):
    deadline = time.monotonic() + 120
    while text not in re.sub(r"\x1b\[[\d;]*m", "", shown()):
        if time.monotonic() > deadline:
            raise SystemExit(f"{text!r} did not come:\n{shown()}")
        time.sleep(0.1)


def as_html(lines):
    """Spans for the SGR sequences of tmux, which switches single attributes on and off."""
    parts, styles = [], set()
    for codes, text in re.findall(r"\x1b\[([\d;]*)m|([^\x1b]+)", "\n".join(lines)):
        if text:
            style = ";".join(SGR[code] for code in sorted(styles) if code in SGR)
            parts.append(f'<span style="{style}">{html.escape(text)}</span>')
        for code in (codes or "0").split(";") if not text else ():
            styles = set() if code == "0" else styles - {"31", "36"} if code == "39" else styles | {code}
    return "".join(parts)


def picture_of_terminal(browser):
    page = browser.new_page(viewport={"width": 800, "height": 400})
    page.set_content("<body style='margin:0;background:#0d1117'><pre style='display:inline-block;margin:0;padding:18px 22px;"
                     "color:#e6edf3;font:14px/1.45 DejaVu Sans Mono,monospace'>" + as_html(terminal_lines(84, 50)) + "</pre></body>")
    page.locator("pre").screenshot(path=DOCS / "terminal.png")


def main():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        picture_of_terminal(browser)
        picture_of_calls(browser)
        picture_of_a_run(browser)
        picture_of_a_preview(browser)
        picture_of_an_image(browser)
        picture_of_a_text(browser)
        with started_server() as url:
            for name in SIZES:
                picture_of_page(browser, url, name)
            for name in LOOKS:
                picture_of_looks(browser, url, name)
        browser.close()
    for path in sorted(DOCS.glob("*.png")):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
