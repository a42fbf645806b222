// The page around the turns: header, list of chats, composer, menus, dialogs, keys; and the start.
"use strict";

const $ = id => document.getElementById(id);
const touch = matchMedia("(pointer: coarse)");
const narrow = matchMedia("(max-width: 860px)");
// then Enter confirms an input method's word
const composing = event => event.isComposing || event.keyCode === 229;

// rendering -----------------------------------------------------------------------------------------------------------

// Makes the page show `state`; touches only what differs.
function render() {
  const {chat, model, phase} = state, growing = isGrowing(lastNode());
  setText($("title"), chat.title || TEXT.newChat);
  renderModels();
  const completing = model.api === "text";
  document.body.classList.toggle("completing", completing);
  $("message").placeholder = completing ? TEXT.textHint : TEXT.messageHint;
  document.title = (state.ended ? TEXT.endedMark : "") + titleOfTab(chat, model);
  $("lamp").className = phase;
  $("status").hidden = !glanced;
  $("log").hidden = document.querySelector("body > footer").hidden = Boolean(glanced);
  const turns = renderTurns();
  if (!hasEnd() && ($("log").childElementCount !== 1 || !$("log").contains(empty.node))) $("log").scrollTop = 0;
  syncChildren($("log"), [...(turns.length ? turns : [emptyPage()]), ...(state.notice ? [noticeOf(state.notice)] : [])]);
  renderChats();
  renderComposer(growing);
  renderToasts();
  renderState();
  followEnd();
  markWords();
}

function renderComposer(growing) {
  const sent = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = growing;
  $("stop").hidden = !growing;
  if (sent) focusAfterClick();
  $("send").disabled = !canAsk() || !state.draft.text.trim() && !state.draft.files.length;
  setText($("refusal"), state.refusal);
  $("refusal").hidden = !state.refusal;
  setText($("trouble"), store.trouble ? TEXT.trouble[store.trouble] : "");
  $("trouble").hidden = !store.trouble;
}

// A choice of the server's models; of several with the state and size of each.
function renderModels() {
  const {model} = state, models = state.models.length || !model.name ? state.models : [{id: model.name}], select = $("models");
  setText($("model"), models.length ? "" : TEXT.chat);
  select.hidden = !models.length;
  const ids = models.map(({id}) => id).join("\n");
  if (select.ids !== ids) select.replaceChildren(...models.map(({id}) => element("option", {value: id})));
  select.ids = ids;
  const loading = models.find(({id}) => id === model.name)?.loading;
  $("model-loading").hidden = loading === undefined;
  $("model-loading").value = loading ?? 0;
  models.forEach((each, i) => {
    const {id, state: its, reason} = each, option = select.options[i];
    setText(option, models.length > 1 ? TEXT.modelIs(each, baseOf(each).id) : id);
    Object.assign(option, {disabled: its === "failed", title: reason ?? ""});
  });
  select.value = model.name;
}

function chooseModel(name) {
  changeChat(state.chat, {model: name});
  useModel();
  render();
  loadModel();
}

const titleOfTab = (chat, model) => chat.title ? `${chat.title} - ${model.name || TEXT.chat}`
  : model.name ? `${model.name} - ${TEXT.chat}` : TEXT.chat;

const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };

function syncChildren(parent, nodes) {
  nodes.forEach((node, i) => { if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] ?? null); });
  while (parent.children.length > nodes.length) parent.lastElementChild.remove();
}

// The line below the composer, with how full the context is.
function renderState() {
  const last = lastNode(), run = state.runs.get(last?.id);
  const shownInTurn = isGrowing(last) && !last.content && !run?.lost;
  setText($("state"), shownInTurn ? "" : isGrowing(last) ? growingText(last, run) + (run ? liveSpeedText(run) : "")
    : state.path.length ? serverText() : "");             // the empty page says it itself
  $("enter-key").hidden = state.phase !== "locked";
  renderGauge();
}

const loadingText = ({stage, fraction, waits}) => waits ? sentence(stage) : TEXT.loading(stage || TEXT.starting, fraction);

// {used, guessed}: tokens of the path as the server last counted them, and about how many came after that.
function usedTokens() {
  let guessed = 0;
  for (const node of state.path.toReversed()) {
    const {prompt_tokens: prompt, completion_tokens: count = 0} = countsOf(state.runs.get(node.id)) ?? node.timings ?? {};
    if (prompt) return {used: prompt + count, guessed};
    guessed += Math.ceil((node.content.length + (node.reasoning?.length ?? 0)) / TOKEN_CHARACTERS);
  }
  return {used: 0, guessed};
}

