// The frame of the page: rendering, menus, questions in a dialog, keys, and the start. The other scripts register their parts (parts.js).
"use strict";

const Page = (() => {

const {TEXT, $, alone, element, button, iconButton, setText, number, composing, narrow, touch} = Parts;

let started = false;              // the page has opened its storage and shows a chat

// rendering -----------------------------------------------------------------------------------------------------------

// Makes the page show what the scripts know; changes only what differs.
function render() {
  const {model, phase} = Server, chat = Chat.current;
  setText($("title"), chat.title || (chat.temporary ? TEXT.temporary : TEXT.newChat));
  document.body.classList.toggle("completing", model.api === "text");
  document.body.classList.toggle("temporary", Boolean(chat.temporary));
  document.title = (Chat.ended ? TEXT.endedMark : "") + titleOfTab(chat, model);
  $("lamp").className = phase;
  $("log").hidden = document.querySelector("body > footer").hidden = Boolean(openView());
  const turns = Turns.render();
  if (!hasEnd() && ($("log").childElementCount !== 1 || !$("log").contains(empty.node))) $("log").scrollTop = 0;
  syncChildren($("log"), [...(turns.length ? [...betterAbove(turns), ...turns] : [emptyPage()]), ...(Chat.notice ? [noticeOf(Chat.notice)] : [])]);
  renderToasts();
  for (const part of Parts.all) alone(() => part.render?.());
  followEnd();
}

const titleOfTab = (chat, model) => chat.title ? `${chat.title} - ${model.name || TEXT.chat}`
  : model.name ? `${model.name} - ${TEXT.chat}` : TEXT.chat;

function syncChildren(parent, nodes) {
  nodes.forEach((node, i) => { if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] ?? null); });
  while (parent.children.length > nodes.length) parent.lastElementChild.remove();
}

const noticeOf = text => element("p", {className: "notice", textContent: text});

// An empty conversation: the model or its loading progress, and prompts to start with.
const empty = {key: "", node: null};

function emptyPage() {
  const {model, phase, loading} = Server;
  const key = JSON.stringify([model.name, model.api, offersBetter() && [model.better, model.betterSpeed], model.base, model.devices, model.context, phase, Server.trouble(), Chat.canAsk(), Chat.current.temporary, Prompts.own()]);
  if (empty.key === key) return empty.node;
  const page = element("section", {className: "empty"}, element("h2", {textContent: model.api === "text" ? TEXT.welcomeText : TEXT.welcome(new Date().getHours())}));
  page.append(element("p", {textContent: Server.trouble() || TEXT.running(model.devices.map(TEXT.device), model.context)}));
  if (Chat.current.temporary) page.append(noticeOf(model.ours ? TEXT.temporaryHint : TEXT.temporaryElsewhere));
  if (model.base) page.append(baseNotice(model.api !== "text"));
  else if (model.api === "text") page.append(noticeOf(TEXT.completes));
  if (model.api === "none" && model.can.embedding && model.ours) Parts.need("vectors").then(() => { if (typeof Vectors !== "undefined") Vectors.show(page, model); });
  if (offersBetter()) page.append(betterModel(model));
  if (phase === "loading" && !loading.waits) {
    const bar = element("progress", loading.fraction ? {max: 1, value: loading.fraction} : {});
    bar.setAttribute("aria-label", TEXT.loadingLabel);
    page.append(bar);
  }
  const starters = Prompts.own().filter(({starter}) => starter), examples = ["text", "none"].includes(model.api) || starters.length ? [] : TEXT.examples;
  page.append(element("div", {className: "examples"}, ...starters.map(prompt =>
    element("button", {type: "button", textContent: prompt.name, title: prompt.text, onclick: () => Prompts.use(prompt)})), ...examples.map(text =>
    element("button", {type: "button", textContent: text, disabled: !Chat.canAsk(), onclick: () => { Chat.ask(text); Composer.focusAfterClick(); }}))));
  Object.assign(empty, {key, node: page});
  return page;
}

