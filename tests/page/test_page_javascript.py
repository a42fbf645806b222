"""JavaScript that a model wrote: what it may do, and that it gets out of its frame by no way."""

import base64
import hashlib
import http.server
import re
import threading

import pytest

from browsing import ROOT, expect, fake_front, needs_browser, open_page, visitor

pytestmark = needs_browser
FRAME = (ROOT / "static/javascript.html").read_text()


@pytest.fixture
def listener():
    """A server of this machine that remembers who has asked it."""
    heard = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.send_header("Content-Type", "text/javascript")
            self.end_headers()
            self.wfile.write(b"0")

        do_POST = do_GET

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", heard
    server.shutdown()


@pytest.fixture(scope="module")
def server_url():
    """The real HTTP side and its headers; nothing here asks a model."""
    with fake_front(tool_format="tagged") as url:
        yield url


@pytest.fixture(scope="module")
def shared(browser, server_url):
    """A page for all tests here: each code gets a frame of its own."""
    with visitor(browser) as page:
        open_page(page, server_url)
        yield page


def run(page, code):
    """The result of code, as the page gets it."""
    return page.evaluate("async code => { await Parts.need('javascript'); return await Javascript.run(code); }", code)


@pytest.mark.parametrize("code, text", [
    ("return 6 * 7", "42"), ("return {a: [1, 2]}", '{\n "a": [\n  1,\n  2\n ]\n}'), ("console.log('one', 2); console.warn({}); return 'last'", "one 2\n{}\nlast"),
    ("await new Promise(end => setTimeout(end, 10)); return 'later'", "later"), ("", "(nothing was returned or logged)"),
    ("const a = {}; a.a = a; return a", "[object Object]"), ("return undefined", "(nothing was returned or logged)")])
def test_code_returns_and_logs(shared, code, text):
    result = run(shared, code)
    assert result["text"] == text and not result["is_error"] and result["cut"] == 0
    expect(shared.locator("iframe")).to_have_count(0)


@pytest.mark.parametrize("code, text", [("throw new Error('no')", "Error: no"), ("return (", "SyntaxError"), ("return missing", "missing is not defined"),
                                        ("return eval('1')", "EvalError"), ("return new Function('return 1')()", "EvalError")])
def test_errors_are_results(shared, code, text):
    result = run(shared, code)
    assert text in result["text"] and result["is_error"]


WAYS_OUT = {
    "fetch": "await fetch('URL/fetch')", "request": "await new Promise((_, no) => { const r = new XMLHttpRequest(); r.onerror = no; r.open('GET', 'URL/x'); r.send(); })",
    "socket": "await new Promise((_, no) => { const s = new WebSocket('URL/s'.replace('http', 'ws')); s.onerror = no; })",
    "events": "await new Promise((_, no) => { const s = new EventSource('URL/e'); s.onerror = no; })", "import": "await import('URL/import.js')", "scripts": "importScripts('URL/scripts.js')",
    "worker": "await new Promise((_, no) => { const w = new Worker('URL/w.js'); w.onerror = no; })",
    "nested": "await new Promise((yes, no) => { const w = new Worker(URL.createObjectURL(new Blob([\"fetch('URL/n').then(() => postMessage(1), e => postMessage(String(e)))\"]))); w.onmessage = ({data}) => data === 1 ? yes() : no(data); w.onerror = no; })",
    "breaking out of the function": "})(); fetch('URL/break').catch(() => {}); (async () => { throw 1;",
    "storage": "indexedDB.open('x').onerror", "caches": "await caches.open('x')", "local": "localStorage.a = 1", "parent": "parent.document", "top": "top.location = 'URL/top'",
    "open": "open('URL/open')", "cookies": "document.cookie", "beacon": "navigator.sendBeacon('URL/beacon')", "lock": "await navigator.locks.request('x', () => 1)",
}


@pytest.mark.parametrize("way", WAYS_OUT)
def test_no_way_leads_out(shared, server_url, listener, way):
    """Neither to this machine's network nor to the page or its storage."""
    address, heard = listener
    result = run(shared, WAYS_OUT[way].replace("URL/", f"{address}/") + "; return 'out'")
    assert result["is_error"] and result["text"] != "out", result
    assert heard == [] and shared.evaluate("document.title") and shared.url.startswith(server_url)


def test_messages_to_others_reach_nobody(shared):
    """A channel's messages stay in the frame's own origin, which nobody shares."""
    shared.evaluate("window.heard = []; const channel = new BroadcastChannel('x'); channel.onmessage = ({data}) => heard.push(data); 0")
    run(shared, "new BroadcastChannel('x').postMessage('hello'); await new Promise(end => setTimeout(end, 100)); return 1")
    assert shared.evaluate("heard") == []


@pytest.mark.slow
def test_an_endless_loop_is_ended(shared):
    result = run(shared, "for (;;);")
    assert result["is_error"] and "took too long" in result["text"] and 9000 < result["ms"] < 14000


@pytest.mark.slow      # two wait for the limit of ten seconds
@pytest.mark.parametrize("code", ["const all = []; for (;;) all.push({all: [1, 2, 3]});", "let s = 'x'; for (;;) s += s + Math.random();",
                                  "const all = []; for (;;) all.push(new Uint8Array(1e8).fill(1));"])
def test_too_much_memory_ends_only_the_code(page, server_url, code):
    """Here the browser gives the frame no process of its own (SECURITY.md)."""
    open_page(page, server_url)
    result = run(page, code)
    assert result["is_error"] and page.evaluate("1 + 1") == 2


