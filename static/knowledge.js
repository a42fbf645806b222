// Collections: vector stores of the server. Their dialog, which of them a chat asks, and the passages that an answer was given.
"use strict";

const Knowledge = (() => {

const {TEXT, $, element, iconButton, setText, number, newest, wait} = Parts;

const SHOWN = 100;                // rows of a page of a list, the most that the server gives
const POLL_MS = 1000;             // while files are being read
const ENGLISH_ONLY = /all-minilm/i;                     // the name of the default embedder

let stores = [];                  // the collections of the server, as v1/vector_stores has them
let available = false;            // whether the server has a database
let opened = null;                // the id of the collection whose files are shown
let pages = 1;                    // of its files, that are shown
let place = "";                   // the server and key that these belong to
const showing = newest();

const path = id => `v1/vector_stores/${encodeURIComponent(id)}`;

async function ask(where, options) {
  const response = await Server.request(where, {cache: "no-store", ...options});
  if (!response.ok) throw await Server.errorOf(response);
  return response.json();
}

async function send(where, body) { return ask(where, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)}); }

// The rows of a list, so many pages of it; and whether there are more.
async function rowsOf(where, most = Infinity) {
  let rows = [], more = true, after = "";
  for (let read = 0; more && read < most; read++) {
    const page = await ask(`${where}?limit=${SHOWN}${after}`);
    rows = rows.concat(page.data);
    more = page.has_more;
    after = `&after=${encodeURIComponent(page.last_id)}`;
  }
  return {rows, more};
}

// Reads the collections; a server without a database has none.
async function load() {
  const mine = Server.home() + Server.key();
  try {
    stores = (await rowsOf("v1/vector_stores")).rows;
    available = true;
  } catch (error) {
    stores = [];
    available = false;
  }
  place = mine;
}

// the chat --------------------------------------------------------------------------------------------------------------

const chosen = chat => chat.stores ?? [];

// What a question sends beside the chat's parameters. The answer says what the model was given to read, so that it can be asked again with the same.
function wanted(chat) {
  const asked = Projects.storesOf(chat);
  return asked.length ? {knowledge: {stores: asked.map(({id}) => id), return_text: true, ...chat.search}} : {};
}

// Messages with what an answer was given to read, where the server put it (chatlm/front/annexes/knowledge/prompting.py): whole documents after what the system
// says, passages before the last question. A test compares the two.
function given(messages, {mode, text} = {}) {
  if (!text) return messages;
  const at = mode === "whole" ? messages[0]?.role === "system" ? 0 : -1 : messages.findLastIndex(({role}) => role === "user");
  if (at < 0) return mode === "whole" ? [{role: "system", content: text}, ...messages] : messages;
  const {content} = messages[at], both = mode === "whole" ? [content, `\n\n${text}`] : [text, content];
  const whole = Fields.isText(content) ? both.join("") : both.flatMap(part => Fields.isText(part) ? [{type: "text", text: part}] : part);
  return messages.with(at, {...messages[at], content: whole});
}

// The collections of the server that have a name, for projects.
async function listed() {
  if (Server.model.ours && Server.phase === "ready") await load();
  return stores.filter(({name, status}) => name && status !== "expired");
}

// Whether a question was refused because a collection of its chat is gone. Those that are leave the chat and its project, and the error says so.
async function isGone(chat, error) {
  const named = Projects.storesOf(chat).filter(({id}, at) => error.param === `knowledge.stores[${at}]` || error.status === 404 && error.message.includes(id));
  if (!named.length) return false;
  await load();
  const gone = Projects.storesOf(chat).filter(each => named.includes(each) || available && !stores.some(({id, status}) => id === each.id && status !== "expired"));
  Projects.forget(chat, gone);
  error.message = TEXT.storesGone(gone.map(({name}) => name));
  return true;
}

// Names of collections that begin so, for # in the message box; they are read at the first #.
function names(begun) {
  if (place !== Server.home() + Server.key() && Server.model.ours && Server.phase === "ready") {
    place = Server.home() + Server.key();
    load().then(() => Composer.offer());
  }
  return stores.filter(({name, status}) => name && status !== "expired" && name.toLowerCase().startsWith(begun)).map(({name}) => name);
}

function choose(name, on = true) {
  const chat = Chat.current, rest = chosen(chat).filter(each => each.name !== name), store = stores.find(each => each.name === name);
  Chat.change(chat, {stores: on && store ? [...rest, {id: store.id, name}] : rest});
  Page.render();
}

