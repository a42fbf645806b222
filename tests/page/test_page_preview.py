"""Previews of HTML and SVG code: what they show, and what code that attacks cannot do in them."""

import base64
import hashlib
import json
import re
import socket
import threading
import urllib.request

import pytest

from browsing import ROOT, answers, ask, button, expect, expect_accessible, expect_answered, fake_front, needs_browser, open_page, playwright, settled

pytestmark = needs_browser

PAGE = """<!doctype html>
<html><head><style>h1 { color: rgb(1, 2, 3); } body { margin: 0; }</style></head>
<body class="mine"><h1>Hello</h1><p>A <b>page</b></p><div style="height: 4000px"></div></body></html>"""
DRAWING = '<svg xmlns="http://www.w3.org/2000/svg" width="120" height="80"><circle cx="60" cy="40" r="35" fill="teal"/></svg>'
HOSTILE = """<style>@import "ELSEWHERE/a.css"; body { background: url(ELSEWHERE/b.png); }</style>
<link rel="stylesheet" href="ELSEWHERE/c.css"><link rel="dns-prefetch" href="ELSEWHERE"><link rel="preconnect" href="ELSEWHERE">
<meta http-equiv="refresh" content="0; url=ELSEWHERE/d"><base href="ELSEWHERE/">
<script>document.body.dataset.hacked = 1; parent.hacked = 1</script><script src="ELSEWHERE/e.js"></script>
<img src="ELSEWHERE/f.png" srcset="ELSEWHERE/g.png 2x" onerror="document.body.dataset.hacked = 2">
<img src=x onerror="document.body.dataset.hacked = 3"><svg onload="document.body.dataset.hacked = 4"><image href="ELSEWHERE/h.png"/>
<a href="javascript:document.body.dataset.hacked = 5"><text y="20">in the drawing</text></a><use href="ELSEWHERE/i.svg#x"/></svg>
<iframe src="ELSEWHERE/j"></iframe><iframe srcdoc="<script>parent.document.body.dataset.hacked = 6</script>"></iframe>
<object data="ELSEWHERE/k"></object><embed src="ELSEWHERE/l"><video src="ELSEWHERE/m" poster="ELSEWHERE/n"></video>
<form action="ELSEWHERE/o"><button id="go">Send</button></form>
<a id="away" href="ELSEWHERE/p">away</a> <a id="script" href="javascript:document.body.dataset.hacked=7" onclick="document.body.dataset.hacked=8">script</a>
<a id="top" target="_top" href="ELSEWHERE/q">top</a><p id="end">the end</p>"""


@pytest.fixture
def elsewhere():
    """The address of another server, and the connections that it got."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def accept():
            while True:
                try:
                    connections.append(server.accept())
                except OSError:
                    return
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://elsewhere.test:{server.getsockname()[1]}", connections
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def attacked(browser):
    """A page whose console may have violations of the policy."""
    context = browser.new_context()
    with fake_front() as url:
        page = context.new_page()
        open_page(page, url)
        yield page
    context.close()


def shown(page, *blocks):
    """A chat with one answer of these code blocks (language, code); returns the answer."""
    text = "\n\n".join(f"```{language}\n{code}\n```" for language, code in blocks)
    messages = [{"role": "user", "content": "Draw"}, {"role": "assistant", "content": text}]
    page.evaluate("text => Chats.importAll(Tree.importOf(text), 'it')", json.dumps({"messages": messages}))
    settled(page)
    return answers(page)


@pytest.fixture
def front(page):
    with fake_front(pieces=["```html\n", "<b>bo", "ld</b>\n```\n"]) as url:
        open_page(page, url)
        yield page


def test_only_html_and_drawings_have_a_preview(front, theme):
    answer = shown(front, ("html", PAGE), ("svg", DRAWING), ("xml", f'<?xml version="1.0"?>\n{DRAWING}'), ("xml", "<note/>"), ("python", "x = 1"))
    previews = button(answer, "Preview")
    expect(previews).to_have_count(3)
    expect(answer.locator("iframe")).to_have_count(0)
    for preview in previews.all():
        preview.click()
        expect(preview).to_have_attribute("aria-pressed", "true")
    frames = [answer.frame_locator("iframe").nth(i) for i in range(3)]
    expect(frames[0].get_by_role("heading", name="Hello")).to_have_css("color", "rgb(1, 2, 3)")
    expect(frames[0].locator("body.mine")).to_have_css("margin", "0px")
    for frame in frames[1:]:
        expect(frame.locator("circle")).to_be_visible()
    heights = lambda: answer.locator("iframe").evaluate_all("all => all.map(each => each.clientHeight)")       # noqa: E731
    front.wait_for_function("() => [...document.querySelectorAll('iframe')].every(each => each.style.height)")
    assert heights()[0] <= 0.7 * 800 and 80 <= heights()[1] < 130       # as high as what it shows, but no higher than most of the window
    expect(answer.get_by_text("Scripts do not run here").first).to_be_visible()
    expect_accessible(front, theme=theme)
    previews.first.click()
    expect(answer.locator("iframe")).to_have_count(2)


def test_a_growing_answer_can_be_previewed_as_html(front):
    ask(front, "one")
    expect_answered(front)
    button(answers(front), "Preview").click()
    expect(answers(front).frame_locator("iframe").locator("b")).to_have_text("bold")


def test_code_in_a_preview_runs_nothing(attacked, elsewhere):
    url, connections = elsewhere
    answer = shown(attacked, ("html", HOSTILE.replace("ELSEWHERE", url)))
    button(answer, "Preview").click()
    frame = answer.frame_locator("iframe")
    expect(frame.locator("#end")).to_be_visible()
    for name in ("#away", "#script", "#top", "svg text"):
        frame.locator(name).click()
    expect(frame.locator("#end")).to_be_visible()               # it is still there
    found = frame.locator("body").evaluate("""body => [body.dataset.hacked, origin, body.ownerDocument.querySelectorAll(
        "script, iframe, object, embed, link, meta, form, base").length]""")
    assert found == [None, "null", 0] and connections == [] and len(attacked.context.pages) == 1 and attacked.evaluate("window.hacked") is None
    with pytest.raises(playwright.Error, match="SecurityError|cross-origin"):
        frame.locator("body").evaluate("() => parent.document.title")


ANIMATED = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="300" height="120"><a href="#here"><animate attributeName="href" to="PLACE/a" dur="1ms" fill="freeze"/>
<rect id="animated" width="50" height="50"/></a><a href="#here"><set attributeName="href" to="PLACE/b"/><rect id="set" x="60" width="50" height="50"/></a>
<a xlink:href="#here"><animate attributeName="xlink:href" values="PLACE/c;PLACE/c" dur="9s"/><rect id="linked" x="120" width="50" height="50"/></a></svg>
<img usemap="#m" id="mapped" src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=" width="50" height="50"><map name="m"><area shape="rect" coords="0,0,50,50" href="PLACE/d" ping="PLACE/e"></map>"""