// What stands below a base checkpoint: that it is for texts, and the way to chat with it, or back.
function baseNotice(inTurns) {
  return element("div", {className: "notice better"}, element("span", {textContent: inTurns ? TEXT.baseChats : TEXT.baseWrites}),
    element("button", {type: "button", className: `icon plain i-${inTurns ? "edit" : "prompt"}`, textContent: inTurns ? TEXT.inTexts : TEXT.inTurns, onclick: () => { Settings.talkInTurns(!inTurns); Composer.focusAfterClick(); }}));
}

// A model that only demonstrates has a way to one that fits this machine, until the reader has used or closed it.
const offersBetter = () => Server.model.better !== undefined && !Settings.preferences.betterSeen;

function betterModel({better, betterSpeed}) {
  const name = better.split("/").at(-1).replace(/(-GGUF)?:.*/i, ""), done = act => () => { Settings.change({betterSeen: true}); act(); render(); };
  return element("div", {className: "notice better"}, element("span", {textContent: TEXT.demonstration}),
    element("button", {type: "button", className: "icon plain i-get", textContent: name ? TEXT.getBetter(name, betterSpeed) : TEXT.getAnother,
      onclick: done(() => Views.openGet())}),
    iconButton(TEXT.dismiss, "close", done(() => Composer.focusAfterClick())));
}

// Above the first answer it stands, too.
const above = {key: "", node: null};

function betterAbove(turns) {
  const {model} = Server, key = `${model.better} ${model.betterSpeed}`;
  if (!offersBetter() || turns.length > 2) return [];
  if (above.key !== key) Object.assign(above, {key, node: betterModel(model)});
  return [above.node];
}

function renderToasts() {
  const {toasts} = Chat, shown = $("toasts");
  if (shown.toasts === toasts) return;
  shown.toasts = toasts;
  shown.replaceChildren(...toasts.map(toast => {
    const close = act => { Chat.dropToast(toast); act(); render(); };
    return element("div", {className: "toast"}, element("span", {textContent: toast.text}),
      element("button", {type: "button", className: "plain", textContent: toast.label, onclick: () => close(toast.act)}),
      iconButton(TEXT.dismiss, "close", () => close(() => {})));
  }));
}

function announce(text) { $("announcer").textContent = text; }

// The log follows the answer until the reader scrolls up, and again once they are back at the end.
let following = true;
let lastTop = 0;

const follow = () => { following = true; };
const stopFollowing = () => { following = false; };

// The empty page stays at its top.
const hasEnd = () => Chat.path.length > 0 || Chat.notice !== "";
const atEnd = slack => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight <= slack;

function followEnd() {
  const log = $("log");
  if (following && hasEnd()) log.scrollTop = log.scrollHeight;
  $("latest").hidden = following || !hasEnd() || atEnd(40);
}

function onScroll() {
  const top = $("log").scrollTop;
  if (atEnd(2)) following = true;
  else if (top < lastTop - 1) following = false;
  lastTop = top;
  document.body.classList.toggle("scrolled", top > 2);
  $("latest").hidden = following || !hasEnd() || atEnd(40);
}

// The view shown instead of the chat, or undefined.
const openView = () => Parts.all.find(({view}) => view?.isOpen?.())?.view;
const viewAt = hash => Parts.all.find(({view}) => view?.hash && (hash === view.hash || hash.startsWith(`${view.hash}/`)))?.view;
const closeViews = () => Parts.all.forEach(({view}) => view?.close?.());

// menus ---------------------------------------------------------------------------------------------------------------

