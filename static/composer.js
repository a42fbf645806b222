// The composer: the message that is being written, with its files and its draft, the commands that it may be, and the gauge of the context.
"use strict";

const Composer = (() => {

const {TEXT, $, element, iconButton, onEnter, fitHeight, setText, number, plural, wait, newest, composing, touch} = Parts;

const LONG_PASTE = 4000;          // characters from which a paste becomes a file
const SEEN = ["image/png", "image/jpeg", "image/webp", "image/gif"];       // what the server reads; the browser turns others into these
const MOST_PIXELS = 4e6, KEPT_BYTES = 3 << 20;                              // larger pictures are sent smaller
const MOST_PROBLEMS = 6;          // of files that could not be read are named
const MOST_FILE = 1 << 20, MOST_DOCUMENT = 32 << 20;        // bytes
const TOKEN_CHARACTERS = 4;       // estimate, where tokens are not counted

const state = {
  draft: {text: "", files: []},   // what is in the composer
  counted: {text: "", tokens: 0, around: 0},          // tokens of the draft as counted by the server, and of the template around it
  refusal: "",                    // why a message, a command or a file was refused
  queued: new Set(),              // ids of the chats whose drafts are sent once their answers have ended, or the model is ready
};

// the draft -----------------------------------------------------------------------------------------------------------

const draftContent = () => Tree.composeMessage(state.draft.text, state.draft.files).content;

function setDraft(text, files = state.draft.files, store = true) {
  const newFiles = files !== state.draft.files;
  state.draft = {text, files};
  if ($("message").value !== text) $("message").value = text;
  fitHeight($("message"));
  if (newFiles) $("files").replaceChildren(...files.map(fileChip));
  if (store) saveDraft();
  renderComposer(Tree.isGrowing(Chat.lastNode()));
  offerCommands();
  countDraft();
}

function fileChip(file) {
  const remove = iconButton(TEXT.removeFile(file.name), "close", () => {
    setDraft(state.draft.text, state.draft.files.filter(each => each !== file));
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
  const [tokens, around] = !text || Server.model.api !== "v1" ? [0, 0] :
    await Promise.all([long ? Math.round(text.length / TOKEN_CHARACTERS) : Server.countTokens(text), Server.tokensAround(Projects.systemOf(Chat.current))]);
  if (!isMine()) return;
  state.counted = {text, tokens: tokens ?? 0, around};
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
  if (!Server.model.can.vision) throw new Error(TEXT.blind(Server.model.name));
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
  if (!isDocument || !Server.model.ours) {
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
  const files = [], problems = [], chat = Chat.current;
  const told = more => [...problems.slice(0, MOST_PROBLEMS), ...problems.length > MOST_PROBLEMS ? [TEXT.moreFiles(problems.length - MOST_PROBLEMS)] : [], ...more].join("\n");
  for (const file of list) {
    const reading = setTimeout(() => { state.refusal = told([TEXT.readingFile(file.name)]); Page.render(); }, 300);
    try {
      files.push({name: file.name, ...await readFile(file)});
    } catch (error) {
      problems.push(error.message);
    }
    clearTimeout(reading);
    state.refusal = told([]);
  }
  if (draftKey(chat) !== draftKey()) return addToDraft(draftKey(chat), files);    // another chat is shown now
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

// The commands and prompts that match the draft, listed above it.
const offered = {names: [], at: 0, closed: "", sign: "/"};       // `closed`: the text for which Escape has closed the list

function offerCommands() {
  const {text, files} = state.draft, begun = /^\/([^\s/]*)$/.exec(text)?.[1].toLowerCase(), asked = /(?:^|\s)#([^\s#]*)$/.exec(text)?.[1].toLowerCase();
  offered.sign = asked === undefined ? "/" : "#";
  const names = text === offered.closed ? [] : asked !== undefined ? Knowledge.names(asked) : begun === undefined || files.length ? [] : commandNames().filter(name => name.startsWith(begun));
  if (names.join() !== offered.names.join()) Object.assign(offered, {names, at: 0});
  if (text !== offered.closed) offered.closed = "";
  const list = $("commands"), message = $("message");
  list.hidden = !names.length;
  list.replaceChildren(...names.map((name, i) => {
    const option = element("div", {id: optionOf(name), onclick: () => completeCommand(name)}, element("span", {textContent: `${offered.sign}${name}`}),
      element("small", {textContent: offered.sign === "#" ? "" : [valueOf(name), hintOf(name)].filter(Boolean).join(" · ")}));
    option.setAttribute("role", "option");
    option.setAttribute("aria-selected", i === offered.at);
    return option;
  }));
  if (names.length) message.setAttribute("aria-activedescendant", optionOf(names[offered.at]));
  else message.removeAttribute("aria-activedescendant");
  list.children[offered.at]?.scrollIntoView({block: "nearest"});
}

const optionOf = name => `command-${name.replace(/\s/g, "_")}`;

function completeCommand(name) {
  if (offered.sign === "#") {
    Knowledge.choose(name);
    setDraft(state.draft.text.replace(/#[^\s#]*$/, ""));
    return $("message").focus();
  }
  const prompt = promptCommands().get(name);
  setDraft(prompt ? "" : valueOf(name) ? `/${name} ` : `/${name}`);
  if (prompt) Prompts.use(prompt);
  else $("message").focus();
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
  const said = Chat.path.filter(node => node.role === "user").map(node => Tree.partsOf(node).text).reverse();
  const shown = recalled && state.draft.text === said[recalled - 1];
  if (!shown && state.draft.text) return;
  if (!shown) recalled = 0;
  const to = recalled + (event.key === "ArrowUp" ? 1 : -1);
  if (to < 0 || to > said.length) return;
  event.preventDefault();
  recalled = to;
  setDraft(said[to - 1] ?? "");
}

// Shows why something was refused, from the next drawing on; "" for nothing.
const refuse = reason => { state.refusal = reason; };

// Puts the text back into the composer, before anything typed since.
function giveBack(text, files, reason) {
  state.refusal = reason;
  state.queued.delete(Chat.current.id);                 // the draft is another one now
  setDraft([text, state.draft.text].filter(each => each.trim()).join("\n\n"), [...files, ...state.draft.files]);
}

function submitDraft() {
  const {text, files} = state.draft, trimmed = text.trim();
  state.refusal = "";
  const command = trimmed.startsWith("/") && !trimmed.startsWith("//") && !files.length;
  if (!trimmed && !files.length) return;
  const said = Server.model.api === "text" ? text : trimmed;
  if (command ? runCommand(trimmed) : Chat.ask(said.replace(/^\/\//, "/"), files)) {
    if (state.draft.text === text) setDraft("", []);
    return;
  }
  const growing = Tree.isGrowing(Chat.lastNode());
  if (!command && (growing || Chat.modelComes())) state.queued.add(Chat.current.id);
  else if (!command) state.refusal = TEXT.notReady;
  renderComposer(growing);
}

// Sends the draft that waits for its chat's answer to end, or for the model.
function sendQueued() {
  const {text, files} = state.draft;                    // empty while it is still being read
  if (!state.queued.has(Chat.current.id) || !Chat.canAsk() || !text.trim() && !files.length) return;
  state.queued.delete(Chat.current.id);
  submitDraft();
}

// Returns to typing, except on a touch screen, where the keyboard would cover the answer.
function focusAfterClick() { $(touch.matches ? "log" : "message").focus({preventScroll: true}); }

// stored drafts -------------------------------------------------------------------------------------------------------

const draftKey = (chat = Chat.current) => Chat.isStored(chat) || chat.temporary ? chat.id : "new";

let unread = null;                // {key} of the draft whose stored files are still being read: they must not be overwritten

// The text also goes into this tab's own storage, which is synchronous and which no other tab touches.
function saveDraft() {
  const {text, files} = state.draft, key = draftKey();
  try { if (Store.isKept(key)) sessionStorage.setItem(`${Store.name} draft ${key}`, text); } catch (error) { /* the other storage has it */ }
  if (key !== unread?.key) Store.change("drafts", key, text || files.length ? {id: key, text, files, created: Date.now()} : null);
}

// Shows this tab's text at once and the rest once it is read; text typed in between stays.
async function loadDraft(key) {
  let text = null;
  try { text = sessionStorage.getItem(`${Store.name} draft ${key}`); } catch (error) { /* the other storage has it */ }
  const mine = unread = {key};
  setDraft(text ?? "", [], false);
  const shown = state.draft, stored = (await Store.read("drafts")).find(draft => draft.id === key);
  if (unread !== mine) return;                           // another one is being read by now
  unread = null;
  if (key !== draftKey()) return;
  const changed = state.draft !== shown;
  setDraft(changed ? state.draft.text : text ?? stored?.text ?? "", [...stored?.files ?? [], ...state.draft.files], changed);
}

// The draft of a new chat is gone once that has its first message.
function dropNewDraft() {
  Store.change("drafts", "new", null);
  try { sessionStorage.removeItem(`${Store.name} draft new`); } catch (error) { /* it was not there */ }
}

// Keeps files in the draft of a chat that is not shown.
async function addToDraft(key, files) {
  const stored = (await Store.read("drafts")).find(draft => draft.id === key);
  Store.change("drafts", key, {text: "", ...stored, id: key, files: [...stored?.files ?? [], ...files], created: Date.now()});
}

// commands ------------------------------------------------------------------------------------------------------------

const COMMANDS = {
  system: value => { Chat.change(Chat.current, {system: value}); Chat.say(value ? TEXT.systemIs(value) : TEXT.systemIsEmpty); },
  clear: () => Chat.openNew(),
  temporary: () => Chat.switchTemporary(),
  help: () => Chat.say(TEXT.help(commandNames().map(name => [`/${name}`, valueOf(name)].join(" ").trim()))),
  set: value => setNamed(value),
};

// Map: the word after the slash -> a saved prompt. Commands of the same name come first.
function promptCommands() {
  const found = new Map();
  for (const prompt of Prompts.own()) {
    const word = prompt.name.toLowerCase().match(/[\p{L}\p{M}\p{N}]+/gu)?.join("-") ?? "prompt";
    let free = word;
    for (let count = 2; Object.hasOwn(COMMANDS, free) || parameterOf(free) || found.has(free); count++) free = `${word}-${count}`;
    found.set(free, prompt);
  }
  return found;
}

// The samplers last; those of thinking only where the model thinks.
const commandNames = () => [...Object.keys(COMMANDS), ...promptCommands().keys(),
  ...Parameters.all.map(({command}) => command).filter(name => name !== "effort" && name !== "budget" || Server.model.can.reasoning !== false)];

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
  const {stop, ...others} = Chat.current.parameters;
  Chat.change(Chat.current, {parameters: value ? {...others, stop: [value]} : others});
  return Chat.say(TEXT.parameterIs(TEXT.stopString, value ? `“${value}”` : undefined));
}

// Sets a parameter; without a value, back to the server's default. Returns a message if the value is invalid.
function setParameter(parameter, text) {
  const {name, command, min, max, choices} = parameter, value = Tree.parameterValue(parameter, text);
  if (text && value === undefined) return choices ? TEXT.badChoice(command, text, choices) : TEXT.badParameter(command, text, min, max);
  const {[name]: old, ...others} = Chat.current.parameters;
  Chat.change(Chat.current, {parameters: text ? {...others, [name]: value} : others});
  return Chat.say(TEXT.parameterIs(TEXT.parameters[name], value));
}

// Runs "/name value". Returns false, with the reason in state.refusal, if it fails.
function runCommand(text) {
  const [, word, argument] = /^\/(\S*)\s*([^]*)$/.exec(text.trim()), name = word.toLowerCase(), value = argument.trim();
  const prompt = promptCommands().get(name), parameter = parameterOf(name);
  const problem = Object.hasOwn(COMMANDS, name) ? COMMANDS[name](value) : prompt ? Prompts.use(prompt, value) : parameter ? setParameter(parameter, value) : TEXT.noCommand(word);
  if (problem) state.refusal = problem;
  return !problem;
}

// below the composer --------------------------------------------------------------------------------------------------

function renderComposer(growing) {
  const sent = document.activeElement === $("send") || document.activeElement === $("stop");
  const written = Boolean(state.draft.text.trim() || state.draft.files.length);
  $("send").hidden = growing && (!written || state.queued.has(Chat.current.id));      // it queues: a phone's Enter is a new line
  $("stop").hidden = !growing;
  if (sent) focusAfterClick();
  const queued = state.queued.has(Chat.current.id), comes = Chat.modelComes();
  $("send").disabled = !written || !Chat.canAsk() && !growing && (queued || !comes);
  setText($("queued"), !queued ? "" : growing ? TEXT.queuedQuestion : TEXT.queuedForModel);
  $("queued").hidden = !queued;
  if (queued && Chat.canAsk()) queueMicrotask(sendQueued);
  setText($("refusal"), state.refusal);
  $("refusal").hidden = !state.refusal;
  setText($("trouble"), Store.trouble ? TEXT.trouble[Store.trouble] : "");
  $("trouble").hidden = !Store.trouble;
}

// The line below the composer, with the gauge of the context.
function renderState() {
  const last = Chat.lastNode(), run = Chat.runs.get(last?.id);
  const shownInTurn = Tree.isGrowing(last) && !last.content && !run?.lost;
  $("state").classList.toggle("lost", Boolean(run?.lost));
  setText($("state"), shownInTurn ? "" : Tree.isGrowing(last) ? Turns.growingText(last, run) + (run ? Turns.liveSpeedText(run) : "")
    : Chat.path.length ? Server.trouble() : "");             // the empty page shows it itself
  $("enter-key").hidden = Server.phase !== "locked";
  renderGauge();
}

// What question and answer take up of the context, as the server counts; 0 if it cannot.
async function tokensAlone(path) {
  const {used, guessed} = usedTokens(), question = path.findLastIndex(({role}) => role === "user");
  if (used && !guessed && (question === 0 || Server.model.api === "text" || !Server.model.ours)) return used;       // these leave nothing out
  const text = await Server.templateText(Tree.messagesOf(path.slice(Math.max(0, question)), Projects.systemOf(Chat.current)));
  return text === null ? 0 : await Server.countTokens(text) ?? 0;
}

// {used, guessed}: the path's tokens when the server last counted them, and an estimate of those added since.
function usedTokens() {
  let guessed = 0;
  for (const node of Chat.path.toReversed()) {
    const {prompt_tokens: prompt, completion_tokens: count = 0} = Chat.countsOf(Chat.runs.get(node.id)) ?? node.timings ?? node.earlier ?? {};
    if (prompt) return {used: prompt + count, guessed};
    guessed += Math.ceil((node.content.length + (node.reasoning?.length ?? 0)) / TOKEN_CHARACTERS);
  }
  return {used: 0, guessed};
}

function renderGauge() {
  const {path, current: {parameters}} = Chat, {model: {context, ours}} = Server, {counted} = state;
  const {used: known, guessed} = usedTokens(), used = known + guessed;
  const current = counted.text && counted.text === draftContent(), draft = current ? counted.tokens : 0;
  const alone = draft && draft + counted.around, tooLong = alone >= context;
  // our server reserves this much for the answer when it drops messages; others may refuse instead
  const kept = ours ? Math.min(parameters.max_tokens ?? Infinity, Math.floor(context / 4)) : 0;
  // what is too long is said once, with one number of tokens: here, or by the server that refused it
  $("gauge").hidden = !context || !used && !draft || tooLong;
  setText($("warning"), !context || tooLong && state.refusal ? "" : tooLong ? TEXT.tooLong(alone, context, state.draft.files.length)
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
    notText: name => `${name} is neither a text file nor a document (PDF, DOCX, PPTX, XLSX, ODT, ODS, ODP, EPUB, HTML).`,
    moreFiles: count => `${plural(count, "more file", "more files")} could not be read.`, unread: (name, reason) => `${name}: ${reason}`, readingFile: name => `Reading ${name} ...`, pages: count => `, ${plural(count, "page", "pages")}`, isCut: what => `Incomplete: ${what}.`,
    queuedQuestion: "Your question is queued: it is sent when this answer has ended.", queuedForModel: "Your question is sent when the model is ready.", notReady: "The model is not ready yet.",
    encodings: {"windows-1252": ", read as Latin-1", "utf-16le": ", read as UTF-16", "utf-16be": ", read as UTF-16"},
    used: (used, draft, context, about) => `${about ? "about " : ""}${number(used)}${draft ? ` + ${number(draft)}` : ""} of ${number(context)} tokens`,
    tooLong: (tokens, context, files) => `This message has ${number(tokens)} tokens, but the model's limit is ${number(context)} for question and answer together. Shorten it${files ? " or remove a file" : ""}.`,
    willDrop: "The context is full: the oldest messages will be left out.",
    full: "The context is full: this server may refuse the next message.",
    trouble: {missing: "This browser stores nothing for this page: chats last until it is closed. Export them to keep them.",
      full: "This browser's storage is full: new chats last until the page is closed. Export them, or delete chats to free space."},
    help: commands => `${commands.join(" · ")}. Without a value: the server's default. //… sends text that begins with a slash.`,
    aNumber: "N", aText: "TEXT", aParameter: "NAME N", stopString: "The stop string", badName: (name, known) => `/set takes one of ${known.join(", ")}${name ? `, not “${name}”` : ""}.`, commandList: "Commands",
    commands: {system: "instructions for the model", clear: "begin a new chat", temporary: "begin a chat of which nothing is kept, or end it", help: "list the commands", set: "set a parameter by its name in the API"},
    badChoice: (name, text, choices) => `/${name} takes ${choices.slice(0, -1).join(", ")} or ${choices.at(-1)}, not “${text}”.`,
    noCommand: name => `There is no command /${name}. /help lists them; // sends text that begins with a slash.`,
    badParameter: (name, text, min, max) => `/${name} takes a number from ${min} to ${max}, not “${text}”.`,
    parameterIs: (name, text) => text !== undefined ? `${name} is now ${text}.` : `${name} is the server's default again.`,
    systemIs: text => `The system prompt is now “${text}”.`, systemIsEmpty: "The system prompt is now empty.",
  },
  menu: () => [[Chat.current.temporary ? TEXT.notTemporary : TEXT.temporary, Chat.current.temporary ? "new" : "clock", () => { Chat.switchTemporary(); focusAfterClick(); }]],
  bind() {
    const message = $("message");
    $("composer").onsubmit = event => { event.preventDefault(); submitDraft(); };
    $("stop").onclick = Chat.stopAnswer;
    $("enter-key").onclick = Settings.openServer;
    $("attach").onclick = () => $("files-picker").click();
    $("files-picker").onchange = async ({target}) => { await addFiles(target.files); target.value = ""; };
    message.oninput = ({target}) => { recalled = 0; state.refusal = ""; state.queued.delete(Chat.current.id); setDraft(target.value); };
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
    $("message").placeholder = Server.model.api === "text" ? TEXT.textHint : TEXT.messageHint;
    renderComposer(Tree.isGrowing(Chat.lastNode()));
    renderState();
  },
});

return Object.freeze({
  get draft() { return state.draft; }, get typed() { return $("message").value; },
  setDraft, offer: offerCommands, readFile, asData, loadDraft, draftKey, dropNewDraft, giveBack, refuse, usedTokens, tokensAlone, renderState, focusAfterClick,
});
})();
