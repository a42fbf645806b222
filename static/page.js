// The page around the turns: rendering, menus, composer, keys, and the start. Other scripts register their parts
// (strings.js).
"use strict";

let started = false;

{

const {TEXT, $, element, button, iconButton, setText, number, plural, wait, newest, composing, narrow, touch} = Parts;

// rendering -----------------------------------------------------------------------------------------------------------

// Makes the page show `state`; changes only what differs.
function render() {
  const {chat, model, phase} = Chat.state;
  setText($("title"), chat.title || TEXT.newChat);
  const completing = model.api === "text";
  document.body.classList.toggle("completing", completing);
  $("message").placeholder = completing ? TEXT.textHint : TEXT.messageHint;
  document.title = (Chat.state.ended ? TEXT.endedMark : "") + titleOfTab(chat, model);
  $("lamp").className = phase;
  $("log").hidden = document.querySelector("body > footer").hidden = Boolean(openView());
  const turns = Turns.render();
  if (!hasEnd() && ($("log").childElementCount !== 1 || !$("log").contains(empty.node))) $("log").scrollTop = 0;
  syncChildren($("log"), [...(turns.length ? turns : [emptyPage()]), ...(Chat.state.notice ? [noticeOf(Chat.state.notice)] : [])]);
  renderToasts();
  for (const part of Parts.all) part.render?.();
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
  const {model, phase, loading} = Chat.state;
  const key = JSON.stringify([model.name, model.api, model.better, model.base, model.devices, model.context, phase, Server.trouble(), Chat.canAsk(), Settings.ownPrompts()]);
  if (empty.key === key) return empty.node;
  const page = element("section", {className: "empty"}, element("h2", {textContent: model.api === "text" ? TEXT.welcomeText : TEXT.welcome(new Date().getHours())}));
  page.append(element("p", {textContent: Server.trouble() || TEXT.running(model.devices.map(TEXT.device), model.context)}));
  if (model.base) page.append(baseNotice(model.api !== "text"));
  else if (model.api === "text") page.append(noticeOf(TEXT.completes));
  if (model.api === "none" && model.can.embedding && model.ours) Parts.need("vectors").then(() => { if (typeof Vectors !== "undefined") Vectors.show(page, model); });
  if (model.better !== undefined) page.append(betterModel(model.better));
  if (phase === "loading" && !loading.waits) {
    const bar = element("progress", loading.fraction ? {max: 1, value: loading.fraction} : {});
    bar.setAttribute("aria-label", TEXT.loadingLabel);
    page.append(bar);
  }
  const starters = Settings.ownPrompts().filter(({starter}) => starter), examples = ["text", "none"].includes(model.api) || starters.length ? [] : TEXT.examples;
  page.append(element("div", {className: "examples"}, ...starters.map(prompt =>
    element("button", {type: "button", textContent: prompt.name, title: prompt.text, onclick: () => Settings.usePrompt(prompt)})), ...examples.map(text =>
    element("button", {type: "button", textContent: text, disabled: !Chat.canAsk(), onclick: () => { Chat.ask(text); focusAfterClick(); }}))));
  Object.assign(empty, {key, node: page});
  return page;
}

// What stands below a base checkpoint: that it is for texts, and the way to chat with it, or back.
function baseNotice(inTurns) {
  return element("div", {className: "notice better"}, element("span", {textContent: inTurns ? TEXT.baseChats : TEXT.baseWrites}),
    element("button", {type: "button", className: `icon plain i-${inTurns ? "edit" : "prompt"}`, textContent: inTurns ? TEXT.inTexts : TEXT.inTurns, onclick: () => { Settings.talkInTurns(!inTurns); focusAfterClick(); }}));
}

// What stands below a model that only demonstrates: a way to one that fits this machine.
function betterModel(name) {
  const label = name ? TEXT.getBetter(name.split("/").at(-1).replace(/(-GGUF)?:.*/i, "")) : TEXT.getAnother;
  return element("div", {className: "notice better"}, element("span", {textContent: TEXT.demonstration}),
    element("button", {type: "button", className: "icon plain i-export", textContent: label, onclick: () => Views.openGet()}));
}

function renderToasts() {
  const {toasts} = Chat.state, shown = $("toasts");
  if (shown.toasts === toasts) return;
  shown.toasts = toasts;
  shown.replaceChildren(...toasts.map(toast => {
    const close = act => { Chat.state.toasts = Chat.state.toasts.filter(each => each !== toast); act(); render(); };
    return element("div", {className: "toast"}, element("span", {textContent: toast.text}),
      element("button", {type: "button", className: "plain", textContent: toast.label, onclick: () => close(toast.act)}),
      iconButton(TEXT.dismiss, "close", () => close(() => {})));
  }));
}

function announce(text) { $("announcer").textContent = text; }

// The log follows the answer until the reader scrolls up, and again once they are back at the end.
let lastTop = 0;

// The empty page stays at its top.
const hasEnd = () => Chat.state.path.length > 0 || Chat.state.notice !== "";
const atEnd = slack => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight <= slack;

function followEnd() {
  const log = $("log");
  if (Chat.state.following && hasEnd()) log.scrollTop = log.scrollHeight;
  $("latest").hidden = Chat.state.following || !hasEnd() || atEnd(40);
}

function onScroll() {
  const top = $("log").scrollTop;
  if (atEnd(2)) Chat.state.following = true;
  else if (top < lastTop - 1) Chat.state.following = false;
  lastTop = top;
  document.body.classList.toggle("scrolled", top > 2);
  $("latest").hidden = Chat.state.following || !hasEnd() || atEnd(40);
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

// Asks in a dialog, once earlier questions are answered. Resolves to whether the reader agrees.
const confirmed = (...question) => answered = answered.then(() => askInDialog(...question));

function askInDialog(title, body, no, yes, deletes = false) {
  const dialog = $("ask-dialog");
  dialog.classList.toggle("deletes", deletes);
  $("ask-body").replaceChildren(...body);
  for (const [name, text] of [["title", title], ["no", no], ["yes", yes]]) $(`ask-${name}`).textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise(resolve => { dialog.onclose = () => resolve(dialog.returnValue === "yes"); });
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

// composer -------------------------------------------------------------------------------------------------------------

const LONG_PASTE = 4000;          // characters from which a paste becomes a file
const SEEN = ["image/png", "image/jpeg", "image/webp", "image/gif"];       // what the server reads; the browser turns others into these
const MOST_PIXELS = 4e6, KEPT_BYTES = 3 << 20;                              // larger pictures are sent smaller
const MOST_PROBLEMS = 6;          // of files that could not be read are named
const MOST_FILE = 1 << 20, MOST_DOCUMENT = 32 << 20;        // bytes
const TOKEN_CHARACTERS = 4;       // estimate, where tokens are not counted

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

const draftContent = () => Tree.composeMessage(Chat.state.draft.text, Chat.state.draft.files).content;

function setDraft(text, files = Chat.state.draft.files, store = true) {
  const newFiles = files !== Chat.state.draft.files;
  Chat.state.draft = {text, files};
  if ($("message").value !== text) $("message").value = text;
  fitHeight($("message"));
  if (newFiles) $("files").replaceChildren(...files.map(fileChip));
  if (store) Chat.saveDraft();
  renderComposer(Tree.isGrowing(Chat.lastNode()));
  offerCommands();
  countDraft();
}

function fileChip(file) {
  const remove = iconButton(TEXT.removeFile(file.name), "close", () => {
    setDraft(Chat.state.draft.text, Chat.state.draft.files.filter(each => each !== file));
    $("message").focus();
  });
  if (file.picture) {
    return element("li", {className: "picture"}, element("img", {src: file.picture, alt: ""}), element("span", {textContent: file.name}), remove);
  }
  const size = TEXT.characters(file.text.length) + (file.pages ? TEXT.pages(file.pages) : "") + (TEXT.encodings[file.encoding] ?? "");
  return element("li", {className: "icon i-file"}, element("span", {textContent: file.name}), element("small", {textContent: size}),
    ...file.cut ? [element("small", {className: "cut", textContent: TEXT.isCut(file.cut)})] : [], remove);
}

const counting = newest();

// Counts the draft's tokens, a moment after the last keystroke.
async function countDraft() {
  const isMine = counting(), text = draftContent(), long = text.length > 400000;
  if (text) await wait(300);
  if (!isMine()) return;
  const [tokens, around] = !text || Chat.state.model.api !== "v1" ? [0, 0] :
    await Promise.all([long ? Math.round(text.length / TOKEN_CHARACTERS) : Server.countTokens(text), Server.tokensAround(Chat.state.chat.system)]);
  if (!isMine()) return;
  Chat.state.counted = {text, tokens: tokens ?? 0, around};
  renderGauge();
}

const isPicture = ({type}) => type.startsWith("image/") && type !== "image/svg+xml";

const asData = blob => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});

// A picture file as {picture}: as it is, or drawn anew if it is large or of a format that only the browser knows.
async function readPicture(file) {
  if (!Chat.state.model.can.vision) throw new Error(TEXT.blind(Chat.state.model.name));
  let shown;
  try { shown = await createImageBitmap(file); } catch (error) { throw new Error(TEXT.badPicture(file.name)); }
  const {width, height} = shown, factor = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)));
  if (factor === 1 && file.size <= KEPT_BYTES && SEEN.includes(file.type)) return {picture: await asData(file)};
  const canvas = element("canvas", {width: Math.max(1, Math.round(width * factor)), height: Math.max(1, Math.round(height * factor))});
  const paper = canvas.getContext("2d");
  paper.fillStyle = "white";
  paper.fillRect(0, 0, canvas.width, canvas.height);
  paper.imageSmoothingQuality = "high";
  paper.drawImage(shown, 0, 0, canvas.width, canvas.height);
  shown.close();
  return {picture: canvas.toDataURL("image/jpeg", .92)};
}

