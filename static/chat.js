// The page of chat_server.py: one plain `state`, drawn by small functions; no build step and no framework.
//
// A message's way: `send` adds the user's turn, `generate` adds the assistant's and reads the stream (`runAnswer`,
// `readAnswer`, `serverEvents`; `reconnect` takes it up again when the connection or the page was lost), every piece grows
// `turn.content`, and once per frame `paintAnswer` draws what is new (`drawMarkdown`).
// Everything else calls `render`, which brings the whole page in line with `state` and touches only what differs.
// Sections: 1 state, 2 storage, 3 server, 4 asking, 5 markdown, 6 turns, 7 rendering, 8 composer, 9 dialogs, 10 start
"use strict";

// 1. state ------------------------------------------------------------------------------------------------------------

const PAGE_HOME = location.protocol === "file:" ? "http://127.0.0.1:8000/"
  : location.origin + location.pathname.replace(/(\/static)?\/[^/]*$/, "/");   // keeps a sub-path; see <base> in index.html
const NO_SETTINGS = {temperature: "", top_k: "", top_p: "", max_tokens: "", seed: "", system: ""};   // "" = server's default
const SETTING_OF_COMMAND = {temperature: "temperature", topk: "top_k", topp: "top_p", maxtokens: "max_tokens"};
const EXAMPLES = ["What is the capital of Japan?", "Explain why the sky is blue to a ten-year-old",
  "Give three tips for a good night's sleep", "Show me a Python function that reverses a string"];
const HELP = "/temperature N · /topk N · /topp N · /maxtokens N (no number: the server's default) · /clear · /help. " +
  "Enter sends, Shift+Enter starts a new line, Esc stops the answer.";

const state = {
  turns: [],                      // {role: "user" | "assistant", content, stats?, note?, error?, stream?}
                                  // stream: {id, next}, while an answer is under way: its id and the number of its next event
  previous: [],                   // the turns that "New chat" or "Import" put aside
  settings: {...NO_SETTINGS},
  server: {url: "", key: ""},     // "" = where the page came from, no key
  draft: "",
  // from here on not stored
  phase: "connecting",            // connecting, loading, ready, unreachable
  loading: {stage: "", fraction: null},
  model: {name: "", context: 0, device: ""},
  run: null,                      // the answer in progress: {turn, controller, pieces, firstAt, resumable, lost}
  editing: null,                  // the user turn that is being edited
  refusedKey: null,               // the API key that the server refused last, "" = that there was none
  notice: "",                     // the page's own words below the turns
  following: true,                // the log stays at its end while an answer grows
};

const SILENCE_MS = 30000;         // the server pings three times as often
const FOREVER_MS = 2 ** 31 - 1;
const $ = id => document.getElementById(id);
const wait = ms => new Promise(resolve => setTimeout(resolve, ms));
const canAsk = () => !state.run && (state.phase === "ready" || state.phase === "unreachable");

// 2. storage ----------------------------------------------------------------------------------------------------------

const STORE = "chat_server " + PAGE_HOME;
let savedAt = 0;

function save() {
  const {turns, previous, settings, server, draft} = state;
  savedAt = performance.now();
  try {
    localStorage.setItem(STORE, JSON.stringify({turns, previous, settings, server, draft}));
  } catch (error) {
    state.notice = "This browser's storage refused the conversation: it will not survive a reload. Export keeps it.";
  }
}

function load() {
  let stored = null;
  try { stored = JSON.parse(localStorage.getItem(STORE)); } catch (error) { /* storage is off or damaged: start empty */ }
  if (!stored) return;
  state.turns = checkedTurns(stored.turns) ?? [];
  const last = state.turns.at(-1);
  if (last && !last.stats && !last.note && !last.error && !last.stream) last.note = "interrupted";
  state.previous = checkedTurns(stored.previous) ?? [];
  Object.assign(state.settings, stored.settings);
  Object.assign(state.server, stored.server);
  state.draft = stored.draft ?? "";
}

// The turns of a stored or imported conversation with nothing unexpected in them, or null when it is none.
function checkedTurns(turns) {
  const good = turn => ["user", "assistant"].includes(turn?.role) && typeof turn.content === "string";
  if (!Array.isArray(turns) || !turns.every(good)) return null;
  const checked = turns.map(({role, content, stats, note, error, stream}) => {
    const numbers = Object.entries(stats ?? {}).filter(([name, value]) => Number.isFinite(value) || name === "finish_reason");
    return {role, content, stats: stats ? Object.fromEntries(numbers) : undefined,
      note: note && String(note), error: error && String(error),
      stream: checkedStream(stream)};
  });
  if (checked.at(-1)?.role === "user") checked.push({role: "assistant", content: "", note: "not answered yet"});
  return checked;
}