function render() {
  const list = $("asked-stores"), names = chosen(Chat.current).map(({name}) => name), project = Projects.of(Chat.current), key = [project?.name, ...names].join("\n");
  if (list.dataset.names === key) return;
  list.dataset.names = key;
  const chip = (name, text, act, icon = "") => element("li", {className: icon}, element("span", {textContent: name}), iconButton(text, "close", act));
  list.replaceChildren(...(project ? [chip(project.name, TEXT.leaveProject(project.name), () => Projects.move([Chat.current], null), "icon i-folder")] : []),
    ...names.map(name => chip(`# ${name}`, TEXT.leaveOut(name), () => choose(name, false))));
}

// the dialog ------------------------------------------------------------------------------------------------------------

async function open() {
  opened = null;
  const set = Chat.current.search ?? {};
  for (const [field, name] of searchFields()) field.value = set[name] ?? "";
  $("knowledge-dialog").showModal();
  await show();
}

const searchFields = () => [[$("most-passages"), "max_num_results"], [$("least-score"), "score_threshold"]];

// How the chat is to be searched; empty fields are the server's choice.
function limit() {
  if (!searchFields().every(([field]) => field.reportValidity())) return;
  Chat.change(Chat.current, {search: Object.fromEntries(searchFields().filter(([{value}]) => value).map(([{value}, name]) => [name, Number(value)]))});
}

// Draws the dialog anew, again and again while files are being read.
async function show() {
  const isMine = showing();
  for (;;) {
    await load();
    const store = stores.find(({id}) => id === opened);
    let files = {rows: [], more: false};
    try {
      if (store) files = await rowsOf(`${path(store.id)}/files`, pages);
    } catch (error) { tell(error); }
    if (!isMine()) return;
    draw(store, files);
    if (!$("knowledge-dialog").open || !stores.some(({status}) => status === "in_progress")) return;
    await wait(POLL_MS);
  }
}

function draw(store, files) {
  $("stores").replaceChildren(...stores.flatMap(each => [storeRow(each), ...each === store ? [filesOf(store, files)] : []]),
    ...(stores.length ? [] : [element("li", {className: "hint", textContent: available ? TEXT.noStores : TEXT.noDatabase})]));
  $("new-store").hidden = !available;
}

const stateOf = ({file_counts: count}) => [TEXT.storeFiles(count.completed), count.in_progress ? TEXT.storeReading(count.in_progress) : "", count.failed ? TEXT.storeFailed(count.failed) : ""].filter(Boolean).join(" · ");

function storeRow(store) {
  const {id, name, problem, read_only: fixed} = store, label = name || id;
  const toggle = element("button", {type: "button", className: "plain", textContent: label, onclick: () => { opened = opened === id ? null : id; pages = 1; show(); }});
  toggle.setAttribute("aria-expanded", opened === id);
  return element("li", {}, toggle, element("small", {textContent: [stateOf(store), fixed ? TEXT.storeFixed : "", problem ?? ""].filter(Boolean).join(" · ")}),
    ...fixed ? [] : [iconButton(`${TEXT.delete}: ${label}`, "delete", () => change(() => remove(store)))]);
}

async function remove({id, name}) {
  await ask(path(id), {method: "DELETE"});
  if (chosen(Chat.current).some(each => each.id === id)) choose(name, false);
}

// What the server could not do with a file, it may do now.
const again = (store, {id, attributes}) => change(() => send(`${path(store.id)}/files`, {file_id: id, attributes}));

// Whether a collection's texts are embedded by a model that reads English alone. One without files has the server's usual embedder.
const readsEnglishOnly = ({embedding_model: name}) => name ? ENGLISH_ONLY.test(name) : Server.models.some(({id}) => ENGLISH_ONLY.test(id));