// A file's {text}, with its {encoding}, or a document's {pages, cut}, which the server reads.
async function readFile(file) {
  if (isPicture(file)) return readPicture(file);
  const isDocument = Tree.DOCUMENT.test(file.name), most = isDocument ? MOST_DOCUMENT : MOST_FILE;
  if (file.size > most) throw new Error(TEXT.fileTooLarge(file.name, most));
  if (!isDocument || !Chat.state.model.ours) {
    const read = Tree.textOf(new Uint8Array(await file.arrayBuffer()));
    if (!read) throw new Error(TEXT.notText(file.name));
    return read;
  }
  const response = await Server.request(`extract?name=${encodeURIComponent(file.name)}`, {method: "POST", body: file});
  if (!response.ok) throw new Error(TEXT.unread(file.name, (await Server.errorOf(response)).message));
  const {text, pages, cut} = await response.json();
  return {text, pages, cut};
}

// Attaches text files and documents to the message; other files are refused with the reason.
async function addFiles(list) {
  const files = [], problems = [], {chat} = Chat.state;
  const told = more => [...problems.slice(0, MOST_PROBLEMS), ...problems.length > MOST_PROBLEMS ? [TEXT.moreFiles(problems.length - MOST_PROBLEMS)] : [], ...more].join("\n");
  for (const file of list) {
    const reading = setTimeout(() => { Chat.state.refusal = told([TEXT.readingFile(file.name)]); render(); }, 300);
    try {
      files.push({name: file.name, ...await readFile(file)});
    } catch (error) {
      problems.push(error.message);
    }
    clearTimeout(reading);
    Chat.state.refusal = told([]);
  }
  if (Chat.draftKey(chat) !== Chat.draftKey()) return Chat.addToDraft(Chat.draftKey(chat), files);    // another chat is shown now
  setDraft(Chat.state.draft.text, [...Chat.state.draft.files, ...files]);
  return $("message").focus();
}