function checkedStream(stream) {
  const {id, next} = stream ?? {};
  return typeof id === "string" && /^[\w.-]{1,64}$/.test(id) && Number.isInteger(next) ? {id, next} : undefined;
}

function exportChat() {
  const {model, settings, turns} = state;
  const chat = {format: "chat_server conversation", version: 1, exported: new Date().toISOString(),
    model: model.name, settings, messages: turns};
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(chat, null, 2)], {type: "application/json"}));
  link.download = `chat-${chat.exported.slice(0, 16).replace(/[T:]/g, "-")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

async function importChat(file) {
  let chat = null;
  try { chat = JSON.parse(await file.text()); } catch (error) { /* said below */ }
  const imported = Array.isArray(chat) ? chat : chat?.messages;
  const turns = checkedTurns(Array.isArray(imported) ? imported.filter(turn => turn?.role !== "system") : null);
  if (!turns) return say(`${file.name} is not a conversation: JSON with a list "messages" of {role, content} is expected.`);
  replaceTurns(turns);
  const system = imported.find(turn => turn.role === "system")?.content ?? chat.settings?.system;
  if (typeof system === "string") state.settings.system = system;
  save();
  say(`Imported ${turns.length} turns from ${file.name}.`);
}

// 3. server -----------------------------------------------------------------------------------------------------------

const serverUrl = path => (state.server.url || PAGE_HOME).replace(/\/*$/, "/") + path;

async function request(path, options = {}) {
  const headers = {...options.headers};
  if (state.server.key) headers.Authorization = `Bearer ${state.server.key}`;
  try {
    const response = await fetch(serverUrl(path), {...options, headers});
    if (response.status === 401) wantKey();
    return response;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const other = new URL(serverUrl("")).origin !== location.origin;
    const origin = location.protocol === "file:" ? "null" : location.origin;
    throw new Error(`No answer from ${serverUrl("")}: is the server running` +
      (other ? `, and does it allow this page (--cors-origin ${origin})?` : "?"));
  }
}

// Opens the Server dialog for a key, once for each key that is refused: closing it unchanged is an answer too.
function wantKey() {
  const {server, refusedKey} = state;
  if (refusedKey === server.key) return;
  state.refusedKey = server.key;
  $("key-wanted").textContent = server.key ? "The server does not know this API key." : "This server wants an API key.";
  $("key-wanted").hidden = false;
  if (!document.querySelector("dialog[open]")) $("server").click();
  $("server-dialog").querySelector("[name=key]").focus();
}

async function errorOf(response) {
  const text = await response.text();
  let body = null;
  try { body = JSON.parse(text); } catch (error) { /* not JSON, perhaps a proxy's page */ }
  const plain = text.startsWith("<") ? "" : text.slice(0, 300);
  const found = errorText(body) || plain || response.statusText || "The server refused";
  const again = response.headers.get("Retry-After");
  return new Error(`${found} (HTTP ${response.status}${again ? `, try again in ${again} s` : ""})` +
    (response.status === 401 ? " - enter the key under “Server”." : ""));
}

// The message in {"error": {"message"}}, {"error": "..."} or {"detail": ...}, else "".
function errorText(body) {
  const found = body?.error?.message ?? body?.error ?? body?.detail ?? "";
  return typeof found === "string" ? found : JSON.stringify(found);
}

let watch = 0;                    // only the newest watcher of /health goes on

async function watchServer() {
  const mine = ++watch;
  for (let pause = 400; mine === watch; pause = Math.min(pause * 1.4, 5000)) {
    const found = await askHealth();
    if (mine !== watch) return;
    const {phase, loading} = state;
    const news = JSON.stringify(found) !== JSON.stringify({phase, loading});
    Object.assign(state, found);
    if (news) render();
    if (state.phase === "ready") return describeModel();
    await wait(pause);
  }
}

// Asks /health once. 503 means "not yet"; any other answer, even 404 from another kind of server, means "ask it".
async function askHealth() {
  try {
    const response = await request("health", {cache: "no-store"});
    if (response.status !== 503) return {phase: "ready", loading: {stage: "", fraction: null}};
    const {loading, status} = await response.json().catch(() => ({}));
    return {phase: "loading", loading: {stage: loading?.stage ?? status ?? "", fraction: loading?.fraction ?? null}};
  } catch (error) {
    return {phase: "unreachable", loading: {stage: "", fraction: null}};
  }
}

async function describeModel() {
  const body = path => request(path).then(response => response.ok ? response.json() : null).catch(() => null);
  const [models, stats] = await Promise.all([body("v1/models"), body("stats")]);
  const first = models?.data?.[0] ?? {};
  const devices = new Set((stats?.workers ?? []).map(worker => worker.device));
  state.model = {name: first.id ?? stats?.model ?? "", context: first.context_length ?? stats?.context_length ?? 0,
    device: [...devices].join(", ")};
  render();
}

class Lost extends Error {}       // the connection, not the answer

// Yields {id, event} of each `data:` frame, the id "" where it has none. Comments (": ping") carry no data; characters may be
// split over chunks. Throws Lost when the connection breaks, or when not even a ping came for `patience` ms: after a sleep
// nobody says that a connection is dead.
async function* serverEvents(body, patience) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let buffer = "";
  for (let chunk; !(chunk = await readChunk(reader, patience)).done;) {
    buffer += decoder.decode(chunk.value, {stream: true});
    const frames = buffer.split(/\r?\n\r?\n/);
    buffer = frames.pop();
    for (const frame of frames) {
      const lines = frame.split(/\r?\n/);
      const field = name => lines.filter(line => line.startsWith(name)).map(line => line.slice(name.length).trimStart());
      const data = field("data:");
      if (data.length && data[0] !== "[DONE]") yield {id: field("id:").join(""), event: JSON.parse(data.join("\n"))};
    }
  }
}

async function readChunk(reader, patience) {
  let timer = 0;
  const silence = new Promise((_, reject) => { timer = setTimeout(reject, patience, new Error("silence")); });
  try {
    return await Promise.race([reader.read(), silence]);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    reader.cancel().catch(() => {});
    throw new Lost(`The connection broke: ${error.message}`);
  } finally {
    clearTimeout(timer);
  }
}

// 4. asking -----------------------------------------------------------------------------------------------------------

// What is posted: the system prompt, then the turns that have text. Where an answer failed, two user turns meet: they are
// joined, because chat formats want roles to alternate.
function messagesToSend() {
  const messages = state.settings.system.trim() ? [{role: "system", content: state.settings.system}] : [];
  for (const {role, content} of state.turns) {
    if (!content) continue;
    if (messages.at(-1)?.role === role) messages.at(-1).content += "\n\n" + content;
    else messages.push({role, content});
  }
  return messages;
}

function requestBody() {
  const body = {messages: messagesToSend(), resumable: true, truncate: "oldest"};
  for (const [name, value] of Object.entries(state.settings)) {
    if (name !== "system" && value !== "") body[name] = Number(value);
  }
  return JSON.stringify(body);
}

function send(text) {
  if (!canAsk() || !text.trim()) return false;
  Object.assign(state, {notice: "", editing: null});
  state.turns.push({role: "user", content: text.trim()});
  generate();
  return true;
}

function regenerate() {
  if (!canAsk()) return;
  if (state.turns.at(-1)?.role === "assistant") state.turns.pop();
  generate();
  focusAfterClick();
}

function generate() {
  const turn = {role: "assistant", content: "", stream: {id: randomId(), next: 0}};
  state.turns.push(turn);
  return runAnswer(turn, askAnswer);
}

// Goes on with the answer that was under way when the page was left.
function resume() {
  const turn = state.turns.at(-1);
  if (turn?.stream) runAnswer(turn, reconnect);
}

const randomId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("");

// Shows an answer growing until it has ended in one way or another; `connect(run)` gives the response with its first events.
async function runAnswer(turn, connect) {
  const run = {turn, controller: new AbortController(), pieces: 0, firstAt: 0, resumable: true, lost: false};
  Object.assign(state, {run, following: true, notice: ""});
  save();
  render();
  announce("Waiting for the answer");
  try {
    await readAnswer(run, await connect(run));
  } catch (error) {
    if (run.controller.signal.aborted) turn.note = "stopped";
    else if (error.note) turn.note = error.note;
    else turn.error = error.message;
    run.controller.abort();                              // the rest of the stream, if any, is of no use
  }
  delete turn.stream;
  turn.stats ??= run.pieces > 1 ? {measured: liveSpeed(run)} : undefined;
  if (state.run !== run) return;                         // New chat took it away
  state.run = null;
  save();
  render();
  announce(turn.error ? "" : turn.note ? "Answer stopped" : "Answer finished");
}

async function askAnswer(run) {
  const {stream} = run.turn;
  const headers = {"Content-Type": "application/json", Accept: "text/event-stream", "X-Request-Id": stream.id};
  const options = {method: "POST", body: requestBody(), signal: run.controller.signal, headers};
  const response = await request("chat/completions", options).catch(lostServer);
  if (response.status === 503) lostServer();
  if (!response.ok) throw await errorOf(response);
  run.resumable = response.headers.has("X-Request-Id");
  stream.id = response.headers.get("X-Request-Id") ?? stream.id;
  return response;
}

async function readAnswer(run, response) {
  for (;;) {
    try {
      return await readEvents(run, response);
    } catch (error) {
      if (!(error instanceof Lost) || !run.resumable) throw error;
      response = await reconnect(run);
    }
  }
}

async function readEvents(run, response) {
  const {turn} = run;
  for await (const {id, event} of serverEvents(response.body, run.resumable ? SILENCE_MS : FOREVER_MS)) {
    if (event.error?.code === "cancelled") throw noted("stopped");
    if (event.error || event.detail) throw new Error(errorText(event) || "The server gave up");
    if (id) turn.stream.next = Number(id) + 1;
    if (event.done) turn.stats = {...event.timings, ...event.usage, finish_reason: event.finish_reason};
    else if (event.token) addPiece(run, event.token);
  }
  if (!turn.stats) throw new Lost("The connection ended before the answer did");
}

// The rest of an answer whose connection was lost, as soon as the server can be reached again; for about two minutes.
async function reconnect(run) {
  const {stream} = run.turn, {signal} = run.controller;
  const aborted = new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
  aborted.catch(() => {});
  run.lost = true;
  renderState();
  for (let pause = 200, tries = 0; tries < 30; pause = Math.min(2 * pause, 5000), tries++) {
    const response = await request(`v1/streams/${stream.id}?from=${stream.next}`, {signal, cache: "no-store"}).catch(error => {
      if (error.name === "AbortError") throw error;
    });
    run.lost = !response?.ok;
    if (response?.status === 200) return response;
    if (response && response.status < 500) throw response.status === 401 ? await errorOf(response) : noted("interrupted");
    await Promise.race([wait(pause), aborted]);
  }
  throw new Error("The connection to the server was lost");
}

const noted = note => Object.assign(new Error(note), {note});

function lostServer(error) {
  if (error?.name !== "AbortError") watchServer();
  if (error) throw error;
}

function addPiece(run, text) {
  if (!run.pieces++) { run.firstAt = performance.now(); announce("Answering"); }
  run.turn.content += text;
  if (performance.now() - savedAt > 1000) save();       // a crash costs a second of text
  if (!run.frame) run.frame = requestAnimationFrame(() => { run.frame = 0; if (state.run === run) paintAnswer(run); });
}

// Closing the connection is not enough: the server would wait for this page to come back.
function stopAnswer() {
  const {run} = state;
  if (!run) return;
  run.controller.abort();
  request(`v1/cancel/${run.turn.stream.id}`, {method: "POST"}).catch(() => {});
}

// Pieces per second so far: about tokens per second, as one piece is mostly one token.
const liveSpeed = run => (run.pieces - 1) / Math.max(0.001, (performance.now() - run.firstAt) / 1000);

// Puts the conversation aside (it can be brought back from the empty page) and shows these turns instead.
function replaceTurns(turns) {
  const {run} = state;
  if (run) { run.turn.note = "stopped"; stopAnswer(); }
  const previous = state.turns.length ? state.turns : state.previous;
  Object.assign(state, {previous, turns, run: null, editing: null, notice: "", following: true});
  save();
  render();
}

// 5. markdown ---------------------------------------------------------------------------------------------------------

const escapeHtml = text => text.replace(/[&<>"]/g, char => ({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"})[char]);

const renderers = {
  code({text, lang}) {
    const language = (lang ?? "").trim().split(/\s+/)[0];
    const known = hljs.getLanguage(language) && text.length < 20000;   // longer blocks are not worth the time per frame
    const html = known ? hljs.highlight(text, {language, ignoreIllegals: true}).value : escapeHtml(text);
    return `<pre data-language="${escapeHtml(language)}"><code>${html}\n</code></pre>`;
  },
  html: ({text}) => text.replace(/<(?!\/?(br|sub|sup|kbd)\s*\/?>)/gi, "&lt;"),      // other tags are shown, not obeyed
  image: ({href, text}) => `<a href="${escapeHtml(href)}">${escapeHtml(text || href)}</a>`,   // nothing is fetched unasked
  checkbox: ({checked}) => checked ? "☑ " : "☐ ",
};

// TeX in $$..$$, \[..\], \(..\) and $..$ (no space inside, no digit after it, so that prices stay prices).
const MATH_BLOCK = /^ {0,3}(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\])[ \t]*(?:\n|$)/;
const MATH_INLINE = /^(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\]|\\\(([^]+?)\\\)|\$(?![\s$])((?:\\.|[^$\\\n])*?[^\s$\\])\$(?!\d))/;

function mathExtension(name, level, pattern, startOf) {
  const tokenizer = source => {
    const found = pattern.exec(source);
    if (!found) return undefined;
    return {type: name, raw: found[0], tex: found.slice(1).find(Boolean), display: !found[3] && !found[4]};
  };
  const renderer = ({tex, display}) => katex.renderToString(tex, {displayMode: display, output: "mathml",
    throwOnError: false, trust: false, strict: false, maxExpand: 200, maxSize: 20});
  const start = source => { const at = source.search(startOf); return at < 0 ? undefined : at; };
  return {name, level, start, tokenizer, renderer};
}

const markdown = new marked.Marked({gfm: true, breaks: true, renderer: renderers, extensions: [
  mathExtension("mathBlock", "block", MATH_BLOCK, /\n {0,3}(?:\$\$|\\\[)/),
  mathExtension("mathInline", "inline", MATH_INLINE, /\$|\\[[(]/)]});

const CLEAN = {USE_PROFILES: {html: true, mathMl: true}, ADD_TAGS: ["semantics", "annotation"], ADD_ATTR: ["target"],
  FORBID_TAGS: ["style", "img", "form", "input", "button", "video", "audio", "picture", "source"],
  FORBID_ATTR: ["style", "id", "name", "background"], RETURN_DOM_FRAGMENT: true};

DOMPurify.addHook("afterSanitizeAttributes", node => {
  if (node.nodeName !== "A") return;
  if (!/^(https?|mailto):/i.test(node.getAttribute("href") ?? "")) node.removeAttribute("href");
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

// The only way from text to elements: marked's HTML goes through DOMPurify, then code blocks get their bar.
function fragmentOf(tokens) {
  const fragment = DOMPurify.sanitize(markdown.parser(tokens), CLEAN);
  for (const pre of fragment.querySelectorAll("pre")) {
    const bar = element("div", {className: "code-bar"}, element("span", {textContent: pre.dataset.language || "text"}),
      button("Copy code", "copy", clicked => copyText(pre.textContent.replace(/\n$/, ""), clicked)));
    const box = element("div", {className: "code"}, bar);
    pre.tabIndex = 0;                                    // so that wide code scrolls by keyboard
    pre.replaceWith(box);
    box.append(pre);
  }
  return fragment;
}

// Draws an answer that only grows. Blocks before the last cannot change any more: they are drawn once and stay (also the
// reader's selection in them); the last one is drawn anew, an open code fence counting as closed.
function drawMarkdown(view, text, finished) {
  const source = text.replace(/\r\n?/g, "\n");
  const references = finished && /^ {0,3}\[[^\]]+\]:/m.test(source);   // [name]: url below its use changes earlier blocks
  if (references || source.length < view.frozen) view.restart();
  const tokens = markdown.lexer(source.slice(view.frozen));
  let open = tokens.length - 1;
  while (open >= 0 && tokens[open].type === "space") open--;
  const settled = finished ? tokens : tokens.slice(0, Math.max(open, 0));
  if (settled.length) {
    view.tail.before(fragmentOf(settled));
    view.frozen += settled.reduce((length, token) => length + token.raw.length, 0);
  }
  view.tail.replaceChildren(fragmentOf(tokens.slice(settled.length)));
}

// 6. turns ------------------------------------------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function button(label, icon, onclick) {
  return element("button", {type: "button", className: `icon plain i-${icon}`, textContent: label,
    onclick: event => onclick(event.currentTarget)});
}

const views = new WeakMap();      // turn -> its elements, so that drawing again keeps what is there

function viewOf(turn) {
  if (!views.has(turn)) views.set(turn, turn.role === "user" ? userView(turn) : assistantView(turn));
  return views.get(turn);
}

function newArticle(role, ...children) {
  const article = element("article", {className: role}, ...children);
  article.setAttribute("aria-label", role === "user" ? "You" : "Assistant");
  return article;
}

function userView(turn) {
  const view = {body: element("div", {className: "body"}), actions: element("div", {className: "actions"},
    button("Edit", "edit", () => { state.editing = turn; render(); }),
    button("Copy", "copy", clicked => copyText(turn.content, clicked)))};
  view.article = newArticle("user", view.body, view.actions);
  view.update = () => {
    const editing = state.editing === turn;
    view.actions.hidden = editing;
    view.actions.firstChild.disabled = Boolean(state.run);
    if (editing && !view.editor) startEditing(view, turn);
    if (editing) return;
    view.editor = null;
    if (view.body.textContent !== turn.content || view.body.firstElementChild) view.body.textContent = turn.content;
  };
  return view;
}

function startEditing(view, turn) {
  const field = element("textarea", {value: turn.content, rows: 1});
  field.setAttribute("aria-label", "Edited text");
  const cancel = () => { state.editing = null; render(); focusAfterClick(); };
  const update = () => {
    if (!canAsk() || !field.value.trim()) return;
    state.turns.length = state.turns.indexOf(turn);
    send(field.value);
    focusAfterClick();
  };
  onEnter(field, update);
  field.addEventListener("keydown", event => { if (event.key === "Escape" && !composing(event)) cancel(); });
  field.addEventListener("input", () => fitHeight(field));
  view.editor = field;
  view.body.replaceChildren(field, element("div", {className: "row"},
    element("button", {type: "button", className: "plain", textContent: "Cancel", onclick: cancel}),
    element("button", {type: "button", className: "primary", textContent: "Update", onclick: update})));
  requestAnimationFrame(() => { fitHeight(field); field.focus(); });
}

function assistantView(turn) {
  const view = {frozen: 0, tail: element("div", {className: "tail"}), body: element("div", {className: "body markdown"})};
  view.restart = () => { view.frozen = 0; view.body.replaceChildren(view.tail); };
  view.restart();
  view.dots = element("p", {className: "dots"}, element("i"), element("i"), element("i"));
  view.alert = element("div");
  view.speed = element("span", {className: "speed"});
  view.retry = button("Regenerate", "again", regenerate);
  view.copy = button("Copy", "copy", clicked => copyText(turn.content, clicked));
  view.article = newArticle("assistant", view.body, view.dots, view.alert,
    element("div", {className: "actions"}, view.retry, view.copy, view.speed));
  view.update = () => updateAssistant(view, turn);
  return view;
}

function updateAssistant(view, turn) {
  const running = state.run?.turn === turn;
  if (!view.finished) drawMarkdown(view, turn.content, !running);
  view.finished = !running;
  view.dots.hidden = !running || turn.content !== "";
  if (turn.error && !view.alert.firstChild) {
    view.alert.append(element("p", {className: "alert", role: "alert", textContent: turn.error}));
  }
  view.retry.hidden = running || turn !== state.turns.at(-1);
  view.retry.disabled = !canAsk();
  view.copy.hidden = running || !turn.content;
  view.speed.textContent = running ? "" : speedText(turn);
  view.speed.title = detailText(turn.stats);
}

function speedText({stats = {}, note}) {
  const words = [];
  if (note) words.push(note);
  if (stats.tokens_per_second != null) words.push(`${stats.tokens_per_second.toFixed(1)} tok/s`);
  else if (stats.measured) words.push(`about ${stats.measured.toFixed(1)} tok/s`);
  if (stats.ttft_ms != null) words.push(`TTFT ${Math.round(stats.ttft_ms)} ms`);
  if (stats.completion_tokens) words.push(`${stats.completion_tokens} tokens`);
  if (stats.finish_reason === "length") words.push("cut at the length limit");
  if (stats.dropped_messages) words.push(`without the ${stats.dropped_messages} oldest messages, which no longer fit`);
  return words.join(" · ");
}

function detailText(stats) {
  if (!stats?.prompt_tokens) return "";
  return `prompt ${stats.prompt_tokens} tokens, ${stats.cached_tokens ?? 0} of them cached; ` +
    `queued ${Math.round(stats.queue_ms ?? 0)} ms; first token after ${Math.round(stats.ttft_ms ?? 0)} ms`;
}

async function copyText(text, clicked) {
  try {
    await navigator.clipboard.writeText(text);
  } catch (error) {                                      // plain http from another machine has no clipboard API
    const field = element("textarea", {value: text, className: "unseen"});
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
    clicked.focus();
  }
  announce("Copied");
  clicked.classList.add("done");
  clicked.addEventListener("animationend", () => clicked.classList.remove("done"), {once: true});
}

// 7. rendering --------------------------------------------------------------------------------------------------------

function render() {
  const {run, turns, model, phase} = state;
  $("model").textContent = model.name || "Chat";
  document.title = model.name ? `${model.name} - chat` : "Chat";
  $("lamp").className = phase;
  turns.forEach(turn => viewOf(turn).update());
  const notice = state.notice ? [noticeOf(state.notice)] : [];
  syncChildren($("log"), [...(turns.length ? turns.map(turn => viewOf(turn).article) : [emptyPage()]), ...notice]);
  const sent = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = Boolean(run);
  $("stop").hidden = !run;
  if (sent) focusAfterClick();
  $("send").disabled = !canAsk() || !state.draft.trim();
  renderState();
  followEnd();
}

function paintAnswer(run) {
  viewOf(run.turn).update();
  renderState();
  followEnd();
}

function syncChildren(parent, nodes) {
  nodes.forEach((node, i) => { if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] ?? null); });
  while (parent.children.length > nodes.length) parent.lastElementChild.remove();
}

function renderState() {
  const {run, phase, loading, turns, model} = state;
  const last = turns.findLast(turn => turn.stats?.prompt_tokens)?.stats;
  const used = last && model.context
    ? `${last.prompt_tokens + last.completion_tokens} of ${model.context} tokens of context used` : "";
  $("state").textContent = run?.lost ? "The connection is lost; trying again…"
    : run?.pieces > 1 ? `Generating · ${liveSpeed(run).toFixed(0)} tok/s`
    : run?.pieces ? "Generating"
    : run ? "Waiting for the first token…"
    : phase === "loading" ? loadingText(loading)
    : phase === "connecting" ? "Connecting…"
    : phase === "unreachable" ? `No server at ${serverUrl("")} yet; still trying`
    : used;
}

function loadingText({stage, fraction}) {
  return `The model is not ready: ${stage || "starting"}${fraction ? ` ${Math.round(fraction * 100)}\u00a0%` : ""}`;
}

const noticeOf = text => element("p", {className: "notice", textContent: text});

// What a new conversation shows: the model, or how far it is loaded; prompts to start with.
function emptyPage() {
  const {model, phase, loading, previous} = state;
  const page = element("section", {className: "empty"}, element("h2", {textContent: model.name || "Chat"}));
  const facts = "Running" + (model.device && ` on ${model.device}`) +
    (model.context ? ` with ${model.context} tokens of context.` : ".");
  const words = {ready: facts, loading: loadingText(loading)}[phase] ?? "Looking for the server…";
  page.append(element("p", {textContent: words}));
  if (phase === "loading") {
    const bar = element("progress", loading.fraction ? {max: 1, value: loading.fraction} : {});
    bar.setAttribute("aria-label", "Loading");
    page.append(bar);
  }
  page.append(element("div", {className: "examples"}, ...EXAMPLES.map(text =>
    element("button", {type: "button", textContent: text, disabled: !canAsk(), onclick: () => send(text)}))));
  if (previous.length) {
    const bringBack = () => { replaceTurns(previous); state.previous = []; save(); };
    page.append(button("Bring back the last chat", "again", bringBack));
  }
  return page;
}

function announce(text) {
  $("announcer").textContent = text;
}

function say(text) {
  state.notice = text;
  state.following = true;
  render();
  announce(text);
}

// The log follows its end until the reader scrolls up, and again once they are back at the end.
let lastTop = 0;

function followEnd() {
  const log = $("log");
  if (state.following) log.scrollTop = log.scrollHeight;
  $("latest").hidden = state.following || atEnd(40);
}

const atEnd = slack => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight <= slack;

function onScroll() {
  const top = $("log").scrollTop;
  if (atEnd(2)) state.following = true;
  else if (top < lastTop - 1) state.following = false;
  lastTop = top;
  $("latest").hidden = state.following || atEnd(40);
}

// 8. composer ---------------------------------------------------------------------------------------------------------

const touch = matchMedia("(pointer: coarse)");
const composing = event => event.isComposing || event.keyCode === 229;   // Enter then confirms an input method's word

// Calls `act` on Enter, except while composing, with Shift, and on touch keyboards, where Enter is a new line.
function onEnter(field, act) {
  field.enterKeyHint = touch.matches ? "enter" : "send";
  field.addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.shiftKey || composing(event) || touch.matches) return;
    event.preventDefault();
    act();
  });
}

function fitHeight(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

function setDraft(text) {
  state.draft = text;
  if ($("message").value !== text) $("message").value = text;
  fitHeight($("message"));
  $("send").disabled = !canAsk() || !text.trim();
}

function submitDraft() {
  const text = state.draft;
  if (runCommand(text.trim()) || send(text)) { setDraft(""); save(); }
  else if (text.trim()) announce(state.run ? "An answer is being written: stop it first" : "The model is not ready yet");
}

// "/temperature 0.5" and the like, as nanochat's page has them. False when the text is a message.
function runCommand(text) {
  const [, name, value] = /^\/([a-z]+)(?:\s+(\S+))?$/.exec(text) ?? [];
  const setting = SETTING_OF_COMMAND[name];
  if (name === "clear") newChat();
  else if (name === "help") say(HELP);
  else if (setting && !Number.isFinite(Number(value ?? 0))) say(`/${name} wants a number, not “${value}”.`);
  else if (setting) {
    state.settings[setting] = value ?? "";
    say(`${name} is now ${value ?? "the server's default"}.`);
  } else return false;
  return true;
}

// Back to typing; but on a touch screen that would raise the keyboard over the answer.
function focusAfterClick() {
  $(touch.matches ? "log" : "message").focus();
}

function newChat() {
  replaceTurns([]);
  announce("New chat");
  focusAfterClick();
}

// 9. dialogs ----------------------------------------------------------------------------------------------------------

// A dialog whose fields are named as the keys of state[part]; what is typed counts at once.
function bindDialog(dialog, part, defaults, onChange = () => {}) {
  const fields = [...dialog.querySelectorAll("[name]")];
  const show = () => fields.forEach(field => { field.value = state[part][field.name]; });
  const settle = () => { save(); onChange(); };
  dialog.addEventListener("input", ({target}) => {
    if (target.validity.valid) state[part][target.name] = target.value;
  });
  dialog.addEventListener("change", save);
  dialog.addEventListener("close", settle);
  dialog.querySelector("[data-reset]").onclick = () => { Object.assign(state[part], defaults); show(); };
  return () => { show(); dialog.showModal(); };
}

function onServerChange() {
  $("key-wanted").hidden = true;
  Object.assign(state, {phase: "connecting", model: {name: "", context: 0, device: ""}});
  render();
  watchServer();
}

// 10. start -----------------------------------------------------------------------------------------------------------

function bindPage() {
  $("new").onclick = newChat;
  $("export").onclick = exportChat;
  $("import").onclick = () => $("file").click();
  $("file").onchange = async ({target}) => { if (target.files[0]) await importChat(target.files[0]); target.value = ""; };
  $("settings").onclick = bindDialog($("settings-dialog"), "settings", NO_SETTINGS);
  $("server").onclick = bindDialog($("server-dialog"), "server", {url: "", key: ""}, onServerChange);
  $("server-dialog").querySelector("[name=url]").placeholder = PAGE_HOME;
  $("stop").onclick = stopAnswer;
  $("latest").onclick = () => { state.following = true; followEnd(); focusAfterClick(); };
  $("composer").onsubmit = event => { event.preventDefault(); submitDraft(); };
  $("message").oninput = ({target}) => setDraft(target.value);
  onEnter($("message"), submitDraft);
  $("log").addEventListener("scroll", onScroll, {passive: true});
  document.addEventListener("keydown", event => {
    if (event.key === "Escape" && state.run && !composing(event) && !document.querySelector("dialog[open]")) stopAnswer();
  });
  new ResizeObserver(followEnd).observe($("log"));
  document.addEventListener("visibilitychange", () => { if (document.hidden) save(); });
  addEventListener("pagehide", save);
  addEventListener("storage", event => { if (event.key === STORE && !state.run) takeOver(); });
}

// Another tab has saved: show its conversation here too, so that neither overwrites the other's turns.
function takeOver() {
  load();
  state.draft = $("message").value;
  render();
}

bindPage();
load();
setDraft(state.draft);
resume();
render();
if (!touch.matches) focusAfterClick();
watchServer();