function renderGauge() {
  const {path, model: {context, ours}, counted, chat: {parameters}} = state;
  const {used: known, guessed} = usedTokens(), used = known + guessed;
  const current = counted.text && counted.text === draftContent(), draft = current ? counted.tokens : 0;
  const alone = draft && draft + counted.around;
  // ours keeps this much for the answer when it chooses what to leave out; others may refuse instead
  const kept = ours ? Math.min(parameters.max_tokens ?? Infinity, Math.floor(context / 4)) : 0;
  $("gauge").hidden = !context || !used && !draft;
  setText($("warning"), !context ? "" : alone >= context ? TEXT.tooLong(alone, context, state.draft.files.length)
    : path.length && used + draft + kept > context && !isGrowing(lastNode()) ? (ours ? TEXT.willDrop : TEXT.full) : "");
  if ($("gauge").hidden) return;
  setText($("context"), TEXT.used(used, draft, context, guessed > 0));
  $("gauge").style.setProperty("--used", Math.min(1, used / context));
  $("gauge").style.setProperty("--draft", Math.min(1, draft / context));
}

const noticeOf = text => element("p", {className: "notice", textContent: text});

// An empty conversation: the model or its loading progress, and prompts to start with.
let empty = {key: "", node: null};

function emptyPage() {
  const {model, phase, loading} = state;
  const key = JSON.stringify([model.name, model.api, model.devices, model.context, phase, serverText(), canAsk()]);
  if (empty.key === key) return empty.node;
  const page = element("section", {className: "empty"}, element("h2", {textContent: model.api === "text" ? TEXT.welcomeText : TEXT.welcome}));
  page.append(element("p", {textContent: serverText() || TEXT.running(model.devices.map(TEXT.device), model.context)}));
  if (model.api === "text") page.append(noticeOf(TEXT.completes));
  if (/^SmolLM2-135M/.test(model.name)) page.append(element("p", {className: "notice"}, ...TEXT.demonstration(text => element("code", {textContent: text}))));
  if (phase === "loading" && !loading.waits) {
    const bar = element("progress", loading.fraction ? {max: 1, value: loading.fraction} : {});
    bar.setAttribute("aria-label", TEXT.loadingLabel);
    page.append(bar);
  }
  const starters = ownPrompts().filter(({starter}) => starter), examples = ["text", "none"].includes(model.api) || starters.length ? [] : TEXT.examples;
  page.append(element("div", {className: "examples"}, ...starters.map(prompt =>
    element("button", {type: "button", textContent: prompt.name, title: prompt.text, onclick: () => usePrompt(prompt)})), ...examples.map(text =>
    element("button", {type: "button", textContent: text, disabled: !canAsk(), onclick: () => { ask(text); focusAfterClick(); }}))));
  empty = {key, node: page};
  return page;
}

function renderToasts() {
  const {toasts} = state, shown = $("toasts");
  if (shown.toasts === toasts) return;
  shown.toasts = toasts;
  shown.replaceChildren(...toasts.map(toast => {
    const close = act => { state.toasts = state.toasts.filter(each => each !== toast); act(); render(); };
    return element("div", {className: "toast"}, element("span", {textContent: toast.text}),
      element("button", {type: "button", className: "plain", textContent: toast.label, onclick: () => close(toast.act)}),
      iconButton(TEXT.dismiss, "close", () => close(() => {})));
  }));
}

function announce(text) { $("announcer").textContent = text; }

// The log scrolls along until the reader scrolls up, and again once they are back at the end.
let lastTop = 0;

// The empty page is read from its top.
const hasEnd = () => state.path.length > 0 || state.notice !== "";
const atEnd = slack => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight <= slack;

function followEnd() {
  const log = $("log");
  if (state.following && hasEnd()) log.scrollTop = log.scrollHeight;
  $("latest").hidden = state.following || !hasEnd() || atEnd(40);
}

function onScroll() {
  const top = $("log").scrollTop;
  if (atEnd(2)) state.following = true;
  else if (top < lastTop - 1) state.following = false;
  lastTop = top;
  document.body.classList.toggle("scrolled", top > 2);
  $("latest").hidden = state.following || !hasEnd() || atEnd(40);
}

// list of chats -------------------------------------------------------------------------------------------------------

const rows = new Map();           // id of a chat -> its row
let listed = "";                  // what the list shows, so that it is rebuilt only when that changes

function renderChats() {
  const chats = [...state.chats.values()].filter(({id}) => !state.found || state.found.has(id))
    .sort((a, b) => b.pinned - a.pinned || b.updated - a.updated);
  const today = new Date().setHours(0, 0, 0, 0);
  const key = JSON.stringify([today, state.chat.id, state.found !== null, chats.map(chat => [chat.id, chat.title, chat.pinned, chat.running, dayOf(chat, today)])]);
  if (key === listed) return;
  listed = key;
  for (const id of rows.keys()) if (!state.chats.has(id)) rows.delete(id);
  const groups = new Map();
  for (const chat of chats) {
    const day = dayOf(chat, today);
    if (!groups.has(day)) groups.set(day, []);
    groups.get(day).push(rowOf(chat));
  }
  keepFocus(() => $("chats").replaceChildren(
    ...[...groups].flatMap(([day, its]) => [element("h2", {textContent: day}), element("ul", {}, ...its)]),
    ...(chats.length ? [] : [element("p", {className: "hint", textContent: state.found ? TEXT.nothingFound : TEXT.noChats})])));
}

// Rows that move in the document lose the focus, so it is given back.
function keepFocus(change) {
  const focused = document.activeElement;
  change();
  if (focused !== document.activeElement && focused.isConnected) focused.focus({preventScroll: true});
}