// Opens a menu of [label, icon, act, value, apart] below a button; a line is above what stands apart. Arrow keys move in it; Escape or a click
// elsewhere closes it.
function openMenu(anchor, items) {
  const buttons = items.map(([label, icon, act, value, apart = false]) => {
    const made = button(label, icon, () => { menu.hidePopover(); act(anchor); });
    if (value) made.append(element("small", {textContent: value, ariaHidden: "true"}));
    made.classList.toggle("apart", apart);
    return made;
  });
  const menu = element("div", {className: "menu", popover: "auto"}, ...buttons);
  menu.setAttribute("role", "group");
  menu.setAttribute("aria-label", anchor.getAttribute("aria-label") ?? anchor.textContent);
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

let answered = Promise.resolve();  // the last question

// Asks in a dialog, once earlier questions are answered; without `no` it only tells. Resolves to whether the reader agrees.
const confirmed = (...question) => answered = answered.then(() => askInDialog(...question));

function askInDialog(title, body, no, yes, deletes = false) {
  const dialog = $("ask-dialog");
  dialog.classList.toggle("deletes", deletes);
  $("ask-body").replaceChildren(...body);
  for (const [name, text] of [["title", title], ["no", no], ["yes", yes]]) $(`ask-${name}`).textContent = text;
  $("ask-no").hidden = !no;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise(resolve => { dialog.onclose = () => resolve(dialog.returnValue === "yes"); });
}

// Closes the dialog as if the reader had not agreed.
const closeQuestion = () => $("ask-dialog").close();

// Enter in a field does what the field is for. `data-enter`, of the field or of what is around it, names the button of that; else the form is submitted,
// as browsers do by themselves.
function enterIn(event) {
  const {target, key} = event, around = target.closest?.("[data-enter]");
  if (key !== "Enter" || !around || target.tagName !== "INPUT" || ["checkbox", "file"].includes(target.type) || composing(event)) return;
  event.preventDefault();
  if (around.dataset.enter) $(around.dataset.enter).click();
}

// menu and theme ------------------------------------------------------------------------------------------------------

const mainMenu = () => [...Parts.all.flatMap(({menu}) => menu?.() ?? []), ...Parts.all.flatMap(({menuEnd}) => menuEnd?.() ?? [])];

const THEMES = ["", "light", "dark"];

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(Settings.preferences.theme) + 1) % THEMES.length];
  Settings.change({theme});
  document.documentElement.dataset.theme = theme;
  recolour();
  announce(TEXT.themeIs(TEXT.themes[theme]));
}

const recolour = () => Parts.all.forEach(({recoloured}) => recoloured?.());

// keys ----------------------------------------------------------------------------------------------------------------

const typing = target => target.closest?.("input, textarea, select, [contenteditable]");

function onKey(event) {
  const control = event.ctrlKey || event.metaKey, dialog = document.querySelector("dialog:modal, [popover=auto]:popover-open");
  if (composing(event)) return;
  if (event.key === "Escape" && !dialog) return onEscape();
  if (dialog) return;
  if (control && !event.shiftKey && event.key.toLowerCase() === "k") Chats.startSearch();
  else if (control && event.shiftKey && event.key.toLowerCase() === "o") Chats.startNew();
  else if (event.key === "?" && !typing(event.target)) $("keys-dialog").showModal();
  else return;
  event.preventDefault();
}

function onEscape() {
  if (narrow.matches && Chats.withChats()) Chats.closeDrawer();
  else if (openView()) Chat.open(Chat.current.id).then(Composer.focusAfterClick);
  else Chat.stopAnswer();
}

// start ---------------------------------------------------------------------------------------------------------------

function listKeys() {
  $("keys").append(...TEXT.keys.map(([keys, what]) => element("div", {}, element("dt", {}, ...keys.split(" ").map(key => element("kbd", {textContent: key}))),
    element("dd", {textContent: what}))));
}

