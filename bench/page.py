"""What the page costs its browser: work on the main thread for each frame of a growing answer, long chats, the first paint.

    python bench/page.py [--chromium PATH] [--rate 200]

A server with scripted answers (tests/support/page_server.py) streams at `--rate` tokens per second into a headless Chromium; the
numbers are from Chromium's own trace: all tasks of the page's main thread, attributed to the frame in which they end. The first
paint and the bytes are those of the real server's page without a model.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import page_server                                                              # noqa: E402
from browsing import CHROMIUM, ask, fake_front, open_page, playwright           # noqa: E402

PROSE = ("The **sorting** of a list is `O(n log n)`; see [the page](https://example.org). It takes some $n$ steps, and then "
         "some more. ")
LIST = "\n- an item of a list\n- another *item*\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\nx = sorted(items)\n```\n\n"
CODE = "def swap(pair: tuple) -> tuple:\n    a, b = pair  # both at once\n    return b, a\n\n\n"


def pieces_of(text, count):
    size = len(text) / count
    return [text[round(i * size):round((i + 1) * size)] for i in range(count)]


ANSWERS = {         # question -> the answer's pieces, a token each
    "4,000 tokens of Markdown": pieces_of(((PROSE * 6 + LIST) * 20)[:16_000], 4000),
    "one code block of 20 KB": pieces_of("```python\n" + (CODE * 300)[:20_480] + "\n```\n", 5000),
}


def script(rate):
    async def stream(server, question):
        began = asyncio.get_running_loop().time()
        for number, piece in enumerate(ANSWERS[question]):
            await asyncio.sleep(max(0.0, began + number / rate - asyncio.get_running_loop().time()))
            yield {"token": piece, "gpu": 0}
        yield page_server.done(len(ANSWERS[question]))
    return stream


def frame_costs(trace):
    """ms of work on the page's main thread for each frame that was drawn."""
    events = trace["traceEvents"]
    threads = {(e["pid"], e["tid"]) for e in events if e.get("name") == "thread_name" and e["args"]["name"] == "CrRendererMain"}
    drawn = [e for e in events if e.get("name") == "FireAnimationFrame" and (e["pid"], e["tid"]) in threads]
    busiest = max(threads, key=lambda thread: sum((e["pid"], e["tid"]) == thread for e in drawn))
    mine = sorted((e for e in events if (e.get("pid"), e.get("tid")) == busiest and e.get("ph") == "X"), key=lambda e: e["ts"])
    tasks = [e for e in mine if e["name"] == "ThreadControllerImpl::RunTask"]
    ends = [e["ts"] for e in mine if e["name"] == "FireAnimationFrame"]
    costs, work, next_end = [], 0.0, 0
    for task in tasks:
        work += task.get("tdur", task["dur"]) / 1e3            # the thread's own time: other programs do not count
        if next_end < len(ends) and task["ts"] + task["dur"] >= ends[next_end]:
            costs.append(work)
            work = 0.0
            while next_end < len(ends) and task["ts"] + task["dur"] >= ends[next_end]:
                next_end += 1
    return costs


def traced(browser, page, work):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        browser.start_tracing(page=page, path=path, categories=["devtools.timeline", "toplevel"])
        work()
        browser.stop_tracing()
        return frame_costs(json.loads(path.read_text()))


def told(name, costs):
    costs = sorted(costs)
    print(f"{name:32} {len(costs):5} frames: median {statistics.median(costs):5.2f} ms, p99 {costs[len(costs) * 99 // 100]:6.2f} ms, "
          f"largest {costs[-1]:6.2f} ms, above 8 ms {sum(cost > 8 for cost in costs)}", flush=True)


def measure_answers(browser, rate):
    page_server.SCRIPTS |= {question: script(rate) for question in ANSWERS}
    server = page_server.StandIn()
    for question, pieces in ANSWERS.items():
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        open_page(page, server.url)

        def answer():
            ask(page, question)
            page.wait_for_function("() => Chat.path.at(-1)?.timings", timeout=2e5)
        told(question, traced(browser, page, answer))
        page.close()
    server.close()


SEED = """turns => {
  const chat = Tree.newConversation({title: "long"}), nodes = [];
  for (let i = 0; i < turns; i++) nodes.push(Tree.newNode(chat.id, nodes.at(-1)?.id ?? null, i % 2 ? "assistant" : "user",
    i % 2 ? "An **answer** with `code`\\n\\n```py\\nx = 1\\n```\\n\\n" + "and words ".repeat(40) : `Question ${i}`));
  chat.leaf = nodes.at(-1).id;
  Chat.addChat(chat, nodes);
  Page.render();
  return Store.flushing.then(() => chat.id);
}"""
OPEN = """async id => {
  const began = performance.now();
  await Chat.open(id);
  await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
  return performance.now() - began;
}"""
SCROLL = """async () => {
  const log = document.getElementById("log");
  for (let i = 0; i < 200; i++) {
    log.scrollTop -= 600;
    await new Promise(requestAnimationFrame);
  }
}"""


def measure_long_chat(browser):
    server = page_server.StandIn()
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    open_page(page, server.url)
    chat = page.evaluate(SEED, 1000)
    times = []
    for _ in range(5):
        page.evaluate("() => Chat.openNew()")
        times.append(page.evaluate(OPEN, chat))
    print(f"{'1,000 turns':32} opened in {statistics.median(times):.0f} ms (largest of 5: {max(times):.0f} ms)")
    told("scrolling through 1,000 turns", traced(browser, page, lambda: page.evaluate(SCROLL)))
    server.close()


def measure_first_paint(browser):
    paints = []
    with fake_front() as url:
        for _ in range(5):
            context = browser.new_context(viewport={"width": 1280, "height": 800})
            page, sizes = context.new_page(), []
            page.context.new_cdp_session(page)
            session = context.new_cdp_session(page)
            session.send("Network.enable")
            session.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
            open_page(page, url)
            page.wait_for_load_state("networkidle")
            paints.append(page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime"))
            context.close()
    print(f"{'first contentful paint':32} {statistics.median(paints):.0f} ms (largest of 5: {max(paints):.0f} ms)")
    print(f"{'sent before the first answer':32} {sum(sizes) / 1024:.0f} KB in {len(sizes)} responses")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chromium", default=CHROMIUM)
    parser.add_argument("--rate", type=float, default=200)
    arguments = parser.parse_args()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        measure_first_paint(browser)
        measure_long_chat(browser)
        measure_answers(browser, arguments.rate)
        browser.close()


if __name__ == "__main__":
    main()