function filesOf(store, files) {
  const rows = files.rows.map(file => element("li", {}, element("span", {textContent: file.filename}),
    element("small", {className: file.status === "failed" ? "alert" : "", textContent: file.last_error?.message ?? file.cut ?? TEXT.fileStates[file.status]}),
    ...file.last_error?.code === "server_error" && !store.read_only ? [iconButton(`${TEXT.readAgain}: ${file.filename}`, "again", () => again(store, file))] : [],
    ...store.read_only ? [] : [iconButton(`${TEXT.delete}: ${file.filename}`, "delete", () => change(() => ask(`${path(store.id)}/files/${file.id}`, {method: "DELETE"})))]));
  if (readsEnglishOnly(store)) rows.unshift(element("li", {className: "hint", textContent: TEXT.englishOnly}));
  const all = store.file_counts.total, shown = files.rows.length, box = element("li", {className: "inside"}, element("ul", {className: "counts"}, ...rows));
  if (files.more) box.append(element("div", {className: "line"}, element("small", {textContent: TEXT.newestFiles(shown, all)}),
    element("button", {type: "button", className: "plain", textContent: TEXT.olderFiles, onclick: () => { pages++; show(); }})));
  if (store.read_only) return box;
  const pick = folder => element("button", {type: "button", className: "plain", textContent: folder ? TEXT.addFolder : TEXT.addDocuments, onclick: () => {
    const input = element("input", {type: "file", multiple: true, webkitdirectory: folder, onchange: () => add(store, [...input.files])});
    input.click();
  }});
  box.append(element("div", {className: "line"}, pick(false), pick(true), element("small", {textContent: TEXT.orDrop})));
  box.ondragover = event => event.preventDefault();
  box.ondrop = async event => {
    event.preventDefault();
    event.stopPropagation();
    const entries = [...event.dataTransfer.items].map(item => item.webkitGetAsEntry()).filter(Boolean);
    add(store, (await Promise.all(entries.map(filesIn))).flat());
  };
  return box;
}

// The files of a dropped file or folder, each with its path as `path`.
async function filesIn(entry) {
  if (entry.isFile) return [Object.assign(await new Promise((resolve, reject) => { entry.file(resolve, reject); }), {path: entry.fullPath.slice(1)})];
  const reader = entry.createReader(), found = [];
  for (;;) {                                            // a call returns a hundred entries at most
    const part = await new Promise((resolve, reject) => { reader.readEntries(resolve, reject); });
    if (!part.length) return (await Promise.all(found.map(filesIn))).flat();
    found.push(...part);
  }
}

// Uploads files into a collection; what is refused is named, and the others go on.
async function add(store, files) {
  const problems = [];
  for (const [i, file] of files.entries()) {
    const name = file.path || file.webkitRelativePath || file.name;
    setText($("knowledge-problem"), TEXT.sendingFile(name, i + 1, files.length));
    try {
      const form = new FormData();
      form.append("purpose", "assistants");
      form.append("file", file, name);
      const {id} = await ask("v1/files", {method: "POST", body: form});
      await send(`${path(store.id)}/files`, {file_id: id});
    } catch (error) { problems.push(`${name}: ${error.message}`); }
  }
  setText($("knowledge-problem"), problems.slice(0, 5).join("\n"));
  show();
}

async function change(act) {
  setText($("knowledge-problem"), "");
  try { await act(); } catch (error) { tell(error); }
  await show();
}

const tell = error => setText($("knowledge-problem"), error.message);

function make() {
  const name = $("store-name").value.trim();
  if (!name) return $("store-name").focus();
  $("store-name").value = "";
  return change(async () => { opened = (await send("v1/vector_stores", {name})).id; });
}

// passages --------------------------------------------------------------------------------------------------------------

// Opens a passage in its place: its file's text, with the passage marked.
// Where a passage stands, in words.
const sourceOf = ({filename, page, heading}) => [filename, page ? TEXT.onPage(page) : "", heading].filter(Boolean).join(" · ");

// The passages that an answer was given to read, in words, for files: ["[1] pump.md · page 3"].
const sourcesOf = ({knowledge}) => (knowledge?.passages ?? []).map(passage => `[${passage.index}] ${sourceOf(passage)}`);

async function openPassage(passage) {
  const {vector_store_id: store, file_id: file, start} = passage, body = $("passage-text");
  setText($("passage-title"), sourceOf(passage));
  body.replaceChildren();
  $("passage-dialog").showModal();
  let on = null;                                        // the page of the part before
  try {
    for (let next = "0"; next !== null;) {
      const found = await ask(`${path(store)}/files/${encodeURIComponent(file)}/content?page=${next}`);
      for (const part of found.data) {
        if (part.page && part.page !== on) body.append(element("h3", {textContent: TEXT.onPage(part.page)}));
        on = part.page;
        body.append(element(part.start === start ? "mark" : "span", {textContent: part.text}));
      }
      next = found.next_page;
      if (body.querySelector("mark")) break;
    }
    if (!body.querySelector("mark")) body.prepend(element("p", {className: "alert", textContent: TEXT.passageGone}));
    body.querySelector("mark")?.scrollIntoView({block: "center"});
  } catch (error) { body.append(element("p", {className: "alert", textContent: error.message})); }
}