function onPaste(event) {
  const {files} = event.clipboardData, text = event.clipboardData.getData("text/plain");
  if (files.length && !text) addFiles(files);
  else if (text.length >= LONG_PASTE) setDraft(Chat.state.draft.text, [...Chat.state.draft.files, {name: TEXT.pasted(Chat.state.draft.files.length), text}]);
  else return;
  event.preventDefault();
}

// The commands and prompts that match the draft, listed above it.
const offered = {names: [], at: 0, closed: ""};       // `closed`: the text for which Escape has closed the list

function offerCommands() {
  const {text, files} = Chat.state.draft, begun = /^\/([^\s/]*)$/.exec(text)?.[1].toLowerCase();
  const names = begun === undefined || files.length || text === offered.closed ? [] : commandNames().filter(name => name.startsWith(begun));
  if (names.join() !== offered.names.join()) Object.assign(offered, {names, at: 0});
  if (text !== offered.closed) offered.closed = "";
  const list = $("commands"), message = $("message");
  list.hidden = !names.length;
  list.replaceChildren(...names.map((name, i) => {
    const option = element("div", {id: `command-${name}`, onclick: () => completeCommand(name)}, element("span", {textContent: `/${name}`}),
      element("small", {textContent: [valueOf(name), hintOf(name)].filter(Boolean).join(" · ")}));
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", i === offered.at);
    return option;
  }));
  if (names.length) message.setAttribute("aria-activedescendant", `command-${names[offered.at]}`);
  else message.removeAttribute("aria-activedescendant");
  list.children[offered.at]?.scrollIntoView({block: "nearest"});
}