@pytest.mark.parametrize("pressed", [{}, {"button": "middle"}, {"modifiers": ["Control"]}], ids=str)
def test_an_animated_link_of_a_drawing_leads_nowhere(attacked, elsewhere, pressed):
    """Neither to another server nor to this one, whose addresses the page's policy admits in frames."""
    url, connections = elsewhere
    asked = []
    attacked.context.on("request", lambda request: asked.append(request.url))
    for place in (url, attacked.url.rstrip("/")):
        answer = shown(attacked, ("html", ANIMATED.replace("PLACE", place)))
        button(answer, "Preview").click()
        frame = answer.frame_locator("iframe")
        expect(frame.locator("#mapped")).to_be_visible()
        frame.locator("body").evaluate("() => new Promise(end => setTimeout(end, 50))")     # the animations have begun
        for name in ("#animated", "#set", "#linked", "#mapped"):
            frame.locator(name).click(**pressed)
        expect(frame.locator("#animated")).to_be_visible()
    assert connections == [] and len(attacked.context.pages) == 1
    assert not [each for each in asked if each.rpartition("/")[2] in "abcde"], asked


def test_a_link_to_a_place_in_the_code_scrolls_there(front):
    answer = shown(front, ("html", '<a href="#pl%C3%A4ce">there</a><a href="#">top</a><a href="#nowhere">x</a><div style="height: 4000px"></div><p id="pläce">the place</p>'))
    button(answer, "Preview").click()
    frame = answer.frame_locator("iframe")
    expect(frame.locator("p")).not_to_be_in_viewport()
    frame.get_by_text("there").click()
    expect(frame.locator("p")).to_be_in_viewport()


def allowing(page, *tags):
    """Serves the page's frame without its cleaning of these tags; its script has another hash then."""
    text = (ROOT / "static/preview.html").read_text()
    for tag in tags:
        text = text.replace(f"{tag}, ", "")
    script = re.search("<script>(.*?)</script>", text, re.S)[1]
    text = re.sub("sha256-[^']*", "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(), text)
    page.route("**/preview.html", lambda route: route.fulfill(response=route.fetch(), body=text))


def test_the_frame_s_own_policy_backs_the_cleaning(attacked, elsewhere):
    url, connections = elsewhere
    allowing(attacked, "script", "iframe", "frame", "frameset", "object", "base")
    answer = shown(attacked, ("html", HOSTILE.replace("ELSEWHERE", url)))
    button(answer, "Preview").click()
    frame = answer.frame_locator("iframe").first
    expect(frame.locator("#end")).to_be_visible()
    assert frame.locator("body").evaluate("body => [body.dataset.hacked, body.ownerDocument.querySelectorAll('script, iframe').length]") == [None, 4]
    assert connections == [] and attacked.evaluate("window.hacked") is None


def test_the_page_s_policy_stops_a_frame_s_redirect(attacked, elsewhere):
    url, connections = elsewhere
    allowing(attacked, "meta")
    with attacked.expect_console_message(lambda message: url in message.text and "frame-src" in message.text or "default-src" in message.text):
        button(shown(attacked, ("html", f'<meta http-equiv="refresh" content="0; url={url}/d"><p>the end</p>')), "Preview").click()
    assert connections == []


def test_the_frame_admits_one_script_of_the_page():
    text = (ROOT / "static/preview.html").read_text()
    script = re.search("<script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert f"script-src 'sha256-{digest}';" in policy and policy.startswith("default-src 'none';") and "connect-src" not in policy
    assert text.index("Content-Security-Policy") < text.index("<script>")
    with fake_front() as url, urllib.request.urlopen(url + "static/preview.html") as response:
        assert response.headers["Content-Security-Policy"] == "sandbox allow-scripts; frame-ancestors 'self'"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    with fake_front() as url, urllib.request.urlopen(url + "static/preview.js") as response:
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]