// The stored chats load a moment later; the page is usable before that.
async function start() {
  const isFirst = Chat.opening();
  Settings.load();
  Parts.bindAll();
  listKeys();
  render();
  if (!touch.matches) Composer.focusAfterClick();
  const asking = Settings.wantedServer();
  await Store.open();
  Store.recover();
  await Promise.all([Chat.readStored(), Projects.readStored(), Prompts.readStored()]);
  await Chats.takeOverOldChat();
  if (!asking) Server.watch();
  const {hash} = location, view = viewAt(hash), last = [hash.slice(1), Chat.lastPlace()].find(id => Chat.chats.has(id)) ?? "", isStuck = last && last === Chat.stuckAt();
  const wanted = isStuck ? "" : last;
  const {typed} = Composer;                             // while the scripts were loading
  await (isFirst() ? Chat.open(wanted) : Composer.loadDraft(Composer.draftKey()));         // the reader may have begun a chat
  view?.open(hash);
  if (isStuck) Chat.say(TEXT.notOpened(Chat.chats.get(last).title));
  if (typed && !Composer.draft.text) Composer.setDraft(typed);
  Chat.adoptAll();
  started = true;
}

Parts.register({
  strings: {
    welcome: hour => `${hour < 5 || hour >= 18 ? "Good evening." : hour < 12 ? "Good morning." : "Good afternoon."} What would you like to know?`, welcomeText: "How should the text begin?",
    device: name => name === "cpu" ? "the CPU" : name === "cuda" || name === "mps" ? "the GPU" : name.replace(/^cuda:/, "GPU "),
    running: (devices, context) => `Running${devices.length ? ` on ${devices.join(", ")}` : ""}${context ? ` with ${number(context)} tokens of context` : ""}.`,
    completes: "This is not a chat model: it continues the text that you type, in place.",
    baseWrites: "This is a base checkpoint, which was not taught to chat: it continues the text that you type, in place.",
    baseChats: "This is a base checkpoint, which was not taught to chat: it will ramble.",
    onlyEmbeds: name => `${name} is an embedding model; it cannot chat.`, onlyRanks: name => `${name} ranks documents; it cannot chat.`,
    statuses: {draining: "the server is stopping", unavailable: "the server has no running worker"}, loadingLabel: "Loading", starting: "starting",
    loading: (stage, fraction) => `The model is not ready: ${TEXT.statuses[stage] ?? stage}${fraction ? ` ${Math.round(fraction * 100)}\u00a0%` : ""}.`,
    demonstration: "This is a very small demonstration model, which is often wrong.", getBetter: (name, speed) => `Get a better one: ${name}${speed ? `, about ${number(Math.round(speed))} tokens a second here` : ""}`, getAnother: "Get another model",
    examples: ["What is the capital of Japan?", "What is photosynthesis?",
      "Give three tips for a good night's sleep", "Show me a Python function that reverses a string"],
    notOpened: title => `The page ended while it opened “${title}”, so it has not opened this chat again. It is in the list.`,
    themes: {"": "System", light: "Light", dark: "Dark"}, themeIs: theme => `Theme: ${theme}`, shortcuts: "Keyboard shortcuts",
    keysTitle: "Keyboard shortcuts",
    keys: [["Enter", "send"], ["Shift Enter", "new line"], ["Esc", "stop the answer, leave a dialog or the server's status"], ["↑", "in an empty message: your previous questions"],
      ["← →", "in a token lens: previous or next token; ↓ its alternatives"], ["Ctrl K", "search chats"], ["Ctrl Shift O", "new chat"], ["?", "this list"]],
  },
  bind() {
    $("menu").onclick = () => openMenu($("menu"), mainMenu());
    $("latest").onclick = () => { following = true; followEnd(); Composer.focusAfterClick(); };
    $("log").addEventListener("scroll", onScroll, {passive: true});
    document.addEventListener("keydown", onKey);
    document.addEventListener("keydown", enterIn);
    new ResizeObserver(followEnd).observe($("log"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  },
  menu: () => [[TEXT.theme, "theme", nextTheme, TEXT.themes[Settings.preferences.theme]],
    [TEXT.shortcuts, "keys", () => $("keys-dialog").showModal()]],
});

return Object.freeze({
  get started() { return started; }, start,
  render, announce, follow, stopFollowing, followEnd, openView, viewAt, closeViews, openMenu, placeMenu, confirmed, closeQuestion,
});
})();

Page.start();