// Makes the numbers of passages in an answer's text buttons that open them, [2] and [1, 3]; not those in code and links. The server finds the same ones
// (chatlm/front/api/citations.py); a test compares the two.
const CITED = /(\[[1-9]\d{0,3}(?:[,;] ?[1-9]\d{0,3}){0,9}\])/;

function cite(view, given) {
  const walker = document.createTreeWalker(view.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) if (CITED.test(walker.currentNode.data) && !walker.currentNode.parentNode.closest("pre, code, a, button")) found.push(walker.currentNode);
  for (const node of found) node.replaceWith(...node.data.split(CITED).flatMap(part => {
    const passages = CITED.test(part) ? part.match(/\d+/g).map(number => given[number - 1]) : [];
    return passages.length && passages.every(Boolean) ? passages.map(passage => passageButton(passage)) : [part];
  }));
}

// In a text the number alone; below it also the name and the place, since nothing is hovered over on a phone.
function passageButton(passage, words = "") {
  const button = element("button", {type: "button", className: "plain cited", textContent: [`[${passage.index}]`, words].filter(Boolean).join(" "), title: sourceOf(passage), onclick: () => openPassage(passage)});
  button.setAttribute("aria-label", TEXT.openPassage(passage.index, passage.filename));
  return button;
}

Parts.register({
  strings: {
    knowledge: "Collections", newStore: "New collection", storeName: "Name of the collection", noStores: "None yet.", noDatabase: "This server keeps none: it needs --database and --embedder.",
    knowledgeHint: "Documents that a chat can be asked about. # and a name in the message box choose a collection for this chat.",
    searchOf: "How many passages this chat reads", mostPassages: "Passages at most", leastScore: "Least score", asWorth: "those worth reading",
    storeFiles: count => Parts.plural(count, "file", "files"), storeReading: count => `${number(count)} being read`, storeFailed: count => `${number(count)} failed`, storeFixed: "follows a folder of the server",
    englishOnly: "The server's embedder reads English alone. For other languages it must be started with --embedder multilingual-e5-small (91 MB).",
    fileStates: {in_progress: "being read", completed: "read", cancelled: "cancelled", failed: "failed"}, newestFiles: (count, all) => `The newest ${number(count)} of ${number(all)}.`, olderFiles: "Show more",
    readAgain: "Read again", passageGone: "The file has changed since: the passage is no longer in it.",
    storesGone: names => `${names.length > 1 ? "The collections" : "The collection"} ${names.join(", ")} ${names.length > 1 ? "are" : "is"} gone from the server, so this chat no longer asks ${names.length > 1 ? "them" : "it"}. Send the message again to have it answered without.`,
    addDocuments: "Add files", addFolder: "Add a folder", orDrop: "or drop them here", sendingFile: (name, at, all) => `Sending ${name} (${at} of ${all})`,
    leaveOut: name => `Do not ask ${name}`, onPage: page => `page ${page}`, partsRead: (read, of) => `${number(read)} of ${Parts.plural(of, "part was", "parts were")} read`, openPassage: (index, name) => `Passage ${index}, ${name}`,
  },
  bind() {
    $("new-store").onclick = make;
    for (const [field] of searchFields()) field.onchange = limit;
  },
  menu: () => Server.model.ours ? [[TEXT.knowledge, "file", open]] : [],
  render,
  answer: {
    buttons(view) {
      view.passages = element("p", {className: "nothing"});
      return [];
    },
    update(view, growing) {
      const {node, passages} = view, {read = 0, of = 0, passages: given = []} = node.knowledge ?? {};
      if (!node.knowledge) return;
      if (!growing && CITED.test(node.content)) cite(view, given);
      if (passages.childElementCount) return;
      passages.className = "passages hint";
      passages.append(element("span", {textContent: TEXT.partsRead(read, of)}), ...given.map(passage => passageButton(passage, sourceOf(passage))));
      view.actions.before(passages);
    },
  },
});

return Object.freeze({wanted, given, sourcesOf, listed, names, choose, isGone});
})();