function completeCommand(name) {
  const prompt = promptCommands().get(name);
  setDraft(prompt ? "" : valueOf(name) ? `/${name} ` : `/${name}`);
  if (prompt) Settings.usePrompt(prompt);
  else $("message").focus();
}

// Keys while commands are offered. Enter sends a command that is complete.
function onCommandKey(event) {
  const {names, at} = offered, name = names[at], step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (!name || composing(event) || event.shiftKey) return;
  if (step) offered.at = (at + step + names.length) % names.length;
  else if (event.key === "Escape") offered.closed = Chat.state.draft.text;
  else if (event.key === "Tab" || event.key === "Enter" && Chat.state.draft.text !== `/${name}`) completeCommand(name);
  else return;
  event.preventDefault();
  event.stopImmediatePropagation();
  offerCommands();
}

let recalled = 0;                 // how far ArrowUp has gone back

// ArrowUp in an empty composer brings back earlier questions of this chat, ArrowDown later ones.
function recall(event) {
  const said = Chat.state.path.filter(node => node.role === "user").map(node => Tree.partsOf(node).text).reverse();
  const shown = recalled && Chat.state.draft.text === said[recalled - 1];
  if (!shown && Chat.state.draft.text) return;
  if (!shown) recalled = 0;
  const to = recalled + (event.key === "ArrowUp" ? 1 : -1);
  if (to < 0 || to > said.length) return;
  event.preventDefault();
  recalled = to;
  setDraft(said[to - 1] ?? "");
}

