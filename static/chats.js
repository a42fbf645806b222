// The list of chats, their search, and export and import of chats as files.
"use strict";

const Chats = (() => {

const {TEXT, $, element, iconButton, setText, number, plural, folded, newest, composing, narrow} = Parts;

const rows = new Map();           // id of a chat -> its row
let shown = [];                   // ids of the chats that are listed
let listed = "";                  // a key of what the list shows, which is rebuilt only when it changes

function renderChats() {
  const chats = [...Chat.chats.values()].filter(({id}) => !matches || matches.has(id))
    .sort((a, b) => Boolean(b.temporary) - Boolean(a.temporary) || b.pinned - a.pinned || b.updated - a.updated);
  const today = new Date().setHours(0, 0, 0, 0);
  const projects = matches ? [] : Projects.sorted();
  const key = JSON.stringify([today, Chat.current.id, matches !== null, projects.map(({id, name}) => [id, name]), Projects.choosing,
    chats.map(chat => [chat.id, chat.title, chat.pinned, chat.running, groupOf(chat, today), Projects.isChosen(chat.id), matches?.get(chat.id)])]);
  if (key === listed) return;
  listed = key;
  shown = chats.map(({id}) => id);
  for (const id of rows.keys()) if (!Chat.chats.has(id)) rows.delete(id);
  const groups = new Map(projects.map(project => [project, []]));
  for (const chat of chats) {
    const group = groupOf(chat, today);
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(rowOf(chat));
  }
  keepFocus(() => $("chats").replaceChildren(
    ...[...groups].map(([group, rows]) => {
      const section = element("div", {}, group.id ? Projects.headingOf(group) : element("h2", {textContent: group}), element("ul", {}, ...rows));
      section.dataset.project = group.id ?? "";
      return section;
    }),
    ...(chats.length ? [] : [element("p", {className: "hint", textContent: matches ? TEXT.nothingFound : TEXT.noChats})])));
}

// Rows that move in the document lose the focus, so it is restored.
function keepFocus(change) {
  const focused = document.activeElement;
  change();
  if (focused !== document.activeElement && focused.isConnected) focused.focus({preventScroll: true});
}

const DAY_MS = 86400000;

// A project, or the name of a group.
const groupOf = (chat, today) => chat.temporary ? TEXT.temporary : Projects.of(chat) ?? dayOf(chat, today);

function dayOf({pinned, updated}, today) {
  const days = Math.ceil((today - updated) / DAY_MS);
  return pinned ? TEXT.pinned : days <= 0 ? TEXT.today : days <= 1 ? TEXT.yesterday : days <= 7 ? TEXT.lastWeek : days <= 30 ? TEXT.lastMonth
    : new Intl.DateTimeFormat(undefined, {month: "long", year: "numeric"}).format(updated);
}

function rowOf(chat) {
  let row = rows.get(chat.id);
  if (!row) rows.set(chat.id, row = newRow(chat.id));
  row.link.textContent = chat.title || TEXT.untitled;
  row.link.title = row.link.textContent;
  row.link.classList.toggle("running", Boolean(chat.running));
  if (chat.id === Chat.current.id) row.link.setAttribute("aria-current", "page");
  else row.link.removeAttribute("aria-current");
  row.pin.setAttribute("aria-pressed", chat.pinned);
  row.box.hidden = !Projects.choosing;
  row.box.checked = Projects.isChosen(chat.id);
  row.box.setAttribute("aria-label", row.link.textContent);
  const snippet = matches?.get(chat.id) ?? "";
  setText(row.snippet, snippet);
  row.snippet.hidden = !snippet;
  return row.item;
}

function newRow(id) {
  const chat = () => Chat.chats.get(id);
  const row = {link: element("a", {href: `${location.pathname}${location.search}#${id}`, dir: "auto"})};
  row.link.onclick = event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;      // opens in another tab or window
    event.preventDefault();
    if (Projects.choosing) return Projects.choose(id);
    Chat.open(id).then(Composer.focusAfterClick).then(() => showFound(foundAt.get(id)));
    showSidebar(!narrow.matches);
  };
  row.pin = iconButton(TEXT.pin, "pin", () => { Chat.change(chat(), {pinned: !chat().pinned}); Page.render(); });
  row.rename = iconButton(TEXT.rename, "edit", () => renameChat(row, chat()));
  row.move = iconButton(TEXT.moveChat, "more", anchor => Projects.openRowMenu(anchor, chat(), () => renameChat(row, chat())));
  row.box = element("input", {type: "checkbox", hidden: true, onclick: () => Projects.choose(id)});
  row.snippet = element("small", {className: "snippet", dir: "auto", hidden: true, onclick: () => row.link.click()});
  row.item = element("li", {draggable: true, ondragstart: event => Projects.drag(event, id)}, row.box, row.link, element("div", {className: "row-actions"}, row.pin, row.rename, row.move,
    iconButton(TEXT.delete, "delete", () => { Chat.deleteChats([chat()], TEXT.deleted(chat().title)); $("search").focus(); })), row.snippet);
  return row;
}

function renameChat(row, chat) {
  const field = element("input", {type: "text", value: chat.title, dir: "auto"});
  field.setAttribute("aria-label", TEXT.title);
  const end = title => {
    if (!field.isConnected) return;
    field.onblur = null;
    field.replaceWith(row.link);
    if (title.trim()) Chat.change(chat, {title: title.trim()});
    Page.render();
  };
  field.onblur = () => end(field.value);
  field.onkeydown = event => {
    if (composing(event)) return;
    if (event.key === "Enter") end(field.value);
    else if (event.key === "Escape") { event.stopPropagation(); end(chat.title); }
    else return;
    event.preventDefault();           // otherwise Enter would press the button that now has the focus
    row.rename.focus();
  };
  row.link.replaceWith(field);
  field.select();
}

const searching = newest();

// Shows the chats that contain all words of the query, in the title or in any message. Where the server has them all, it looks; here only those that it
// has not, such as temporary ones.
async function search(query) {
  const isMine = searching();
  words = folded(query).split(/\s+/).filter(Boolean);
  $("search-clear").hidden = !query;
  foundAt.clear();
  if (!words.length) { matches = null; return Page.render(); }
  const hits = new Map(), show = () => { matches = hits; Page.render(); Page.announce(TEXT.found(hits.size)); };
  const elsewhere = typeof Sync !== "undefined" && await Sync.search(query, found => {
    if (!isMine()) return false;
    for (const {id, node, snippet} of found) if (Chat.chats.has(id)) { hits.set(id, snippet); foundAt.set(id, node); }
    show();
    return true;
  });
  if (!isMine()) return;
  const own = elsewhere ? await Sync.unsentChats() : null, here = [...Chat.chats.values()].filter(({id}) => !own || own.has(id) || !Store.isKept(id));
  await searchHere(here, hits, own !== null);
  if (isMine()) show();
}

// Finds those of these chats that have all words. `few`: their messages are read chat by chat.
async function searchHere(chats, hits, few) {
  const texts = new Map(chats.map(({id, title}) => [id, folded(title)]));
  const nodes = few ? (await Promise.all(chats.map(({id}) => Store.read("nodes", id)))).flat() : await Store.read("nodes");
  for (const {conversation, content} of nodes) {
    if (texts.has(conversation)) texts.set(conversation, `${texts.get(conversation)}\n${folded(content)}`);
  }
  for (const [id, text] of texts) if (words.every(word => text.includes(word))) hits.set(id, "");
  findSnippets(nodes.filter(({conversation}) => texts.has(conversation)), hits);
}

const BEFORE = 30, AFTER = 90;    // characters of a snippet around the first word found

// Where the title of a chat that was found lacks a word: the text around it, from the first message that has the most of the words.
function findSnippets(nodes, matches) {
  const best = new Map();
  for (const {conversation, content, created} of nodes) {
    const title = matches.has(conversation) ? folded(Chat.chats.get(conversation).title) : "";
    const missing = title ? words.filter(word => !title.includes(word)) : [], text = missing.length ? folded(content) : "";
    const has = words.filter(word => text.includes(word)), first = missing.find(word => has.includes(word)), known = best.get(conversation);
    if (first && !(known?.count > has.length || known?.count === has.length && known.created <= created)) best.set(conversation, {count: has.length, created, content: content.normalize("NFC"), at: text.indexOf(first)});
  }
  for (const [id, {content, at}] of best) {
    const start = Math.max(0, at - BEFORE), end = at + AFTER, part = content.slice(start, end).replace(/[*`]+|<\/?(?:details|summary)>/g, "").replace(/\s+/g, " ");
    matches.set(id, `${start ? "…" : ""}${part}${end < content.length ? "…" : ""}`);
  }
}

const withChats = () => document.documentElement.classList.contains("with-chats");

// A column on wide screens, a drawer over the conversation on narrow ones.
function showSidebar(shown) {
  document.documentElement.classList.toggle("with-chats", shown);        // theme.js does so before the first paint
  $("chats-toggle").setAttribute("aria-expanded", shown);
  const drawer = shown && narrow.matches;
  for (const each of [document.querySelector("main"), document.querySelector("footer")]) each.inert = drawer;
  $("sidebar").inert = !shown;
  $("shade").hidden = !drawer;
}

function closeDrawer() {
  showSidebar(false);
  $("chats-toggle").focus();
}

function startSearch() {
  showSidebar(true);
  $("search").focus();
  $("search").select();
}

function toggleSidebar() {
  const shown = !withChats();
  showSidebar(shown);
  if (!narrow.matches) Settings.change({sidebar: shown});
  if (shown && narrow.matches) $("new").focus();
}

// highlighting matches ----------------------------------------------------------------------------------------------------

let words = [];                   // of the search, folded
let matches = null;               // id of each chat that matches the search -> the text around a word found; null without a search
const foundAt = new Map();        // id of a chat that the server has found -> the message with the words, if one has any
let marking = 0;

function markWords() {
  if (typeof Highlight !== "function" || !words.length && !CSS.highlights.size) return;
  cancelAnimationFrame(marking);
  marking = requestAnimationFrame(() => {
    const ranges = words.length ? [...$("chats").querySelectorAll("a, .snippet"), ...$("log").querySelectorAll(".turn > .body")].flatMap(rangesOf) : [];
    CSS.highlights.set("found", new Highlight(...ranges));
  });
}

function rangesOf(root) {
  const found = [], walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const text = folded(node.data);
    if (text.length !== node.data.length) continue;         // its characters stand elsewhere then
    for (const word of words) {
      for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) found.push(new StaticRange({startContainer: node, startOffset: at, endContainer: node, endOffset: at + word.length}));
    }
  }
  return found;
}

// Shows the message of a found chat that has the words, `at` if the server has named it, on whichever branch it is.
function showFound(at = null) {
  const has = ({id, content}) => Chat.nodes.has(at) ? id === at : words.some(word => folded(content).includes(word));
  if (!words.length) return;
  if (!Chat.path.some(has)) {
    const elsewhere = [...Chat.nodes.values()].find(has);
    if (!elsewhere) return;
    Chat.showLeaf(Tree.leafBelow(Chat.children, elsewhere.id));
  }
  Page.stopFollowing();
  Turns.scrollTo(Chat.path.find(has).id);
  markWords();
}

function startNewChat() {
  Chat.openNew();
  Page.announce(TEXT.newChat);
  showSidebar(!narrow.matches && withChats());
  Composer.focusAfterClick();
}

async function deleteAll() {
  const count = Chat.chats.size, body = [element("p", {textContent: TEXT.deleteAllHint})];
  if (await Page.confirmed(TEXT.deleteAllTitle(count), body, TEXT.cancel, TEXT.delete, true)) {
    await Chat.deleteChats([...Chat.chats.values()], TEXT.deletedChats(count));
  }
}

Parts.register({
  strings: {
    chat: "Chat", menu: "Menu", showChats: "Show or hide chats", untitled: "Untitled chat", title: "Title", pin: "Pin", more: "More",
    pinned: "Pinned", today: "Today", yesterday: "Yesterday", lastWeek: "Previous 7 days", lastMonth: "Previous 30 days",
    clearSearch: "Clear the search", noChats: "Your chats will appear here.", nothingFound: "No chat contains all of these words.",
    found: count => plural(count, "chat found", "chats found"),
    deleteAll: "Delete all chats", deleteAllTitle: count => `Delete ${count === 1 ? "the only chat" : `all ${number(count)} chats`}?`,
    deleteAllHint: "They exist only in this browser. Export them to keep a copy.",
    deletedChats: count => `Deleted ${plural(count, "chat", "chats")}.`, deleted: title => `Deleted “${title}”.`, deletedMessages: count => `Deleted ${plural(count, "message", "messages")}.`,
  },
  bind() {
    Projects.takesChats($("chats"));
    $("new").onclick = $("new-here").onclick = startNewChat;
    $("chats-toggle").onclick = toggleSidebar;
    $("shade").onclick = () => showSidebar(false);
    $("search-clear").onclick = () => { $("search").value = ""; search(""); $("search").focus(); };
    $("search").oninput = ({target}) => search(target.value);
    $("search").onkeydown = event => {
      const first = $("chats").querySelector("a");
      if (event.key === "Enter" && !composing(event)) first?.click();
      else if (event.key === "ArrowDown" && first) { event.preventDefault(); first.focus(); }
      else if (event.key === "Escape" && event.target.value) { event.stopPropagation(); event.target.value = ""; search(""); }
    };
    narrow.addEventListener("change", () => showSidebar(!narrow.matches && Settings.preferences.sidebar));
    showSidebar(!narrow.matches && Settings.preferences.sidebar);
  },
  render() {
    renderChats();
    markWords();
  },
});

// import and export ----------------------------------------------------------------------------------------------------

const keptChats = () => [...Chat.chats.values()].filter(({temporary}) => !temporary);

// A chat without messages is not exported.
const exportMenu = () => {
  const ofChat = Chat.path.length > 0, hasAny = keptChats().length > 0 || Prompts.own().length > 0;
  return [...(ofChat ? [[TEXT.thisChat, "export", () => exportChats([Chat.current])]] : []),
    ...(hasAny ? [[TEXT.allChats, "export", () => exportChats(keptChats(), Prompts.own(), Projects.sorted())]] : []),
    ...(ofChat ? [[TEXT.asMarkdown, "export", () => download(markdownOf(Chat.current, Chat.path), `${fileName(Chat.current)}.md`, "text/markdown")],
      [TEXT.asPage, "export", exportPage]] : [])];
};

// Shows what a file contains. If a chat is here already, the newer version replaces it unless the reader keeps both.
function showImport(chats, name) {
  const size = (count, time) => `${TEXT.messages(count)} · ${new Intl.DateTimeFormat(undefined, {dateStyle: "medium"}).format(time)}`;
  const rows = chats.map(({conversation: {title, updated}, nodes, twin}) => {
    const row = element("li", {}, element("span", {dir: "auto", textContent: title || TEXT.untitled}),
      element("small", {textContent: size(nodes.length, updated)}));
    if (!twin) return row;
    twin.replace = updated >= twin.chat.updated && nodes.length >= twin.count;
    const box = element("input", {type: "checkbox", checked: twin.replace, onchange: () => { twin.replace = box.checked; }});
    row.append(element("label", {className: "check"}, box, element("span", {textContent: TEXT.replace(size(twin.count, twin.chat.updated))})));
    return row;
  });
  const leftOut = Foreign.sumOf(chats.map(chat => chat.leftOut)), models = modelsOf(chats);
  return Page.confirmed(TEXT.importTitle(name), [element("p", {textContent: TEXT.brings(chats.length, countMessages(chats))}),
    ...(Object.keys(leftOut).length ? [element("p", {textContent: TEXT.leavesOut(TEXT.namedKinds(leftOut))})] : []), ...(models ? [element("p", {textContent: TEXT.answeredBy(models)})] : []),
    element("ul", {className: "imports"}, ...rows)], TEXT.leaveIt, TEXT.import);
}

// The models that wrote the answers of chats, if one of them is not served here.
function modelsOf(chats) {
  const names = [...new Set(chats.flatMap(({nodes}) => nodes.map(({model}) => model)))].filter(Boolean), served = Server.models.flatMap(({id, aliases = []}) => [id, ...aliases]);
  return names.every(name => served.includes(name)) ? "" : names.slice(0, 10).join(", ") + (names.length > 10 ? ", …" : "");
}

async function exportChats(chats, prompts = [], projects = [], title = "") {
  const nodes = new Map();
  for (const chat of chats) nodes.set(chat.id, chat.id === Chat.current.id ? [...Chat.nodes.values()] : await Store.read("nodes", chat.id));
  const file = Tree.exportOf(chats.filter(({id}) => nodes.get(id).length), chat => nodes.get(chat.id), prompts, projects);
  const name = title || chats.length === 1 ? fileName(title ? {title} : chats[0]) : `chats-${file.exported.slice(0, 10)}`;
  download(JSON.stringify(file, null, 2), `${name}.json`, "application/json");
}

const fileName = ({title}) => (title || TEXT.chat).replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "chat";

function download(text, name, type) {
  const link = element("a", {href: URL.createObjectURL(new Blob([text], {type: `${type};charset=utf-8`})), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

function markdownOf({title, system}, path) {
  const parts = [`# ${title || TEXT.chat}`, ...(system.trim() ? [`> ${system.trim().replace(/\n/g, "\n> ")}`] : [])];
  for (const node of path) {
    const {role, content, model, pictures = [], calculator} = node, sources = Knowledge.sourcesOf(node);
    parts.push(`## ${role === "user" ? TEXT.you : model || TEXT.assistant}`, ...pictures.map(({name, picture}) => `![${name.replace(/[[\]]/g, "")}](${picture})`), Calculator.withCode({content, calculator}));
    if (sources.length) parts.push(`${TEXT.sources}\n\n${sources.map(source => `- ${source.replace(/[\\`*_<>]/g, "\\$&")}`).join("\n")}`);
  }
  return parts.join("\n\n") + "\n";
}

// The colours that DRAWN_STYLE and PAGE_STYLE use.
const PAGE_COLOURS = ["ink", "page", "soft", "line", "sunken", "accent", "keyword", "string", "number", "comment", "title", "danger"];
const PAGE_STYLE = `body{max-width:48rem;margin:2rem auto;padding:0 1rem;font:16px/1.6 system-ui,sans-serif;color:var(--ink);background:var(--page)}
.speaker{margin:2.5rem 0 .5rem;padding-top:.5rem;border-top:1px solid var(--line);font-size:.9rem;font-weight:600;color:var(--soft)}
:is(h1,h2,h3,h4,h5,h6){line-height:1.3}.said :is(h1,h2,h3,h4,h5,h6){margin:1.3em 0 .5em}.said>:first-child{margin-top:0}
.said h1{font-size:1.4rem}.said h2{font-size:1.22rem}.said :is(h3,h4,h5,h6){font-size:1.06rem}a{color:var(--accent)}
code,.code{background:var(--sunken);border-radius:.4rem}code{padding:.1em .35em;font:.875em/1.5 ui-monospace,monospace}
.code{margin:.8em 0;white-space:normal}.code-bar{padding:.4rem .8rem 0;font-size:.8rem;color:var(--soft)}
pre{margin:0;padding:.2rem .8rem .8rem;overflow:auto;tab-size:4;font:.875rem/1.5 ui-monospace,monospace}
pre code{padding:0;background:none;font:inherit}
table{border-collapse:collapse}:is(td,th){border:1px solid #8888;padding:.3rem .7rem;text-align:start}li p{margin:.2rem 0}
blockquote{margin-inline:0;padding-left:1em;border-left:3px solid var(--line);color:var(--soft)}
.question{white-space:pre-wrap}.question img{display:block;max-width:100%;max-height:24rem;margin-bottom:.5rem}:is(.table,math){overflow:auto hidden}
@media print{pre{white-space:pre-wrap;overflow-wrap:anywhere}}`;

// A self-contained page without scripts.
function pageOf({title}, path) {
  const body = element("body", {}, element("h1", {textContent: title || TEXT.chat}));
  for (const node of path) {
    const {role, content, model, pictures = [], calculator} = node, sources = Knowledge.sourcesOf(node);
    const said = element("div", {className: role === "user" ? "said question" : "said"});
    said.append(...pictures.map(({name, picture}) => element("img", {src: picture, alt: name})));
    if (role === "user") said.append(...Turns.questionNodes(content));
    else new Markdown.View(said).update(content, true, calculator);
    said.querySelectorAll("button").forEach(button => button.remove());
    if (sources.length) said.append(element("p", {textContent: TEXT.sources}), element("ul", {}, ...sources.map(textContent => element("li", {textContent}))));
    body.append(element("h2", {className: "speaker", textContent: role === "user" ? TEXT.you : model || TEXT.assistant}), said);
  }
  const colours = getComputedStyle(document.documentElement);
  const root = PAGE_COLOURS.map(name => `--${name}:${colours.getPropertyValue(`--${name}`)}`);
  return `<!doctype html>\n<html lang="${document.documentElement.lang}"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width">${element("title", {textContent: title || TEXT.chat}).outerHTML}
<style>:root{color-scheme:light dark;${root.join(";")}}\n${PAGE_STYLE}${Markdown.DRAWN_STYLE}</style></head>\n${body.outerHTML}</html>\n`;
}

// Drawn twice where that needs libraries which nothing shown has needed.
async function exportPage() {
  const {current: chat, path} = Chat;
  pageOf(chat, path);
  await Promise.all(Parts.libraries.values());
  download(pageOf(chat, path), `${fileName(chat)}.html`, "text/html");
}

// Shows what a file contains, and stores it if the reader agrees. Nothing is stored before all of it has been read.
async function importFile(file) {
  try {
    const texts = await textsOf(file), chats = [];
    for (const {name, text} of texts) chats.push(...await Tree.importIn(text, name, texts.length > 1));
    if (!chats.length) throw new Error(TEXT.notAChat(file.name));
    for (const each of chats) each.twin = await twinOf(each);
    if (!await showImport(chats, file.name)) return;
    for (const {text} of texts) Projects.take(text, chats);
    importAll(chats, file.name);
    texts.forEach(({text}) => Prompts.take(text));
  } catch (error) {
    Chat.say(error.message);
  }
}

const unzip = Parts.late("zip", () => Zip, "textsIn");

// A zip may have several: [{name, text}].
async function textsOf(file) {
  if (await file.slice(0, 2).text() === "PK") return unzip(file, file.name);
  const text = await file.text().catch(() => { throw new Error(TEXT.unreadable(file.name)); });
  return [{name: file.name, text}];
}

// The stored copy of an imported chat: begun in the same millisecond with the same message. {chat, count} or null.
async function twinOf({conversation, nodes}) {
  for (const chat of Chat.chats.values()) {
    if (chat.created !== conversation.created) continue;
    const stored = await Store.read("nodes", chat.id), first = list => list.find(({parent}) => parent === null)?.content;
    if (first(stored) === first(nodes)) return {chat, count: stored.length};
  }
  return null;
}

// Stores chats. A `twin` marked `replace` is deleted.
async function importAll(chats, name) {
  const messages = countMessages(chats), text = TEXT.imported(chats.length, messages, name);
  for (const {conversation, nodes} of chats) Chat.addChat(conversation, nodes);
  const opened = Chat.open(chats[0]?.conversation.id, chats[0]?.nodes);
  const gone = await Chat.removeChats(chats.filter(({twin}) => twin?.replace).map(({twin}) => twin.chat));
  await opened;
  Chat.say(text);
  if (!gone.length) return;
  Chat.offerUndo(TEXT.replaced(gone.length), async () => {
    await Chat.removeChats(chats.map(({conversation}) => conversation));
    Chat.bringBack(gone);
  });
  Page.render();
}

const countMessages = chats => chats.reduce((count, {nodes}) => count + nodes.length, 0);

// Imports the one chat of an older version of the page, and deletes it there once it is stored here.
async function takeOverOldChat() {
  let old = null;
  try { old = JSON.parse(localStorage.getItem(Store.name)); } catch (error) { /* none */ }
  if (!Array.isArray(old?.turns)) return;
  const {system, ...parameters} = old.settings ?? {};
  for (const [i, turns] of [old.previous, old.turns].entries()) {
    if (!Array.isArray(turns) || !turns.length) continue;
    const {conversation, nodes} = Tree.importOf(JSON.stringify({messages: turns, system, parameters, updated: Date.now() + i}))[0];
    turns.forEach((turn, i) => { if (turn.stream?.id) Object.assign(nodes[i], {stream: turn.stream}); });
    Chat.addChat(conversation, nodes);
  }
  const {url, key} = old.server ?? {};
  const home = url ? Server.addressOf(url) : Server.PAGE_HOME;
  if (url && home) Settings.change({server: home, servers: [...Settings.preferences.servers, home]});
  if (key && home) Settings.change({keys: {...Settings.preferences.keys, [Server.originOf(home)]: key}});
  await Store.flushing;
  if (!Store.trouble) localStorage.removeItem(Store.name);
}

Parts.register({
  strings: {
    notJson: name => `${name} is not a conversation: it is not valid JSON.`,
    notAChat: name => `${name} is not a conversation: it must be JSON with "conversations", with a list "messages" of {role, content}, or an export of ChatGPT, Claude, Open WebUI or llama-server.`,
    badMessage: (name, chat, i) => `${name} is not a conversation: message ${i + 1} of chat ${chat + 1} lacks a role or text.`,
    sameIds: name => `${name} is not a conversation: two messages have the same id.`,
    messages: count => plural(count, "message", "messages"), importTitle: name => `Import ${name}?`, leaveIt: "Leave it",
    brings: (chats, messages) => `It contains ${plural(chats, "chat", "chats")} with ${plural(messages, "message", "messages")}.`,
    sources: "Sources:", leavesOut: what => `Left out, because there is no place for it here: ${what}.`, answeredBy: names => `The answers are of ${names}. The chats go on with a model of this server.`,
    unreadable: name => `${name} cannot be read. It may be too large.`,
    replace: what => `Replace the existing chat (${what})`,
    imported: (chats, messages, name) => `Imported ${plural(chats, "chat", "chats")} with ${plural(messages, "message", "messages")} from ${name}.`,
    replaced: count => `Replaced ${plural(count, "chat", "chats")}.`,
  },
  bind() {
    $("import-file").onchange = async ({target}) => { if (target.files[0]) await importFile(target.files[0]); target.value = ""; };
  },
  menu: () => [...(exportMenu().length ? [[TEXT.export, "export", anchor => Page.openMenu(anchor, exportMenu())]] : []), [TEXT.import, "import", () => $("import-file").click()]],
  menuEnd: () => Chat.chats.size ? [[TEXT.deleteAll, "delete", deleteAll, "", true]] : [],
});

return Object.freeze({withChats, closeDrawer, startSearch, startNew: startNewChat, shown: () => shown, exportChats, download, importAll, takeOverOldChat});
})();