const DAY_MS = 86400000;

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
  if (chat.id === state.chat.id) row.link.setAttribute("aria-current", "page");
  else row.link.removeAttribute("aria-current");
  row.pin.setAttribute("aria-pressed", chat.pinned);
  return row.item;
}

function newRow(id) {
  const chat = () => state.chats.get(id);
  const row = {link: element("a", {href: `${location.pathname}${location.search}#${id}`, dir: "auto"})};
  row.link.onclick = event => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;      // opens in another tab or window
    event.preventDefault();
    openChat(id).then(focusAfterClick).then(showFound);
    showSidebar(!narrow.matches);
  };
  row.pin = iconButton(TEXT.pin, "pin", () => { changeChat(chat(), {pinned: !chat().pinned}); render(); });
  row.rename = iconButton(TEXT.rename, "edit", () => renameChat(row, chat()));
  row.item = element("li", {}, row.link, element("div", {className: "row-actions"}, row.pin, row.rename,
    iconButton(TEXT.delete, "delete", () => { deleteChats([chat()], TEXT.deleted(chat().title)); $("search").focus(); })));
  return row;
}

function renameChat(row, chat) {
  const field = element("input", {type: "text", value: chat.title, dir: "auto"});
  field.setAttribute("aria-label", TEXT.title);
  const end = title => {
    if (!field.isConnected) return;
    field.onblur = null;
    field.replaceWith(row.link);
    if (title.trim()) changeChat(chat, {title: title.trim()});
    render();
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

// Shows the chats that have all words of the query, in the title or in any message.
async function search(query) {
  const isMine = searching();
  words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) { state.found = null; return render(); }
  const texts = new Map([...state.chats.values()].map(({id, title}) => [id, title.toLowerCase()]));
  for (const {conversation, content} of await store.read("nodes")) {
    if (texts.has(conversation)) texts.set(conversation, `${texts.get(conversation)}\n${content.toLowerCase()}`);
  }
  if (!isMine()) return;
  state.found = new Set([...texts].filter(([, text]) => words.every(word => text.includes(word))).map(([id]) => id));
  render();
  announce(TEXT.found(state.found.size));
}

const withChats = () => document.documentElement.classList.contains("with-chats");

// A column on wide screens, a drawer over the conversation on narrow ones.
function showSidebar(shown) {
  document.documentElement.classList.toggle("with-chats", shown);        // theme.js does so before the first picture
  $("chats-toggle").setAttribute("aria-expanded", shown);
  const drawer = shown && narrow.matches;
  for (const each of [document.querySelector("main"), document.querySelector("footer")]) each.inert = drawer;
  $("sidebar").inert = !shown;
  $("shade").hidden = !drawer;
}

function toggleSidebar() {
  const shown = !withChats();
  showSidebar(shown);
  if (!narrow.matches) changePreferences({sidebar: shown});
  if (shown && narrow.matches) $("new").focus();
}

// menus ---------------------------------------------------------------------------------------------------------------

// A menu of [label, icon, act, value] below a button, with a text at its end. Arrow keys move in it, Escape and a click
// elsewhere close it.
function openMenu(anchor, items, text = "") {
  const buttons = items.map(([label, icon, act, value]) => {
    const made = button(label, icon, () => { menu.hidePopover(); act(anchor); });
    if (value) made.append(element("small", {textContent: value, ariaHidden: "true"}));
    return made;
  });
  const menu = element("div", {className: "menu", popover: "auto"}, ...buttons, ...(text ? [element("p", {className: "hint", textContent: text})] : []));
  menu.setAttribute("role", "group");
  menu.setAttribute("aria-label", anchor.getAttribute("aria-label"));
  menu.onkeydown = event => moveInMenu(event, buttons);
  menu.addEventListener("toggle", event => {
    if (event.newState === "open") return;
    anchor.setAttribute("aria-expanded", "false");
    if (menu.contains(document.activeElement) || document.activeElement === document.body) anchor.focus();
    menu.remove();
  });
  (anchor.closest("header, main, nav") ?? document.body).append(menu);
  menu.showPopover();
  anchor.setAttribute("aria-expanded", "true");
  placeMenu(menu, anchor.getBoundingClientRect());
  buttons[0].focus();
}

function placeMenu(menu, {left, right, top, bottom}) {
  const {offsetWidth: width, offsetHeight: height} = menu;
  menu.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8, right))}px`;
  menu.style.top = `${bottom + height + 12 < innerHeight ? bottom + 4 : Math.max(8, top - height - 4)}px`;
}

function moveInMenu(event, buttons) {
  const at = buttons.indexOf(document.activeElement);
  const to = {ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1}[event.key];
  if (to === undefined) return;
  event.preventDefault();
  buttons.at(to % buttons.length).focus();
}

const THEMES = ["", "light", "dark"];

const mainMenu = () => [
  [TEXT.export, "export", () => openMenu($("menu"), exportMenu())],
  [TEXT.import, "import", () => $("import-file").click()],
  ...(state.chats.size ? [[TEXT.deleteAll, "delete", deleteAll]] : []),
  [TEXT.prompts, "prompt", openPrompts],
  [TEXT.server, "server", () => openServer()],
  ...(state.model.ours ? [[TEXT.serverStatus, "chart", openStatus]] : []),
  [TEXT.theme, "theme", nextTheme, TEXT.themes[state.preferences.theme]],
  [TEXT.shortcuts, "keys", () => $("keys-dialog").showModal()],
];

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(state.preferences.theme) + 1) % THEMES.length];
  changePreferences({theme});
  document.documentElement.dataset.theme = theme;
  redrawCharts();
  announce(TEXT.themeIs(TEXT.themes[theme]));
}

async function deleteAll() {
  const count = state.chats.size, body = [element("p", {textContent: TEXT.deleteAllHint})];
  if (await confirmed(TEXT.deleteAllTitle(count), body, TEXT.keepThem, TEXT.deleteAll)) {
    await deleteChats([...state.chats.values()], TEXT.deletedChats(count));
  }
}

let answered = Promise.resolve();  // the last question

// Asks in a dialog, after what it asks already. Resolves to whether the reader agrees.
const confirmed = (...question) => answered = answered.then(() => askInDialog(...question));

function askInDialog(title, body, no, yes) {
  const dialog = $("ask-dialog");
  $("ask-body").replaceChildren(...body);
  for (const [name, text] of [["title", title], ["no", no], ["yes", yes]]) $(`ask-${name}`).textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise(resolve => { dialog.onclose = () => resolve(dialog.returnValue === "yes"); });
}

// import and export ---------------------------------------------------------------------------------------------------

const exportMenu = () => [
  [TEXT.thisChat, "export", () => exportChats([state.chat])],
  [TEXT.allChats, "export", () => exportChats([...state.chats.values()])],
  [TEXT.asMarkdown, "export", () => download(markdownOf(state.chat, state.path), `${fileName(state.chat)}.md`, "text/markdown")],
  [TEXT.asPage, "export", () => download(pageOf(state.chat, state.path), `${fileName(state.chat)}.html`, "text/html")],
];

// Shows what a file would bring. Of a chat that is here already, the older one gives way unless the reader keeps both.
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
  return confirmed(TEXT.importTitle(name), [element("p", {textContent: TEXT.brings(chats.length, countMessages(chats))}),
    element("ul", {className: "imports"}, ...rows)], TEXT.leaveIt, TEXT.import);
}

async function exportChats(chats) {
  const nodes = new Map();
  for (const chat of chats) nodes.set(chat.id, chat.id === state.chat.id ? [...state.nodes.values()] : await store.read("nodes", chat.id));
  const file = exportOf(chats, chat => nodes.get(chat.id), chats.length === state.chats.size ? ownPrompts() : []);
  const name = chats.length === 1 ? fileName(chats[0]) : `chats-${file.exported.slice(0, 10)}`;
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
  for (const {role, content, model} of path) parts.push(`## ${role === "user" ? TEXT.you : model || TEXT.assistant}`, content);
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
table{border-collapse:collapse}:is(td,th){border:1px solid #8888;padding:.3rem .7rem;text-align:left}li p{margin:.2rem 0}
blockquote{margin-inline:0;padding-left:1em;border-left:3px solid var(--line);color:var(--soft)}
.question{white-space:pre-wrap}:is(.table,math){overflow:auto hidden}
@media print{pre{white-space:pre-wrap;overflow-wrap:anywhere}}`;

// A self-contained page without scripts.
function pageOf({title}, path) {
  const body = element("body", {}, element("h1", {textContent: title || TEXT.chat}));
  for (const {role, content, model} of path) {
    const said = element("div", {className: role === "user" ? "said question" : "said"});
    if (role === "user") said.append(...questionNodes(content));
    else new MarkdownView(said).update(content, true);
    said.querySelectorAll("button").forEach(button => button.remove());
    body.append(element("h2", {className: "speaker", textContent: role === "user" ? TEXT.you : model || TEXT.assistant}), said);
  }
  const colours = getComputedStyle(document.documentElement);
  const root = PAGE_COLOURS.map(name => `--${name}:${colours.getPropertyValue(`--${name}`)}`);
  return `<!doctype html>\n<html lang="${document.documentElement.lang}"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">${element("title", {textContent: title || TEXT.chat}).outerHTML}
<style>:root{color-scheme:light dark;${root.join(";")}}\n${PAGE_STYLE}${DRAWN_STYLE}</style></head>\n${body.outerHTML}</html>\n`;
}

// composer ------------------------------------------------------------------------------------------------------------

const LONG_PASTE = 4000;          // characters from which a paste becomes a file
const MOST_FILE = 1 << 20;        // bytes
const TOKEN_CHARACTERS = 4;       // about as many, where nobody has counted

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

const draftContent = () => composeMessage(state.draft.text, state.draft.files).content;

function setDraft(text, files = state.draft.files, store = true) {
  const newFiles = files !== state.draft.files;
  state.draft = {text, files};
  if ($("message").value !== text) $("message").value = text;
  fitHeight($("message"));
  if (newFiles) $("files").replaceChildren(...files.map(fileChip));
  if (store) saveDraft();
  renderComposer(isGrowing(lastNode()));
  offerCommands();
  countDraft();
}

function fileChip(file) {
  const remove = iconButton(TEXT.removeFile(file.name), "close", () => {
    setDraft(state.draft.text, state.draft.files.filter(each => each !== file));
    $("message").focus();
  });
  const size = TEXT.characters(file.text.length) + (TEXT.encodings[file.encoding] ?? "");
  return element("li", {className: "icon i-file"}, element("span", {textContent: file.name}), element("small", {textContent: size}), remove);
}

const counting = newest();

// Asks how many tokens the draft has, a moment after the last key.
async function countDraft() {
  const isMine = counting(), text = draftContent(), long = text.length > 400000;
  if (text) await wait(300);
  if (!isMine()) return;
  const [tokens, around] = !text || state.model.api !== "v1" ? [0, 0] :
    await Promise.all([long ? Math.round(text.length / TOKEN_CHARACTERS) : countTokens(text), tokensAround(state.chat.system)]);
  if (!isMine()) return;
  state.counted = {text, tokens: tokens ?? 0, around};
  renderGauge();
}

// Attaches a text file to the message; other files are refused with the reason.
async function addFiles(list) {
  const files = [], {chat} = state;
  state.refusal = "";
  for (const file of list) {
    try {
      if (file.size > MOST_FILE) throw new Error(TEXT.fileTooLarge(file.name, MOST_FILE));
      const read = textOf(new Uint8Array(await file.arrayBuffer()));
      if (!read) throw new Error(TEXT.notText(file.name));
      files.push({name: file.name, ...read});
    } catch (error) {
      state.refusal = error.message;
    }
  }
  if (draftKey(chat) !== draftKey()) return addToDraft(draftKey(chat), files);    // another chat is shown by now
  setDraft(state.draft.text, [...state.draft.files, ...files]);
  return $("message").focus();
}

function onPaste(event) {
  const {files} = event.clipboardData, text = event.clipboardData.getData("text/plain");
  if (files.length && !text) addFiles(files);
  else if (text.length >= LONG_PASTE) setDraft(state.draft.text, [...state.draft.files, {name: TEXT.pasted(state.draft.files.length), text}]);
  else return;
  event.preventDefault();
}

// The commands that begin like the draft, above it.
const offered = {names: [], at: 0, closed: ""};       // `closed`: the text for which Escape has closed the list

function offerCommands() {
  const {text, files} = state.draft, begun = /^\/(\w*)$/.exec(text)?.[1];
  const names = begun === undefined || files.length || text === offered.closed ? [] : Object.keys(COMMANDS).filter(name => name.startsWith(begun));
  if (names.join() !== offered.names.join()) Object.assign(offered, {names, at: 0});
  if (text !== offered.closed) offered.closed = "";
  const list = $("commands"), message = $("message");
  list.hidden = !names.length;
  list.replaceChildren(...names.map((name, i) => {
    const option = element("div", {id: `command-${name}`, onclick: () => completeCommand(name)}, element("span", {textContent: `/${name}`}),
      element("small", {textContent: [valueOf(name), TEXT.commands[name] ?? ""].filter(Boolean).join(" · ")}));
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", i === offered.at);
    return option;
  }));
  if (names.length) message.setAttribute("aria-activedescendant", `command-${names[offered.at]}`);
  else message.removeAttribute("aria-activedescendant");
  list.children[offered.at]?.scrollIntoView({block: "nearest"});
}

function completeCommand(name) {
  setDraft(valueOf(name) ? `/${name} ` : `/${name}`);
  $("message").focus();
}

// Keys while commands are offered. Enter sends a command that is complete.
function onCommandKey(event) {
  const {names, at} = offered, name = names[at], step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (!name || composing(event) || event.shiftKey) return;
  if (step) offered.at = (at + step + names.length) % names.length;
  else if (event.key === "Escape") offered.closed = state.draft.text;
  else if (event.key === "Tab" || event.key === "Enter" && state.draft.text !== `/${name}`) completeCommand(name);
  else return;
  event.preventDefault();
  event.stopImmediatePropagation();
  offerCommands();
}

let recalled = 0;                 // how far ArrowUp has gone back

// ArrowUp in an empty composer brings back earlier questions of this chat, ArrowDown later ones.
function recall(event) {
  const said = state.path.filter(node => node.role === "user").map(node => partsOf(node).text).reverse();
  const shown = recalled && state.draft.text === said[recalled - 1];
  if (!shown && state.draft.text) return;
  if (!shown) recalled = 0;
  const to = recalled + (event.key === "ArrowUp" ? 1 : -1);
  if (to < 0 || to > said.length) return;
  event.preventDefault();
  recalled = to;
  setDraft(said[to - 1] ?? "");
}

function submitDraft() {
  const {text, files} = state.draft, trimmed = text.trim();
  state.refusal = "";
  const command = trimmed.startsWith("/") && !trimmed.startsWith("//") && !files.length;
  if (!trimmed && !files.length) return;
  const said = state.model.api === "text" ? text : trimmed;
  if (command ? runCommand(trimmed) : ask(said.replace(/^\/\//, "/"), files)) {
    if (state.draft.text === text) setDraft("", []);
    return;
  }
  if (!command) announce(isGrowing(lastNode()) ? TEXT.stopFirst : TEXT.notReady);
  renderComposer(isGrowing(lastNode()));
}

// Back to typing, except on a touch screen, where the keyboard would cover the answer.
function focusAfterClick() { $(touch.matches ? "log" : "message").focus({preventScroll: true}); }

// settings ------------------------------------------------------------------------------------------------------------

const settingsFields = () => [...$("settings-dialog").querySelectorAll("[data-parameter]")];

const templateAsked = newest();

function openSettings() {
  const isMine = templateAsked();
  showSettings();
  $("template").textContent = "";
  $("more-parameters").open = PARAMETERS.some(({name, folded}) => folded && state.chat.parameters[name] !== undefined);
  $("settings-dialog").showModal();
  templateText([{role: "user", content: "…"}]).then(text => {
    if (!isMine()) return;
    $("template").parentElement.hidden = text === null;
    $("template").textContent = text ?? "";
  });
}

function showSettings() {
  const {chat: {system, parameters}, model: {defaults}, preferences} = state;
  $("system").value = system;
  $("stop-strings").value = (parameters.stop ?? []).join("\n");
  for (const field of settingsFields()) {
    const name = field.dataset.parameter, usual = defaults[name];
    field.value = parameters[name] ?? "";
    if (name === "reasoning_effort") field.parentElement.hidden = state.model.can.reasoning === false && !field.value;
    field.placeholder = name === "seed" ? TEXT.random : usual !== undefined && usual !== null ? String(usual)
      : name === "max_tokens" && state.model.api === "v1" ? TEXT.restOfContext : TEXT.default;
  }
  showTools();
  for (const name of SWITCHES) $(name).checked = preferences[name];
  const own = Object.keys(preferences.presets);
  $("preset").replaceChildren(element("option", {value: "", textContent: TEXT.choosePreset}),
    ...Object.keys(TEXT.presets).map(name => element("option", {value: `=${name}`, textContent: TEXT.presets[name]})),
    ...own.map(name => element("option", {value: name, textContent: name})));
  $("delete-preset").hidden = true;
}

function takeSettings() {
  const parameters = {};
  for (const parameter of PARAMETERS.filter(({apart}) => !apart)) {
    const field = settingsFields().find(each => each.dataset.parameter === parameter.name);
    const value = parameterValue(parameter, field.value);
    if (value !== undefined) parameters[parameter.name] = value;
  }
  const stop = $("stop-strings").value.split("\n").filter(Boolean).slice(0, 4);
  if (stop.length) parameters.stop = stop;
  Object.assign(parameters, takeTools());
  changeChat(state.chat, {system: $("system").value, parameters});
}

const PRESETS = {precise: {temperature: 0.2, top_p: 0.9}, creative: {temperature: 1.1, min_p: 0.05}, repeatable: {temperature: 0}};

function choosePreset(name) {
  const {presets} = state.preferences;
  const preset = name.startsWith("=") ? {parameters: PRESETS[name.slice(1)], system: state.chat.system} : presets[name];
  if (!preset) return;
  changeChat(state.chat, {parameters: checkedParameters(preset.parameters ?? {}), system: preset.system ?? ""});
  showSettings();
  $("preset").value = name;
  $("delete-preset").hidden = name.startsWith("=");
}

function savePreset() {
  const name = $("preset-name").value.trim().replace(/^=+/, "");
  if (!name) return $("preset-name").focus();
  const {system, parameters} = state.chat;
  changePreferences({presets: {...state.preferences.presets, [name]: {system, parameters}}});
  $("preset-name").value = "";
  showSettings();
  $("preset").value = name;
  announce(TEXT.presetSaved(name));
}

function deletePreset() {
  const {[$("preset").value]: gone, ...presets} = state.preferences.presets;
  changePreferences({presets});
  showSettings();
}

const SWITCHES = ["clicks", "titles", "notify"];      // preferences that are on or off

async function changeSwitch(box) {
  if (box.id === "notify" && box.checked && await Notification.requestPermission() !== "granted") {
    box.checked = false;
    setText($("notify-refused"), TEXT.notifyRefused);
  }
  changePreferences({[box.id]: box.checked});
}

function bindSettings() {
  const dialog = $("settings-dialog");
  const inGrid = PARAMETERS.filter(({apart}) => !apart), labels = inGrid.map(({name, min, max, step, choices}) => {
    const field = choices ? element("select", {}, ...["", ...choices].map(value => element("option", {value, textContent: value || TEXT.default})))
      : element("input", {type: "number", min, max, step, inputMode: step === 1 ? "numeric" : "decimal"});
    field.dataset.parameter = name;
    return element("label", {}, element("span", {textContent: TEXT.parameters[name]}), field);
  });
  const fold = folded => labels.filter((label, i) => Boolean(inGrid[i].folded) === folded);
  $("parameters").append(...fold(false));
  $("more-parameters").lastElementChild.append(...fold(true));
  dialog.addEventListener("input", ({target}) => {
    if (SWITCHES.includes(target.id)) changeSwitch(target);
    else if (!["preset", "preset-name"].includes(target.id)) takeSettings();
  });
  dialog.addEventListener("close", render);
  $("notify").parentElement.hidden = typeof Notification === "undefined" || !isSecureContext;
  $("preset").onchange = ({target}) => choosePreset(target.value);
  $("add-calculator").onclick = addCalculator;
  $("save-preset").onclick = savePreset;
  $("delete-preset").onclick = deletePreset;
  $("preset-name").onkeydown = event => { if (event.key === "Enter") { event.preventDefault(); savePreset(); } };
  $("settings-reset").onclick = () => { changeChat(state.chat, {system: "", parameters: {}}); showSettings(); };
  $("for-new-chats").onclick = () => {
    const {system, parameters} = state.chat;
    changePreferences({defaults: {system, parameters}});
    announce(TEXT.usedForNew);
    copied($("for-new-chats"));
  };
}

// servers -------------------------------------------------------------------------------------------------------------

function openServer() {
  if ($("server-dialog").open) return;
  $("server-url").value = state.preferences.server;
  $("server-url").placeholder = PAGE_HOME;
  $("server-key").value = serverKey();
  $("server-dialog").showModal();
  showProblems("", state.phase === "locked" ? keyText() : "");
}

// What is wrong with the address and with the key, each below its field.
function showProblems(address, key) {
  for (const [name, text] of [["url", address], ["key", key]]) {
    setText($(`${name}-problem`), text);
    $(`server-${name}`).setAttribute("aria-invalid", Boolean(text));
  }
  if (key) $("server-key").focus();
}

const keyText = () => state.refusedKey ? TEXT.wrongKey : TEXT.keyWanted;

// Opens the Server dialog for a key, once for each refused key: the reader may close it unchanged.
function wantKey(key) {
  const news = state.refusedKey !== key;
  Object.assign(state, {phase: "locked", refusedKey: key});
  render();
  if (news) openServer();
}

// The fields of the dialog. A key typed for another server does not count for this one.
function takeServer(event) {
  const typed = $("server-url").value.trim(), home = typed ? serverAddress(typed) : "";
  if (home === null) {
    event.preventDefault();
    return showProblems(TEXT.noAddress(typed), "");
  }
  const key = $("server-key").value, origin = originOf(home || PAGE_HOME), {[origin]: old, ...keys} = state.preferences.keys;
  changePreferences({keys: key ? {...keys, [origin]: key} : keys});
  useServer(home);
  return undefined;
}

function useServer(home) {
  const {servers} = state.preferences, server = home === PAGE_HOME ? "" : home;
  changePreferences({server, servers: server && !servers.includes(server) ? [...servers, server] : servers});
  Object.assign(state, {phase: "connecting", reached: "", models: [], model: {...NO_MODEL}});
  render();
  watchServer();
}

// ?server= names a server for this page to use. An unknown one is sent nothing until the reader agrees.
function wantedServer() {
  const given = new URLSearchParams(location.search).get("server");
  const home = given ? serverAddress(given) : null;
  if (!home || home === serverHome()) return false;
  if (home === PAGE_HOME || state.preferences.servers.includes(home)) { changePreferences({server: home === PAGE_HOME ? "" : home}); return false; }
  confirmed(TEXT.askTitle, [element("p", {textContent: TEXT.askServer(home)})], TEXT.dontUseIt, TEXT.useIt)
    .then(yes => yes ? useServer(home) : watchServer());
  return true;
}

// keys ----------------------------------------------------------------------------------------------------------------

const typing = target => target.closest?.("input, textarea, select, [contenteditable]");

function onKey(event) {
  const control = event.ctrlKey || event.metaKey, dialog = document.querySelector("dialog[open], [popover]:popover-open");
  if (composing(event)) return;
  if (event.key === "Escape" && !dialog) return onEscape();
  if (dialog) return;
  if (control && !event.shiftKey && event.key.toLowerCase() === "k") { showSidebar(true); $("search").focus(); $("search").select(); }
  else if (control && event.shiftKey && event.key.toLowerCase() === "o") startNewChat();
  else if (event.key === "?" && !typing(event.target)) $("keys-dialog").showModal();
  else return;
  event.preventDefault();
}

function onEscape() {
  if (narrow.matches && withChats()) { showSidebar(false); $("chats-toggle").focus(); }
  else if (glanced) $("leave-status").click();
  else stopAnswer();
}

function startNewChat() {
  newChat();
  announce(TEXT.newChat);
  showSidebar(!narrow.matches && withChats());
  focusAfterClick();
}

// start ---------------------------------------------------------------------------------------------------------------

// All words of the page are in strings.js: data-text names a node's text, data-label its accessible name, data-hint its placeholder.
function fillStrings() {
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = TEXT[node.dataset.text];
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", TEXT[node.dataset.label]);
  for (const node of document.querySelectorAll("button[data-label]")) node.title = TEXT[node.dataset.label];
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = TEXT[node.dataset.hint];
  $("keys").append(...TEXT.keys.map(([keys, what]) => element("div", {}, element("dt", {}, ...keys.split(" ").map(key => element("kbd", {textContent: key}))),
    element("dd", {textContent: what}))));
}

function bindPage() {
  $("new").onclick = startNewChat;
  $("chats-toggle").onclick = toggleSidebar;
  $("shade").onclick = () => showSidebar(false);
  $("search").oninput = ({target}) => search(target.value);
  $("search").onkeydown = event => {
    const first = $("chats").querySelector("a");
    if (event.key === "Enter" && !composing(event)) first?.click();
    else if (event.key === "ArrowDown" && first) { event.preventDefault(); first.focus(); }
    else if (event.key === "Escape" && event.target.value) { event.stopPropagation(); event.target.value = ""; search(""); }
  };
  $("leave-status").onclick = () => openChat(state.chat.id).then(focusAfterClick);
  $("save-prompt").onclick = savePrompt;
  $("add-column").onclick = () => { addColumn(); updateCompare(); };
  $("start-compare").onclick = startCompare;
  $("compare-dialog").onclose = () => { compared?.controller?.abort(); compared = null; };
  $("menu").onclick = () => openMenu($("menu"), mainMenu());
  $("settings").onclick = openSettings;
  $("import-file").onchange = async ({target}) => { if (target.files[0]) await importFile(target.files[0]); target.value = ""; };
  $("server-dialog").querySelector("form").onsubmit = takeServer;
  $("enter-key").onclick = openServer;
  $("server-reset").onclick = () => { $("server-url").value = $("server-key").value = ""; };
  $("latest").onclick = () => { state.following = true; followEnd(); focusAfterClick(); };
  $("log").addEventListener("scroll", onScroll, {passive: true});
  document.addEventListener("keydown", onKey);
  addEventListener("beforeprint", () => views.forEach(complete));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);
  narrow.addEventListener("change", () => showSidebar(!narrow.matches && state.preferences.sidebar));
  new ResizeObserver(followEnd).observe($("log"));
}

function bindComposer() {
  const message = $("message");
  $("composer").onsubmit = event => { event.preventDefault(); submitDraft(); };
  $("stop").onclick = stopAnswer;
  $("attach").onclick = () => $("files-picker").click();
  $("files-picker").onchange = async ({target}) => { await addFiles(target.files); target.value = ""; };
  message.oninput = ({target}) => { recalled = 0; state.refusal = ""; setDraft(target.value); };
  message.onpaste = onPaste;
  message.addEventListener("keydown", onCommandKey);
  $("commands").onmousedown = event => event.preventDefault();           // the focus stays in the message
  message.onkeydown = event => { if (["ArrowUp", "ArrowDown"].includes(event.key) && !composing(event)) recall(event); };
  onEnter(message, submitDraft);
  for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
    document.addEventListener(name, event => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      document.body.classList.toggle("dropping", over);
      if (name === "drop") addFiles(event.dataTransfer.files);
    });
  }
}

function bindStore() {
  Object.assign(store, {onNews: hearNews, onMessage: hearTab, onTrouble: render});
  addEventListener("pagehide", () => {
    for (const run of state.runs.values()) saveGrown(run);
    store.leave();
    if (state.runs.size) store.tell({left: true});
  });
  addEventListener("popstate", () => {
    if (isStatus()) openStatus();
    else if (glanced || location.hash.slice(1) !== state.chat.id) openChat(location.hash.slice(1));
  });
  addEventListener("storage", event => {
    if (event.key !== PREFERENCES) return;
    loadPreferences();
    document.documentElement.dataset.theme = state.preferences.theme;
    render();
  });
  setInterval(adoptOrphans, 5000);
}

function bindServer() {
  $("models").onchange = () => chooseModel($("models").value);
  for (const event of ["pointerdown", "focus"]) $("models").addEventListener(event, lookAtModels);
  setInterval(glance, GLANCE_MS);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) { state.ended = 0; render(); } glance(); });
  for (const event of ["online", "offline", "focus"]) addEventListener(event, glance);
}

let started = false;

// The stored chats come a moment later; the page is usable before.
async function start() {
  const isFirst = opening();
  loadPreferences();
  fillStrings();
  bindPage();
  bindComposer();
  bindSettings();
  bindStore();
  bindServer();
  showSidebar(!narrow.matches && state.preferences.sidebar);
  render();
  if (!touch.matches) focusAfterClick();
  const asking = wantedServer();
  await store.open();
  store.recover();
  for (const chat of await store.read("conversations")) state.chats.set(chat.id, chat);
  await takeOverOldChat();
  if (!asking) watchServer();
  const atStatus = isStatus(), wanted = [location.hash.slice(1), lastPlace()].find(id => state.chats.has(id)) ?? "";
  const typed = $("message").value;                     // while the scripts were loading
  await (isFirst() ? openChat(wanted) : loadDraft(draftKey()));         // the reader may have begun a chat
  if (atStatus) openStatus();
  if (typed && !state.draft.text) setDraft(typed);
  adoptAll();
  started = true;
}

for (const [name, drawIt] of [["highlight", drawCode], ["katex", drawFormulas]]) {
  document.querySelector(`script[src*="${name}"]`).addEventListener("load", drawIt);
}
start();