function submitDraft() {
  const {text, files} = Chat.state.draft, trimmed = text.trim();
  Chat.state.refusal = "";
  const command = trimmed.startsWith("/") && !trimmed.startsWith("//") && !files.length;
  if (!trimmed && !files.length) return;
  const said = Chat.state.model.api === "text" ? text : trimmed;
  if (command ? runCommand(trimmed) : Chat.ask(said.replace(/^\/\//, "/"), files)) {
    if (Chat.state.draft.text === text) setDraft("", []);
    return;
  }
  const growing = Tree.isGrowing(Chat.lastNode());
  if (!command && growing) Chat.state.queued.add(Chat.state.chat.id);
  else if (!command) Chat.state.refusal = TEXT.notReady;
  renderComposer(growing);
}

// Sends the draft that waits for its chat's answer to end.
function sendQueued() {
  const {text, files} = Chat.state.draft;                    // empty while it is still being read
  if (!Chat.state.queued.has(Chat.state.chat.id) || !Chat.canAsk() || !text.trim() && !files.length) return;
  Chat.state.queued.delete(Chat.state.chat.id);
  submitDraft();
}

// Returns to typing, except on a touch screen, where the keyboard would cover the answer.
function focusAfterClick() { $(touch.matches ? "log" : "message").focus({preventScroll: true}); }

// commands ------------------------------------------------------------------------------------------------------------

const COMMANDS = {
  system: value => { Chat.change(Chat.state.chat, {system: value}); Chat.say(value ? TEXT.systemIs(value) : TEXT.systemIsEmpty); },
  clear: () => Chat.openNew(),
  help: () => Chat.say(TEXT.help(commandNames().map(name => [`/${name}`, valueOf(name)].join(" ").trim()))),
  set: value => setNamed(value),
};

// Map: the word after the slash -> a saved prompt. Commands of the same name come first.
function promptCommands() {
  const found = new Map();
  for (const prompt of Settings.ownPrompts()) {
    const word = prompt.name.toLowerCase().match(/[\p{L}\p{M}\p{N}]+/gu)?.join("-") ?? "prompt";
    let free = word;
    for (let count = 2; Object.hasOwn(COMMANDS, free) || parameterOf(free) || found.has(free); count++) free = `${word}-${count}`;
    found.set(free, prompt);
  }
  return found;
}

// The samplers last; those of thinking only where the model thinks.
const commandNames = () => [...Object.keys(COMMANDS), ...promptCommands().keys(),
  ...Parameters.all.map(({command}) => command).filter(name => name !== "effort" && name !== "budget" || Chat.state.model.can.reasoning !== false)];

// The parameter of a command, or of its name in the API, however it is spelled: topp, top_p, Top-P.
function parameterOf(text) {
  const word = text.toLowerCase().replace(/[-_]/g, "");
  return Parameters.all.find(({name, command}) => [command, name.replaceAll("_", "")].includes(word));
}

// A command's argument, in words; "" if it takes none.
const valueOf = name => name === "set" ? TEXT.aParameter : name === "system" ? TEXT.aText : Object.hasOwn(COMMANDS, name) || promptCommands().has(name) ? ""
  : parameterOf(name)?.choices?.join(" | ") ?? (parameterOf(name) ? TEXT.aNumber : "");

// What a command is for.
function hintOf(name) {
  const prompt = promptCommands().get(name);
  return TEXT.commands[name] ?? (prompt ? `${prompt.starter ? TEXT.starter : TEXT.systemPrompt} · ${prompt.text.slice(0, 80)}` : TEXT.parameterHints[parameterOf(name)?.name]);
}

// "/set temperature 0.7", as in the terminal; also "/set parameter temperature 0.7" and "/set system TEXT", as in ollama.
function setNamed(text) {
  const [, name, value] = /^(?:parameter\s+)?(\S*)\s*([^]*)$/.exec(text), parameter = parameterOf(name);
  if (name === "system") return COMMANDS.system(value);
  if (parameter) return setParameter(parameter, value);
  if (name !== "stop") return TEXT.badName(name, [...Parameters.all.map(each => each.name), "stop", "system"]);
  const {stop, ...others} = Chat.state.chat.parameters;
  Chat.change(Chat.state.chat, {parameters: value ? {...others, stop: [value]} : others});
  return Chat.say(TEXT.parameterIs(TEXT.stopString, value ? `“${value}”` : undefined));
}

// Sets a parameter; without a value, back to the server's default. Returns a message if the value is invalid.
function setParameter(parameter, text) {
  const {name, command, min, max, choices} = parameter, value = Tree.parameterValue(parameter, text);
  if (text && value === undefined) return choices ? TEXT.badChoice(command, text, choices) : TEXT.badParameter(command, text, min, max);
  const {[name]: old, ...others} = Chat.state.chat.parameters;
  Chat.change(Chat.state.chat, {parameters: text ? {...others, [name]: value} : others});
  return Chat.say(TEXT.parameterIs(TEXT.parameters[name], value));
}

// Runs "/name value". Returns false, with the reason in state.refusal, if it fails.
function runCommand(text) {
  const [, word, argument] = /^\/(\S*)\s*([^]*)$/.exec(text.trim()), name = word.toLowerCase(), value = argument.trim();
  const prompt = promptCommands().get(name), parameter = parameterOf(name);
  const problem = Object.hasOwn(COMMANDS, name) ? COMMANDS[name](value) : prompt ? Settings.usePrompt(prompt, value) : parameter ? setParameter(parameter, value) : TEXT.noCommand(word);
  if (problem) Chat.state.refusal = problem;
  return !problem;
}

// below the composer --------------------------------------------------------------------------------------------------

function renderComposer(growing) {
  const sent = document.activeElement === $("send") || document.activeElement === $("stop");
  const written = Boolean(Chat.state.draft.text.trim() || Chat.state.draft.files.length);
  $("send").hidden = growing && (!written || Chat.state.queued.has(Chat.state.chat.id));      // it queues: a phone's Enter is a new line
  $("stop").hidden = !growing;
  if (sent) focusAfterClick();
  $("send").disabled = !written || !Chat.canAsk() && !growing;
  const queued = Chat.state.queued.has(Chat.state.chat.id);
  setText($("queued"), queued ? TEXT.queuedQuestion : "");
  $("queued").hidden = !queued;
  if (queued && Chat.canAsk()) queueMicrotask(sendQueued);
  setText($("refusal"), Chat.state.refusal);
  $("refusal").hidden = !Chat.state.refusal;
  setText($("trouble"), Store.trouble ? TEXT.trouble[Store.trouble] : "");
  $("trouble").hidden = !Store.trouble;
}

// The line below the composer, with the gauge of the context.
function renderState() {
  const last = Chat.lastNode(), run = Chat.state.runs.get(last?.id);
  const shownInTurn = Tree.isGrowing(last) && !last.content && !run?.lost;
  $("state").classList.toggle("lost", Boolean(run?.lost));
  setText($("state"), shownInTurn ? "" : Tree.isGrowing(last) ? Turns.growingText(last, run) + (run ? Turns.liveSpeedText(run) : "")
    : Chat.state.path.length ? Server.trouble() : "");             // the empty page shows it itself
  $("enter-key").hidden = Chat.state.phase !== "locked";
  renderGauge();
}

// What question and answer take up of the context, as the server counts; 0 if it cannot.
async function tokensAlone(path) {
  const {used, guessed} = usedTokens(), question = path.findLastIndex(({role}) => role === "user");
  if (used && !guessed && (question === 0 || Chat.state.model.api === "text" || !Chat.state.model.ours)) return used;       // these leave nothing out
  const text = await Server.templateText(Tree.messagesOf(path.slice(Math.max(0, question)), Chat.state.chat.system));
  return text === null ? 0 : await Server.countTokens(text) ?? 0;
}

// {used, guessed}: the path's tokens when the server last counted them, and an estimate of those added since.
function usedTokens() {
  let guessed = 0;
  for (const node of Chat.state.path.toReversed()) {
    const {prompt_tokens: prompt, completion_tokens: count = 0} = Chat.countsOf(Chat.state.runs.get(node.id)) ?? node.timings ?? node.earlier ?? {};
    if (prompt) return {used: prompt + count, guessed};
    guessed += Math.ceil((node.content.length + (node.reasoning?.length ?? 0)) / TOKEN_CHARACTERS);
  }
  return {used: 0, guessed};
}

function renderGauge() {
  const {path, model: {context, ours}, counted, chat: {parameters}} = Chat.state;
  const {used: known, guessed} = usedTokens(), used = known + guessed;
  const current = counted.text && counted.text === draftContent(), draft = current ? counted.tokens : 0;
  const alone = draft && draft + counted.around, tooLong = alone >= context;
  // our server reserves this much for the answer when it drops messages; others may refuse instead
  const kept = ours ? Math.min(parameters.max_tokens ?? Infinity, Math.floor(context / 4)) : 0;
  // what is too long is said once, with one number of tokens: here, or by the server that refused it
  $("gauge").hidden = !context || !used && !draft || tooLong;
  setText($("warning"), !context || tooLong && Chat.state.refusal ? "" : tooLong ? TEXT.tooLong(alone, context, Chat.state.draft.files.length)
    : path.length && used + draft + kept > context && !Tree.isGrowing(Chat.lastNode()) ? (ours ? TEXT.willDrop : TEXT.full) : "");
  if ($("gauge").hidden) return;
  setText($("context"), TEXT.used(used, draft, context, guessed > 0));
  $("gauge").style.setProperty("--used", Math.min(1, used / context));
  $("gauge").style.setProperty("--draft", Math.min(1, draft / context));
}

Parts.register({
  strings: {
    messageHint: "Ask anything", textHint: "Text to continue", attach: "Attach files", latest: "Jump to latest", removeFile: name => `Remove ${name}`,
    characters: count => plural(count, "character", "characters"), pasted: count => `Pasted text${count ? ` ${count + 1}` : ""}.txt`,
    fileTooLarge: (name, bytes) => `${name} is larger than ${bytes < 1 << 21 ? `${number(bytes / 1024)} KB` : `${bytes >> 20} MB`}.`,
    picture: "Picture", blind: name => `${name || "This model"} cannot see images. Choose a model that can.`,
    badPicture: name => `${name} is no image that this browser can read.`,
    notText: name => `${name} is neither a text file nor a document (PDF, DOCX, PPTX, XLSX, EPUB, HTML).`,
    moreFiles: count => `${plural(count, "more file", "more files")} could not be read.`, unread: (name, reason) => `${name}: ${reason}`, readingFile: name => `Reading ${name} ...`, pages: count => `, ${plural(count, "page", "pages")}`, isCut: what => `Incomplete: ${what}.`,
    queuedQuestion: "Your question is queued: it is sent when this answer has ended.", notReady: "The model is not ready yet.",
    encodings: {"windows-1252": ", read as Latin-1", "utf-16le": ", read as UTF-16", "utf-16be": ", read as UTF-16"},
    used: (used, draft, context, about) => `${about ? "about " : ""}${number(used)}${draft ? ` + ${number(draft)}` : ""} of ${number(context)} tokens`,
    tooLong: (tokens, context, files) => `This message has ${number(tokens)} tokens, but the model's limit is ${number(context)} for question and answer together. Shorten it${files ? " or remove a file" : ""}.`,
    willDrop: "The context is full: the oldest messages will be left out.",
    full: "The context is full: this server may refuse the next message.",
    trouble: {missing: "This browser stores nothing for this page: chats last until it is closed. Export them to keep them.",
      full: "This browser's storage is full: new chats last until the page is closed. Export them, or delete chats to free space."},
    help: commands => `${commands.join(" · ")}. Without a value: the server's default. //… sends text that begins with a slash.`,
    aNumber: "N", aText: "TEXT", aParameter: "NAME N", stopString: "The stop string", badName: (name, known) => `/set takes one of ${known.join(", ")}${name ? `, not “${name}”` : ""}.`, commandList: "Commands",
    commands: {system: "instructions for the model", clear: "begin a new chat", help: "list the commands", set: "set a parameter by its name in the API"},
    badChoice: (name, text, choices) => `/${name} takes ${choices.slice(0, -1).join(", ")} or ${choices.at(-1)}, not “${text}”.`,
    noCommand: name => `There is no command /${name}. /help lists them; // sends text that begins with a slash.`,
    badParameter: (name, text, min, max) => `/${name} takes a number from ${min} to ${max}, not “${text}”.`,
    parameterIs: (name, text) => text !== undefined ? `${name} is now ${text}.` : `${name} is the server's default again.`,
    systemIs: text => `The system prompt is now “${text}”.`, systemIsEmpty: "The system prompt is now empty.",
  },
  bind() {
    const message = $("message");
    $("composer").onsubmit = event => { event.preventDefault(); submitDraft(); };
    $("stop").onclick = Chat.stopAnswer;
    $("attach").onclick = () => $("files-picker").click();
    $("files-picker").onchange = async ({target}) => { await addFiles(target.files); target.value = ""; };
    message.oninput = ({target}) => { recalled = 0; Chat.state.refusal = ""; Chat.state.queued.delete(Chat.state.chat.id); setDraft(target.value); };
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
  },
  render() {
    renderComposer(Tree.isGrowing(Chat.lastNode()));
    renderState();
  },
});

// keys ----------------------------------------------------------------------------------------------------------------

const typing = target => target.closest?.("input, textarea, select, [contenteditable]");

function onKey(event) {
  const control = event.ctrlKey || event.metaKey, dialog = document.querySelector("dialog:modal, [popover=auto]:popover-open");
  if (composing(event)) return;
  if (event.key === "Escape" && !dialog) return onEscape();
  if (dialog) return;
  if (control && !event.shiftKey && event.key.toLowerCase() === "k") { Chats.showSidebar(true); $("search").focus(); $("search").select(); }
  else if (control && event.shiftKey && event.key.toLowerCase() === "o") Chats.startNew();
  else if (event.key === "?" && !typing(event.target)) $("keys-dialog").showModal();
  else return;
  event.preventDefault();
}

function onEscape() {
  if (narrow.matches && Chats.withChats()) { Chats.showSidebar(false); $("chats-toggle").focus(); }
  else if (openView()) Chat.open(Chat.state.chat.id).then(focusAfterClick);
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
  if (!touch.matches) focusAfterClick();
  const asking = Settings.wantedServer();
  await Store.open();
  Store.recover();
  for (const chat of await Store.read("conversations")) Chat.state.chats.set(chat.id, chat);
  await Chats.takeOverOldChat();
  if (!asking) Server.watch();
  const {hash} = location, view = viewAt(hash), wanted = [hash.slice(1), Chat.lastPlace()].find(id => Chat.state.chats.has(id)) ?? "";
  const typed = $("message").value;                     // while the scripts were loading
  await (isFirst() ? Chat.open(wanted) : Chat.loadDraft(Chat.draftKey()));         // the reader may have begun a chat
  view?.open(hash);
  if (typed && !Chat.state.draft.text) setDraft(typed);
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
    demonstration: "This is a very small demonstration model, which is often wrong.", getBetter: name => `Get a better one: ${name}`, getAnother: "Get another model",
    examples: ["What is the capital of Japan?", "Explain why the sky is blue to a ten-year-old",
      "Give three tips for a good night's sleep", "Show me a Python function that reverses a string"],
    themes: {"": "System", light: "Light", dark: "Dark"}, themeIs: theme => `Theme: ${theme}`, shortcuts: "Keyboard shortcuts",
    keysTitle: "Keyboard shortcuts",
    keys: [["Enter", "send"], ["Shift Enter", "new line"], ["Esc", "stop the answer, leave a dialog or the server's status"], ["↑", "in an empty message: your previous questions"],
      ["← →", "in a token lens: previous or next token; ↓ its alternatives"], ["Ctrl K", "search chats"], ["Ctrl Shift O", "new chat"], ["?", "this list"]],
  },
  bind() {
    $("menu").onclick = () => openMenu($("menu"), mainMenu());
    $("latest").onclick = () => { Chat.state.following = true; followEnd(); focusAfterClick(); };
    $("log").addEventListener("scroll", onScroll, {passive: true});
    document.addEventListener("keydown", onKey);
    new ResizeObserver(followEnd).observe($("log"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
  },
  menu: () => [[TEXT.theme, "theme", nextTheme, TEXT.themes[Settings.preferences.theme]],
    [TEXT.shortcuts, "keys", () => $("keys-dialog").showModal()]],
});

Parts.share({render, announce, usedTokens, tokensAlone, followEnd, openView, viewAt, closeViews, openMenu, placeMenu, confirmed, onEnter, fitHeight, setDraft,
  focusAfterClick, renderState, start});
}

start();