@pytest.mark.parametrize("code, text", [
    pytest.param("const all = []; for (;;) all.push(new Float64Array(1e7).fill(1));", "more than 1 GiB", marks=pytest.mark.slow), ("let a = new Uint8Array(1e8); for (const all = [];;) all.push(a.slice());", "more than 1 GiB"),
    ("return new ArrayBuffer(2 ** 31)", "more than 1 GiB"),
    ("try { new ArrayBuffer(2 ** 31); } catch (error) {} return new Uint8Array(1e6).length;", "1000000"),
    ("class Mine extends Uint8Array {} const a = new Mine(1e6); return [a instanceof Uint8Array, a.constructor === Mine, new Uint8Array(a.buffer).length, Uint8Array.of(1, 2).map(x => 2 * x).join()]",
     '[\n true,\n true,\n 1000000,\n "2,4"\n]')])
def test_arrays_of_numbers_are_counted(shared, code, text):
    """They behave as before, until they are too large together."""
    assert text in run(shared, code)["text"]


@pytest.mark.parametrize("code", ["return 'x'.repeat(5e7)", "console.log('x'.repeat(5e7))", "postMessage('x'.repeat(5e7))", "for (let i = 0; i < 1e6; i++) console.log(i)",
                                  "for (let i = 0; i < 1e4; i++) postMessage(i)", "postMessage({said: 1, value: {}, error: null})"])
def test_a_result_is_cut(shared, code):
    assert len(run(shared, code)["text"]) <= 8192


LISTS = "let a = ['x']; for (let i = 0; i < 200; i++) a = [a, a]; "      # each holds the one before twice
HOLDING = {
    "lists that hold each other": LISTS + "postMessage(a)", "of every member": LISTS + "postMessage({said: [a], text: a, value: a, error: a})", "through the prototype": LISTS + "Object.getPrototypeOf(self).postMessage.call(self, a)",
    "returned": LISTS + "return a.length", "its text": LISTS + "a.toJSON = () => 'short'; return a", "thrown": "throw {toString() { return 'x'.repeat(5e8 / 2); }}", "thrown later": "setTimeout(() => { throw 'x'.repeat(5e8); }); await new Promise(() => {})",
    "changed functions": LISTS + "String.prototype.slice = () => a; JSON.stringify = () => a; Reflect.apply = () => a; Array.prototype.join = () => a; self.String = () => a; console.log('y'.repeat(1e5)); return 'x'.repeat(1e5)",
    "a promise of its own": LISTS + "return {then(yes) { for (let i = 0; i < 1e5; i++) yes('x'.repeat(1e5)); }}", "what ends it": LISTS + "for (let i = 0; i < 1e5; i++) returned(a.length); failed(a.length)",
    "out of the function": "})(); " + LISTS + "try { postMessage(a); } catch (error) {} for (let i = 0; i < 1e5; i++) failed('y'); (async () => {", "a flood of errors": "for (let i = 0; i < 1e4; i++) setTimeout(() => { throw 'x'.repeat(1e5); }); await new Promise(() => {})",
    "no text": "throw Object.create(null)", "no text returned": "return {toJSON() { throw 1; }, toString() { throw 2; }}", "not even the event": "Event.prototype.preventDefault = () => {}; setTimeout(() => { throw 'x'.repeat(1e8); }); await new Promise(() => {})"}


@pytest.mark.parametrize("way", HOLDING)
def test_what_code_posts_does_not_hold_the_page(shared, way):
    """It ends with a short text before its ten seconds are over, and only once."""
    shared.evaluate("window.heard = []; window.hearing = ({data}) => heard.push(data); addEventListener('message', hearing); 0")
    result = run(shared, HOLDING[way])
    assert len(result["text"]) <= 8192 and "took too long" not in result["text"], result
    heard = shared.evaluate("removeEventListener('message', hearing); heard")
    assert len(heard) == 1 and heard[0].keys() == {"text", "cut", "failed"} and {type(value) for value in heard[0].values()} <= {str, int, bool}


@pytest.mark.slow
def test_a_value_that_is_written_for_ever_is_ended(shared):
    result = run(shared, LISTS + "return a")
    assert result["is_error"] and "took too long" in result["text"] and 9000 < result["ms"] < 14000


def test_running_code_can_be_cancelled(shared):
    text = shared.evaluate("""async () => { await Parts.need("javascript"); const controller = new AbortController(); setTimeout(() => controller.abort(), 100);
        return (await Javascript.run("for (;;);", controller.signal)).text; }""")
    assert text == "The user cancelled this call."
    expect(shared.locator("iframe")).to_have_count(0)


def test_the_frame_s_policy_admits_its_script_alone(page, server_url):
    script = re.search(r"<script>(.*?)</script>", FRAME, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', FRAME)[1]
    assert policy == f"default-src 'none'; script-src 'sha256-{digest}'; worker-src blob:; form-action 'none'; base-uri 'none'"
    response = page.request.get(server_url + "static/javascript.html")
    assert response.headers["content-security-policy"] == "sandbox allow-scripts; frame-ancestors 'self'"


def test_javascript_is_off_until_it_is_chosen(page, server_url):
    open_page(page, server_url)
    expect(page.get_by_role("button", name="Tools", exact=True)).to_be_visible()
    assert page.evaluate("Chat.current.tools") is None
    page.get_by_role("button", name="Tools", exact=True).click()
    page.get_by_role("checkbox", name=re.compile("^JavaScript")).check()
    assert page.evaluate("Chat.current.tools") == ["run_javascript"]
