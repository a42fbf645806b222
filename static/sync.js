// Chats that are on the server too: what is done here is sent there, and what other devices did is read. Only if the reader wants it,
// and only with the server that the page came from.
//
// A change is a patch of one record, sent with the revision (`rev`) that the record had here (docs/api/chats.md). `unsent` marks a record until the
// server has it, so nothing is lost when the page closes. What the server says counts: it is merged into the record, below what is still unsent.
// One tab of a browser waits for news; the others hear of them as of any other tab's changes.
"use strict";

const Sync = (() => {

const {TEXT, element, wait, newest} = Parts;

const KIND = {projects: "project", prompts: "prompt", conversations: "chat", nodes: "node"}, STORED_AS = Object.fromEntries(Object.entries(KIND).map(([kind, name]) => [name, kind]));
const OWN = ["id", "leaf", "running", "revision", "rev", "unsent"];     // fields that stay here
const SEND_MS = 400, GROWING_MS = 3000;    // after a change; while an answer grows
const WAIT_S = 20, LEASE_MS = 30000;
const SEARCH_MS = 8000;
const CLOSED_MS = 180000;                  // a tab that has not said for so long that its deletions wait is closed; hidden ones are woken once a minute
const MOST_SENT = 200, SENT_CHARACTERS = 4e6, MOST_READ = 1000;         // in a request; records read for it
const me = Tree.newId();                  // this tab
const PLACE = `${Store.name} sync`, LEASE = `${PLACE} lease`, GONE = `${PLACE} gone `;      // in localStorage; of deletions one for each tab

const state = {on: false, space: "", rev: 0, gone: [], problem: ""};   // `gone`: deletions to send, [kind, id]
const unsent = new Set();                  // "kind id" of the records that the server is to get from this tab
const patches = new Map();                 // "kind id" -> fields that changed here and are not sent
const retries = new Map();                 // "kind id" -> how often the server has refused a record whose chat or parent it lacks
const grownAt = new Map();                 // id of the stream of a growing answer -> when it was sent
let pass = null, again = false, timer = 0;   // pass: a promise while something is sent

// state ----------------------------------------------------------------------------------------------------------------

function load() {
  try { Object.assign(state, JSON.parse(localStorage.getItem(PLACE) ?? "{}")); } catch (error) { /* as it was */ }
}

function save() {
  const {on, space, rev} = state;
  try { localStorage.setItem(PLACE, JSON.stringify({on, space, rev})); } catch (error) { /* for this visit only */ }
}

// Deletions that this tab is still to send. The other tabs read them; `at`: when it was last said that they wait, 0 as the tab closes.
function setGone(gone, at = Date.now()) {
  state.gone = gone;
  try { gone.length ? localStorage.setItem(GONE + me, JSON.stringify({at, gone})) : localStorage.removeItem(GONE + me); } catch (error) { /* for this visit only */ }
}

// Those of the other tabs: {key, at, gone} each, with their key in localStorage.
function goneElsewhere() {
  try {
    const keys = Object.keys(localStorage).filter(key => key.startsWith(GONE) && key !== GONE + me);
    const found = keys.map(key => ({key, ...Object(JSON.parse(localStorage.getItem(key)))}));
    return found.filter(({gone}) => Array.isArray(gone));
  } catch (error) { return []; }
}

const allGone = () => [state, ...goneElsewhere()].flatMap(({gone}) => gone);

// Takes over those of closed tabs. A tab that is open keeps its own: they can be undone there.
function takeOverGone() {
  const left = goneElsewhere().filter(({at}) => at < Date.now() - CLOSED_MS);
  if (!left.length) return;
  setGone([...state.gone, ...left.flatMap(({gone}) => gone)]);
  for (const {key} of left) localStorage.removeItem(key);
  soon();
}

// 128 random bits: whoever knows them has these chats, on a server without keys.
const newSpace = () => btoa(String.fromCharCode(...crypto.getRandomValues(new Uint8Array(16)))).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");

const ask = (path, body, options = {}) => body
  ? Server.post(`v1/chats/${path}`, body, {...options, headers: {"X-Chat-Space": state.space}})
  : Server.request(`v1/chats/${path}`, {...options, headers: {"X-Chat-Space": state.space}});

function turnOn(space = state.space || newSpace()) {
  Object.assign(state, {on: true, space, problem: ""});
  save();
  return begin();
}

function turnOff() {
  state.on = false;
  save();
  Store.mark(false);
}

async function begin() {
  Store.mark(true, note);
  await findUnsent();
  soon();
  follow();
}

// Records that the server has never had, or that have changed since; older ones first, for messages follow each other.
async function findUnsent() {
  for (const kind of Object.keys(KIND)) {
    const found = (await Store.read(kind)).filter(record => Store.isKept(record.id) && (!record.rev || record.unsent)).sort((a, b) => a.created - b.created);
    for (const record of found) {
      const key = `${kind} ${record.id}`;
      unsent.add(key);
      if (record.rev && !patches.has(key)) patches.set(key, kept(kind, record));      // which of its fields changed is not known any more
    }
  }
}

// sending --------------------------------------------------------------------------------------------------------------

const isIn = (gone, kind, id) => gone.some(each => each[0] === kind && each[1] === id);

// Whether a tab has deleted a record, or the chat that it is of. The server may not know that for as long as it can be undone.
function isGone(kind, id, {conversation}) {
  const gone = allGone();
  return isIn(gone, kind, id) || kind === "nodes" && isIn(gone, "conversations", conversation);
}

function note(kind, id, patch) {
  const key = `${kind} ${id}`;
  if (patch === null) {
    patches.delete(key);
    unsent.delete(key);
    setGone([...state.gone, [kind, id]]);
  } else {
    unsent.add(key);
    patches.set(key, {...patches.get(key), ...patch});
    if (patch.created && isIn(state.gone, kind, id)) setGone(state.gone.filter(each => each.join(" ") !== key));      // brought back
  }
  soon(SEND_MS);
}

function soon(pause = 0) {
  if (!timer) timer = setTimeout(() => { timer = 0; send(); }, pause);
}

// Sends all that is unsent. One pass at a time; another follows if more has come.
function send() {
  again = Boolean(pass);
  pass ??= sendAll().finally(() => {
    pass = null;
    if (again) { again = false; soon(SEND_MS); }
  });
  return pass;
}

async function sendAll() {
  state.problem = "";
  try {
    for (let more = true; more && state.on;) more = await sendSome();
  } catch (error) {
    state.problem = error.message;
    setTimeout(soon, 5000);
  }
}

const PLACE_MS = 3000;                    // a question does not wait longer for the server to have its chat

// Where the server may write an answer itself, also when this page has gone: in its chat, once it has that with the question and the answer's
// node; of one that goes on, its new stream. null: this page alone writes it.
async function placeOf({id, conversation, parent}, goesOn) {
  if (!state.on || !parent) return null;
  const records = [["conversations", conversation], ["nodes", parent], ["nodes", id]];
  const isThere = async () => (await Promise.all(records.map(([kind, name]) => Store.get(kind, name)))).every(record => record?.rev && !(goesOn && record.id === id && record.unsent));
  const sentAll = async () => { for (let tries = 0; tries < 2 && !await isThere(); tries++) await send(); };
  await Promise.race([sentAll(), wait(PLACE_MS)]);
  return await isThere() ? {chat: {id: conversation, node: id, parent}, space: state.space} : null;
}

// pictures: here they are data URIs, on the server files that messages name by their SHA-256 -----------------------------------

const LEAST_FILE = 4000;          // characters of a picture from which it is a file
const fileOf = new Map();         // a picture's data URI -> the name of its file

async function uploaded({name, picture}) {
  const [, type, data] = /^data:([\w/+.-]+);base64,(.*)$/.exec(picture) ?? [];
  if (!data || picture.length < LEAST_FILE) return {name, picture};
  if (!fileOf.has(picture)) {
    const body = new Blob([Uint8Array.from(atob(data), character => character.charCodeAt(0))]);
    const response = await Server.request("v1/chats/files", {method: "POST", body, headers: {"X-Chat-Space": state.space, "Content-Type": type}});
    if (response.status === 415) return {name, picture};                  // the server keeps no files of this type
    if (!response.ok) throw await Server.errorOf(response);
    fileOf.set(picture, (await response.json()).id);
  }
  return {name, file: fileOf.get(picture)};
}

// A picture that the server has, as the page has it; null if it is gone. `known`: those that are here.
async function fetched({name, file, picture}, known) {
  const here = picture ?? known.find(each => fileOf.get(each.picture) === file)?.picture;
  if (here) return {name, picture: here};
  const response = await ask(`files/${file}`);
  if (response.status === 404) return null;
  if (!response.ok) throw await Server.errorOf(response);
  const blob = await response.blob(), made = await Composer.asData(blob);
  fileOf.set(made, file);
  return {name, picture: made};
}

// Sends what one request holds; true if there may be more.
async function sendSome() {
  const changes = await nextChanges();
  if (!changes.length) return false;
  for (const change of changes) if (change.patch?.pictures) change.patch = {...change.patch, pictures: await Promise.all(change.patch.pictures.map(uploaded))};
  const response = await ask("changes", {changes: changes.map(({kind, id, base, patch}) => ({kind: KIND[kind], id, base, patch}))});
  if (!response.ok) throw await Server.errorOf(response);
  const {data} = await response.json(), news = [];
  for (const [i, outcome] of data.entries()) news.push(...await settle(changes[i], outcome));
  if (news.length) Chat.hear(news);
  return true;
}

// A deletion waits as long as it can be undone. Chats come before their messages, and a message after the one it follows.
async function nextChanges() {
  const waits = Chat.toasts.some(({undo}) => undo), changes = waits ? [] : state.gone.map(([kind, id]) => ({kind, id, base: 0, patch: null}));
  if (waits && state.gone.length) {
    setGone(state.gone);
    soon(GROWING_MS);
  }
  let characters = 0;
  for (const kind of Object.keys(KIND)) {
    const keys = [...unsent].filter(key => key.startsWith(`${kind} `)).slice(0, MOST_READ);
    const found = await Promise.all(keys.map(key => Store.get(kind, key.split(" ")[1])));
    keys.forEach((key, i) => found[i] ?? unsent.delete(key));
    for (const record of parentsFirst(found.filter(Boolean))) {
      const key = `${kind} ${record.id}`, changed = patches.get(key), patch = kept(kind, record.rev && changed ? changed : record);
      if (!Object.keys(patch).length) { sent(kind, record.id, {}); continue; }
      if (Tree.isGrowing(record)) {
        if (record.rev && Chat.runs.get(record.id)?.kept) continue;           // the server writes it
        if (Date.now() - grownAt.get(record.stream.id) < GROWING_MS) { soon(GROWING_MS); continue; }
        grownAt.set(record.stream.id, Date.now());
      }
      const size = JSON.stringify(patch).length;
      if (changes.length && (changes.length === MOST_SENT || characters + size > SENT_CHARACTERS)) return changes;
      changes.push({kind, id: record.id, base: record.rev ?? 0, patch, changed});
      characters += size;
    }
  }
  return changes.slice(0, MOST_SENT);
}

function sent(kind, id, patch) {
  unsent.delete(`${kind} ${id}`);
  patches.delete(`${kind} ${id}`);
  Store.change(kind, id, {...patch, unsent: false}, true);
}

function parentsFirst(nodes) {
  const left = new Map(nodes.map(node => [node.id, node])), sorted = [];
  for (const node of nodes) {
    const line = [];
    for (let each = left.get(node.id); each; each = left.get(each.parent)) { left.delete(each.id); line.push(each); }
    sorted.push(...line.reverse());
  }
  return sorted;
}

// The fields of a record, or of a patch of one, that the server has. What does not fit would make it refuse the others.
const kept = (kind, values) => Object.fromEntries(Object.entries(Fields.fitting(kind, values)).filter(([name, value]) => !OWN.includes(name) && value !== undefined));

// What became of a change; returns news for this tab.
async function settle({kind, id, patch, changed}, {state: done, rev, record, error}) {
  const key = `${kind} ${id}`;
  if (patch === null) {
    setGone(state.gone.filter(each => each.join(" ") !== key));
    return [];
  }
  if (done === "deleted") return drop(kind, id);
  if (done === "refused") {
    unsent.delete(key);
    state.problem = error.message;
    const times = retries.get(key) ?? 0;
    if (["parent", "conversation"].includes(error.param) && times < 3) { retries.set(key, times + 1); unsent.add(key); }     // after the others
    return [];
  }
  if (patches.get(key) === changed) sent(kind, id, {rev});
  else Store.change(kind, id, {rev}, true);              // changed again while it was sent
  return record ? take(kind, id, rev, record, true) : [];
}

// What the server finds in its chats: calls `onPage` with each page of [{id, node, snippet}], the newest chats first, as long as that returns true. False if it
// cannot be asked.
async function search(query, onPage) {
  if (!state.on) return false;
  try {
    for (let after = null; ;) {
      const response = await ask(`search?q=${encodeURIComponent(query)}${after ? `&after=${after}` : ""}`, null, {signal: AbortSignal.timeout(SEARCH_MS)});
      if (!response.ok) return false;
      const {data, after: next} = await response.json();
      if (!onPage(data)) return true;
      if (!next) return true;
      after = next;
    }
  } catch (error) { return false; }
}

// Ids of the chats that have something which the server has not got, or that it never gets.
async function unsentChats() {
  const nodes = await Promise.all([...unsent].filter(key => key.startsWith("nodes ")).map(key => Store.get("nodes", key.slice(6))));
  return new Set([...nodes.filter(Boolean).map(({conversation}) => conversation), ...[...unsent].filter(key => key.startsWith("conversations ")).map(key => key.split(" ")[1])]);
}

// receiving ------------------------------------------------------------------------------------------------------------

const following = newest();        // only the newest loop goes on
let passedOver = null;             // the revision after which there was news of what a tab has deleted, and may bring back

// Waits for news as long as this tab has the lease.
async function follow() {
  const isMine = following();
  while (state.on && isMine()) {
    if (!leased()) { await wait(5000); continue; }
    takeOverGone();
    if (passedOver !== null && !allGone().length) {
      state.rev = passedOver;       // it is read again
      passedOver = null;
    }
    try {
      const response = await ask(`changes?after=${state.rev}&wait=${state.rev ? WAIT_S : 0}`);
      if (response.status === 410) { await listAnew(); continue; }
      if (!response.ok) throw await Server.errorOf(response);
      const {rev, data} = await response.json();
      await hear(data);
      state.rev = rev;
      save();
      if (!rev && !data.length) await wait(2000);       // there is nothing yet: without a revision the server does not wait
    } catch (error) {
      state.problem = error.message;
      await wait(5000);
    }
  }
}

function leased() {
  const now = Date.now();
  try {
    const {tab, until} = JSON.parse(localStorage.getItem(LEASE) ?? "{}");
    if (tab && tab !== me && until > now) return false;
    localStorage.setItem(LEASE, JSON.stringify({tab: me, until: now + LEASE_MS}));
  } catch (error) { /* without storage there is one tab */ }
  return true;
}

async function hear(rows) {
  const news = [];
  for (const {kind, id, rev, record} of rows) {
    const stored = STORED_AS[kind];
    if (stored) news.push(...record ? await take(stored, id, rev, record) : await drop(stored, id));
  }
  if (news.length) Chat.hear(news);
}

// Merges what the server has into a record; what is unsent stays as it is here. `isMore`: it has more than was sent, in the revision that is known.
async function take(kind, id, rev, record, isMore = false) {
  const known = await Store.get(kind, id);
  if (Chat.runs.has(id) || (isMore ? known?.rev > rev : known?.rev >= rev)) return [];
  if (Array.isArray(record.pictures)) record = {...record, pictures: (await Promise.all(record.pictures.map(each => fetched(each, known?.pictures ?? [])))).filter(Boolean)};
  record = Fields.fitting(kind, record);
  if (isGone(kind, id, record)) {
    passedOver ??= state.rev;
    return [];
  }
  const own = unsent.has(`${kind} ${id}`), mine = own ? kept(kind, patches.get(`${kind} ${id}`) ?? {}) : {};
  const gone = Object.fromEntries(Object.keys(kept(kind, known ?? {})).filter(name => !(name in record)).map(name => [name, null]));
  const begin = kind === "conversations" && !known ? Tree.newConversation({id}) : {};
  const patch = {...begin, ...(kind === "nodes" ? {parent: null} : {}), ...gone, ...record, ...mine, id, rev, unsent: own};
  if (known) delete patch.created;         // what is deleted before this is written does not come back
  Store.change(kind, id, patch, true);
  return [[kind, id, await Store.get(kind, id)]];
}

async function drop(kind, id) {
  for (const map of [patches, unsent]) map.delete(`${kind} ${id}`);
  const nodes = kind === "conversations" ? await Store.read("nodes", id) : [];
  for (const node of nodes) {
    unsent.delete(`nodes ${node.id}`);
    Store.change("nodes", node.id, null, true);
  }
  Store.change(kind, id, null, true);
  return [...nodes.map(node => ["nodes", node.id, null]), [kind, id, null]];
}

// The server no longer knows what was deleted since: what it had and does not list is gone.
async function listAnew() {
  const listed = new Set();
  let more = true, last = 0;
  while (more) {
    const response = await ask(`changes?after=${last}`);
    if (!response.ok) throw await Server.errorOf(response);
    const page = await response.json();
    for (const {id, record} of page.data) if (record) listed.add(id);
    await hear(page.data);
    ({has_more: more, rev: last} = page);
  }
  for (const kind of Object.keys(KIND)) {
    for (const {id, rev} of await Store.read(kind)) if (rev && !listed.has(id)) Chat.hear(await drop(kind, id));
  }
  state.rev = last;
  save();
}

// what the reader sees --------------------------------------------------------------------------------------------------

const link = () => `${location.origin}${location.pathname}#join/${state.space}`;

async function open() {
  if (!state.on) {
    if (!await Page.confirmed(TEXT.syncTitle, [paragraph(TEXT.syncOffer)], TEXT.syncNo, TEXT.syncYes)) return;
    await turnOn();
  }
  showLink();
}

// The link for another device, to copy and as a QR code.
async function showLink() {
  await Parts.need("qrcode");
  const told = state.problem ? TEXT.syncProblem(state.problem) : unsent.size ? TEXT.syncLeft(unsent.size) : TEXT.syncAll;
  const copy = element("button", {type: "button", className: "plain", textContent: TEXT.syncCopy, onclick: () => Turns.copyText(link(), copy)});
  const stop = element("button", {type: "button", className: "plain", textContent: TEXT.syncStop, onclick: () => { turnOff(); Page.closeQuestion(); }});
  Page.confirmed(TEXT.syncTitle, [
    paragraph(told), paragraph(TEXT.syncLink), element("p", {}, element("code", {id: "sync-link", textContent: link()})), element("div", {className: "line"}, copy),
    ...isOfThisComputer() ? [element("p", {className: "alert", textContent: TEXT.syncHere(location.host)})] : typeof qrcode === "function" ? [codeOf(link())] : [],
    element("div", {className: "line"}, stop)], "", TEXT.done);
}

// No other device reaches this address.
const isOfThisComputer = () => /^(localhost|.*\.localhost|127\..*|\[::1\]|0\.0\.0\.0)$/.test(location.hostname);

// A QR code, black on white for any camera.
function codeOf(text) {
  const code = qrcode(0, "M");
  code.addData(text);
  code.make();
  const count = code.getModuleCount(), rows = [...Array(count).keys()], made = name => document.createElementNS("http://www.w3.org/2000/svg", name);
  const svg = made("svg"), path = made("path");
  path.setAttribute("d", rows.flatMap(y => rows.filter(x => code.isDark(y, x)).map(x => `M${x + 4} ${y + 4}h1v1h-1z`)).join(""));
  svg.setAttribute("viewBox", `0 0 ${count + 8} ${count + 8}`);
  svg.setAttribute("class", "qr");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", TEXT.syncCode);
  svg.append(path);
  return svg;
}

const paragraph = text => element("p", {textContent: text});

// Opens the link of another device.
async function join(hash) {
  const space = hash.slice("#join/".length);
  history.replaceState(null, "", location.pathname + location.search);
  if (!/^[A-Za-z0-9_-]{22,64}$/.test(space)) return Chat.say(TEXT.syncBadLink);
  if (space === state.space && state.on) return;
  if (!await Page.confirmed(TEXT.syncTitle, [paragraph(TEXT.syncJoin)], TEXT.syncNo, TEXT.syncYes)) return;
  for (const kind of Object.keys(KIND)) for (const {id} of await Store.read(kind)) Store.change(kind, id, {rev: 0, unsent: true}, true);
  state.rev = 0;
  setGone([]);
  turnOn(space);
}

Parts.register({
  strings: {
    devices: "Chats on all your devices", syncTitle: "Chats on all your devices",
    syncOffer: "Keep the chats of this browser on this server, so that your other devices have them too? Who runs the server can read them.",
    syncJoin: "Use the chats of your other device in this browser? Those that are here are added to them.",
    syncNo: "Not now", syncYes: "Keep them", syncStop: "Stop keeping them", syncCopy: "Copy the link", syncCode: "QR code of the link",
    syncHere: host => `${host} is an address of this computer alone: on another device the link leads nowhere. Open this page here by the address under which others reach the server, then this shows their link.`,
    syncAll: "All chats of this browser are on the server.", syncLeft: count => `${count} messages and chats are still to be sent.`,
    syncProblem: why => `The server cannot be reached or does not take them: ${why}`,
    syncLink: "Open this link on another device. Whoever has it has your chats.", syncBadLink: "This link to another device is not complete.",
  },
  menu: () => Server.keepsChats ? [[TEXT.devices, "devices", () => open()]] : [],
  bind() {
    load();
    if (state.on) begin();
    addEventListener("storage", ({key}) => {            // another tab has begun or ended it
      if (key !== PLACE) return;
      const {on, space} = state;
      load();
      if (state.on && (!on || space !== state.space)) begin();
      else if (!state.on && on) Store.mark(false);
    });
    addEventListener("pagehide", () => {
      setGone(state.gone, 0);
      if (leased()) localStorage.removeItem(LEASE);
    });
  },
});

return Object.freeze({join, placeOf, search, unsentChats});
})();
