// The tree of a conversation: pure functions on plain objects, without page, server or storage.
//
// A conversation is {id, title, created, updated, pinned, system, parameters, leaf, model, inTurns, project, stores, search}. A node is one message of
// it: {id, conversation, parent, role: "user" | "assistant", content, created} and, where there is one,
// attachments, pictures, reasoning, model, weights, system, parameters, seed, prefix, ids, continued, calls, calculator, timings, note, error, edited, stream. `ids` are
// an answer's tokens; the reader chose the first ones, `prefix`. `continued`: several requests made it. `calls`: [{id, name, arguments, result}]. `calculator`: see calculator.js. `parent` is a node's
// id, null for a first message. Nodes with the same parent are siblings: versions of a question, or answers
// to the same one. `stream` ({id, next}) marks an answer that is being written: the id of its stream and the
// number of the next event; `begin`: how many characters of the content are older. attachments are [{name, at, length}], ranges of content; pictures are [{name, picture}],
// each a file as a data URI.
//
// Export format, version 2 (chat_server.py's terminal reads and writes it too):
//   {"format": "chat_server chats", "version": 2, "exported": ISO time, "conversations": [conversation + "nodes": [node, ...]]}
// and, with all chats, "prompts": [{name, text, starter}] and "projects": [{id, name, prompt, files: [{name, text}], stores: [{id, name}]}]. Times are milliseconds since 1970. Import also reads {"messages": [{role, content}, ...]} or just
// the list, and what other programs export (foreign.js).
"use strict";

const Tree = (() => {

const {TEXT} = Parts, {isText, isObject} = Fields;

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("");

function newConversation(more = {}) {
  const now = Date.now();
  return {id: newId(), title: "", created: now, updated: now, pinned: false, system: "", parameters: {}, leaf: null, ...more};
}

const newNode = (conversation, parent, role, content, more = {}) =>
  ({id: newId(), conversation, parent, role, content, created: Date.now(), ...more});

// Map: id of a node (null: no parent) -> its children, oldest first. A node whose parent is missing counts as
// a first message.
function childrenOf(nodes) {
  const children = new Map([[null, []]]);
  const inOrder = [...nodes.values()].sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));
  for (const node of inOrder) {
    const parent = nodes.has(node.parent) ? node.parent : null;
    if (!children.has(parent)) children.set(parent, []);
    children.get(parent).push(node);
  }
  return children;
}

// The nodes from a first message down to `leaf`.
function pathTo(nodes, leaf) {
  const path = [];
  for (let node = nodes.get(leaf); node && path.length <= nodes.size; node = nodes.get(node.parent)) path.push(node);
  return path.reverse();
}

// The leaf of the newest branch through `id` (null: any branch).
function leafBelow(children, id) {
  for (let below; (below = children.get(id)); id = below.at(-1).id) if (!below.length) break;
  return id;
}

function withDescendants(children, id) {
  const found = [id];
  for (const each of found) found.push(...(children.get(each) ?? []).map(node => node.id));
  return found;
}

const failed = node => node?.role === "assistant" && Boolean(node.error) && !node.content;
const isGrowing = node => Boolean(node?.stream);

// The messages to send for a path: the system prompt, then all messages with text, except questions whose only
// answer is an error. Adjacent messages of one role are joined, because chat formats expect alternating roles.
function messagesOf(path, system = "", withReasoning = false) {
  const messages = system.trim() ? [{role: "system", content: system}] : [], pictured = Calls.shownPictures(path);
  for (const [i, {role, reasoning, calculator = []}] of path.entries()) {
    if (role === "assistant" && Calls.isAnswered(path[i])) { messages.push(...Calls.messagesOf(path[i], pictured)); continue; }
    const said = saidIn(path[i]), last = messages.at(-1), calls = role === "assistant" ? calculator : [];
    if (!said.length && !calls.length || role === "user" && failed(path[i + 1])) continue;
    if (last?.role === role && !last.tool_calls) addTo(last, said, calls);
    else messages.push({role, content: said, ...(withReasoning && reasoning ? {reasoning_content: reasoning} : {}), ...(calls.length ? {calculator: calls} : {})});
  }
  return messages;
}

// A message's content as it is sent: text, or with pictures a list of parts, these first.
function saidIn({content, pictures = []}) {
  const shown = pictures.map(({picture}) => ({type: "image_url", image_url: {url: picture}}));
  return shown.length ? [...shown, ...(content ? [{type: "text", text: content}] : [])] : content;
}

// Another message of the same role.
function addTo(last, said, calls) {
  const begin = isText(last.content) ? Calculator.charactersIn(last.content) + 2 : 0, all = [...last.calculator ?? [], ...Calculator.moved(calls, begin)];
  last.content = joined(last.content, said);
  if (all.length) last.calculator = all;
}

const partList = said => isText(said) ? [{type: "text", text: said}] : said;
const joined = (before, after) => isText(before) && isText(after) ? `${before}\n\n${after}` : [...partList(before), ...partList(after)];
const PICTURE_CHARACTERS = 1000;  // of a context, that one counts as
const charactersOf = said => isText(said) ? said.length
  : said.reduce((sum, {text}) => sum + (text === undefined ? PICTURE_CHARACTERS : text.length), 0);

const MOST_CHARACTERS = 4e6;      // in a request, if the context length is unknown

// The newest messages that could fit into a context of this many tokens: {messages, dropped}. The server
// counts tokens and drops the rest; this only avoids sending the whole of a very long chat each time.
function newestMessages(messages, context) {
  const fixed = messages[0]?.role === "system" ? 1 : 0;
  let first = messages.length, characters = 0;
  while (first > fixed && messages.length - first < (context || Infinity) / 2 &&
      (characters += charactersOf(messages[first - 1].content)) < (40 * context || MOST_CHARACTERS)) first--;
  first = Math.min(first, Math.max(fixed, messages.findLastIndex(message => message.role === "user")));
  return {messages: [...messages.slice(0, fixed), ...messages.slice(first)], dropped: first - fixed};
}

function titleOf(text) {
  const line = text.split("\n").map(each => each.replace(/^[#>*\s-]+|`/g, "").trim()).find(Boolean) ?? "";
  return line.length > 60 ? line.slice(0, 60).replace(/\s+\S*$/, "") + "…" : line;
}

// Separates reasoning from the answer where a server leaves its tags in the text: <think> at its start, or only </think> on a
// line of its own if the template has opened it. `push` splits a piece of text into {reasoning, text, moved}; `moved`:
// all text so far was reasoning too. What may become a tag is held back for the next piece or `finish`.
class ThoughtTags {
  constructor() { Object.assign(this, {state: "start", thought: false, held: "", last: "\n"}); }

  push(piece) {
    const news = {reasoning: "", text: "", moved: false};
    let rest = this.held + piece;
    this.held = "";
    while (rest) rest = this[this.state](rest, news);
    return news;
  }

  // At the start, and after reasoning, which more may follow.
  start(rest, news) {
    const begin = rest.trimStart(), opened = /^<think(ing)?>/.exec(begin);
    if (!opened && ["<think>", "<thinking>"].some(tag => tag.startsWith(begin))) return this.hold(rest);
    this.state = opened ? "opened" : "answer";
    return opened ? begin.slice(opened[0].length) : this.thought ? begin : rest;
  }

  opened(rest) {
    const begin = rest.trimStart();
    if (begin) this.state = "thinking";
    return begin;
  }

  thinking(rest, news) {
    const [before, after] = this.cut(rest);
    news.reasoning += before;
    return after;
  }

  answer(rest, news) {
    const [before, after, ended] = this.thought ? [rest, "", false] : this.cut(rest, true);
    news.text += before;
    this.last = before.at(-1) ?? this.last;
    if (ended) Object.assign(news, {reasoning: news.text, text: "", moved: true});
    return after;
  }

  // [text before the closing tag, text after it, found]. Without one, a possible beginning of it is held back.
  cut(rest, ownLine = false) {
    const closing = /<\/think(ing)?>/g;
    for (let found; (found = closing.exec(rest));) {
      if (ownLine && (rest[found.index - 1] ?? this.last) !== "\n") continue;
      Object.assign(this, {state: "start", thought: true});
      return [rest.slice(0, found.index), rest.slice(closing.lastIndex), true];
    }
    const at = rest.lastIndexOf("<"), open = at >= 0 && "</thinking>".startsWith(rest.slice(at));
    if (open) this.hold(rest.slice(at));
    return [open ? rest.slice(0, at) : rest, "", false];
  }

  hold(rest) {
    this.held = rest;
    return "";
  }

  // The held text, once nothing more will come.
  finish() {
    const {held, state} = this;
    this.held = "";
    return state === "thinking" ? {reasoning: held, text: ""} : {reasoning: "", text: this.thought ? held.trimStart() : held};
  }
}

// attachments -------------------------------------------------------------------------------------------------------

// A message of typed text and files: {content, attachments, pictures}. Each file of text follows as a code block with its name above.
function composeMessage(text, files) {
  let content = text.trim();
  const attachments = [], pictures = files.filter(({picture}) => picture).map(({name, picture}) => ({name, picture}));
  for (const {name, text: body} of files.filter(({picture}) => !picture)) {
    const fence = "`".repeat(Math.max(3, ...[...body.matchAll(/^ {0,3}(`{3,})/gm)].map(found => found[1].length + 1)));
    const block = `${name}:\n${fence}${languageOf(name)}\n${body.replace(/\n$/, "")}\n${fence}`;
    content += content && "\n\n";
    attachments.push({name, at: content.length, length: block.length});
    content += block;
  }
  return {content, ...(attachments.length ? {attachments} : {}), ...(pictures.length ? {pictures} : {})};
}

// Decodes a file's bytes to {text, encoding}; null if they are not text. UTF-8, UTF-16 (detected by its BOM or its
// zeros), else Windows' Latin-1.
function textOf(bytes) {
  for (const encoding of [...utf16Of(bytes), "utf-8", "windows-1252"]) {
    try {
      const text = new TextDecoder(encoding, {fatal: true}).decode(bytes);
      const foreign = encoding === "windows-1252" ? /[\0-\x08\x0e-\x19\x1c-\x1f\x7f-\x9f]/ : /[\0-\x08\x0e-\x19\x1c-\x1f]/;
      if (!foreign.test(text)) return {text, encoding};
    } catch (error) { /* not in this encoding */ }
  }
  return null;
}

// Without a BOM, most characters must be ASCII: then every second byte is zero.
function utf16Of(bytes) {
  const start = bytes.subarray(0, 4096), zeros = [0, 1].map(odd => start.filter((byte, i) => i % 2 === odd && !byte).length);
  const most = odd => zeros[odd] > start.length / 4 && !zeros[1 - odd];
  if (bytes[0] === 0xff && bytes[1] === 0xfe || most(1)) return ["utf-16le"];
  return bytes[0] === 0xfe && bytes[1] === 0xff || most(0) ? ["utf-16be"] : [];
}

const DOCUMENT = /\.(pdf|docx|pptx|xlsx|od[tsp]|epub|x?html?)$/i;        // files whose text the server reads
const languageOf = name => DOCUMENT.test(name) ? "" : /\.([a-z0-9]{1,8})$/i.exec(name)?.[1].toLowerCase() ?? "";

// The reverse of composeMessage: the typed text and the files.
function partsOf({content, attachments = [], pictures = []}) {
  const files = attachments.map(({name, at, length}) => {
    const lines = content.slice(at, at + length).split("\n");
    return {name, text: lines.slice(2, -1).join("\n")};
  });
  return {text: content.slice(0, attachments[0]?.at ?? content.length).trimEnd(), files: [...pictures, ...files]};
}

// export and import ---------------------------------------------------------------------------------------------------

function exportOf(conversations, nodesOf, prompts = [], projects = []) {
  return {format: "chat_server chats", version: 2, exported: new Date().toISOString(), ...(prompts.length ? {prompts: prompts.map(({name, text, starter}) => ({name, text, starter}))} : {}),
    ...(projects.length ? {projects: projects.map(({id, name, prompt, files, stores}) => ({id, name, prompt, files, stores}))} : {}),
    conversations: conversations.map(chat => ({...Fields.shared("conversations", chat),
      nodes: nodesOf(chat).map(node => ({id: node.id, parent: node.parent, ...Fields.shared("nodes", node)}))}))};
}

// A file's chats as [{conversation, nodes, leftOut: by kind, how much has no place here}] with new ids, so that nothing is
// replaced. Throws an Error with the reason.
function importOf(text, name = "The file") {
  return withMessages(chatsIn(text, name).map((chat, i) => importedChat(chat, name, i)), name);
}

const SLICE_MS = 30;              // of converting chats, before the page gets a frame

// The same, while the page goes on. `mayLack`: the file is one of several, and may have no chats.
async function importIn(text, name, mayLack = false) {
  const chats = [];
  if (mayLack && /^\s*(?:\[\s*\]\s*)?$/.test(text)) return chats;
  let begun = performance.now();
  for (const [i, chat] of chatsIn(text, name).entries()) {
    chats.push(importedChat(chat, name, i));
    if (performance.now() - begun < SLICE_MS) continue;
    await new Promise(requestAnimationFrame);
    begun = performance.now();
  }
  return mayLack ? chats.filter(({nodes}) => nodes.length) : withMessages(chats, name);
}

function withMessages(chats, name) {
  const found = chats.filter(({nodes}) => nodes.length);
  if (!found.length) throw new Error(TEXT.notAChat(name));
  return found;
}

// What a file lists as chats, in its own format.
function chatsIn(text, name) {
  let file = null;
  try { file = JSON.parse(text); } catch (error) {
    file = Foreign.sessionsIn(text, name);
    if (!file) throw new Error(TEXT.notJson(name));
  }
  const foreign = Foreign.chatsIn(file);
  if (foreign) return foreign;
  const listed = Array.isArray(file) ? {messages: file} : file;
  return Array.isArray(listed?.conversations) ? listed.conversations : [listed].flat();
}

function importedChat(chat, name, index) {
  const foreign = Foreign.ownOf(chat, name, index), own = foreign ?? chat;
  if (!Array.isArray(own?.nodes ?? own?.messages)) throw new Error(TEXT.notAChat(name));
  const read = own.nodes ? importedTree(own, name, index) : importedList(own, name);
  return {...read, leftOut: foreign ? foreign.leftOut ?? {} : Foreign.sumOf((own.nodes ?? own.messages).map(node => ({damaged: Fields.misfits("nodes", node)})))};
}


function importedTree(chat, name, index) {
  const conversation = newConversation(checkedChat(chat));
  const ids = new Map(chat.nodes.map(node => [node?.id, newId()]));
  const nodes = chat.nodes.map((node, i) => {
    if (!isObject(node) || !["user", "assistant"].includes(node.role) || !isText(node.content)) throw new Error(TEXT.badMessage(name, index, i));
    return {...newNode(conversation.id, ids.get(node.parent) ?? null), ...checkedNode(node), id: ids.get(node.id)};
  });
  const tree = new Map(nodes.map(node => [node.id, node]));
  if (tree.size < nodes.length) throw new Error(TEXT.sameIds(name));
  breakCircles(tree);
  conversation.leaf = tree.has(ids.get(chat.leaf)) ? ids.get(chat.leaf) : leafBelow(childrenOf(tree), null);
  conversation.title ||= titleOf(nodes[0]?.content ?? "");
  return {conversation, nodes};
}

function importedList(chat, name) {
  const conversation = newConversation(checkedChat(chat));
  const nodes = [];
  for (const [i, message] of chat.messages.entries()) {
    const content = message?.content ?? "";
    if (!isObject(message) || !["system", "user", "assistant"].includes(message.role) || !isText(content)) {
      throw new Error(TEXT.badMessage(name, 0, i));
    }
    if (message.role === "system") { conversation.system = content; continue; }
    const fields = {timings: message.stats, ...message, content, created: conversation.created + i};
    nodes.push({...newNode(conversation.id, nodes.at(-1)?.id ?? null), ...checkedNode(fields)});
  }
  conversation.leaf = nodes.at(-1)?.id ?? null;
  conversation.title ||= titleOf(nodes.find(node => node.role === "user")?.content ?? "");
  return {conversation, nodes};
}

// Version 1 files had the system prompt and the parameters in `settings`.
function checkedChat(chat) {
  const found = Fields.shared("conversations", {...(isObject(chat.settings) ? {system: chat.settings.system} : {}), ...chat});
  const parameters = [chat.parameters, chat.settings].find(isObject) ?? {};
  return {...found, title: titleOf(found.title ?? ""), parameters: checkedParameters(parameters)};
}

// Of timings and parameters, what fits is taken: other programs write more into them.
function checkedNode(node) {
  const {attachments = [], calls, calculator, timings, parameters, ...fields} = Fields.shared("nodes", node), calculations = Calculator.checked(node.calculator, node.content);
  if (calculations.length && fields.role === "assistant") fields.calculator = calculations;
  // without what tools.js keeps there: a file could show another tool than the one that would run
  if (calls) fields.calls = calls.map(({id, name, arguments: text, result}) => ({id, name, arguments: text, ...(isText(result) ? {result} : {})}));
  if (attachments.length && attachments.every(({at, length}) => length > 0 && at + length <= node.content.length)) fields.attachments = attachments.map(({name, at, length}) => ({name, at, length}));
  if (isObject(node.timings)) fields.timings = Object.fromEntries(Object.entries(node.timings).filter(fact =>
    typeof fact[1] !== "string" && fact[1] !== null || ["finish_reason", "stop_reason"].includes(fact[0])).filter(Fields.isTiming));
  if (isObject(node.parameters)) fields.parameters = checkedParameters(node.parameters);
  return fields.role === "assistant" ? {...fields, ...untagged(fields)} : fields;
}

// Other programs keep reasoning in the text of an answer.
function untagged({content, reasoning: earlier = ""}) {
  if (!/^\s*<think(ing)?>/.test(content)) return {};
  const tags = new ThoughtTags(), {reasoning, text} = tags.push(content), rest = tags.finish();
  return {reasoning: earlier + reasoning + rest.reasoning, content: text + rest.text};
}

// Nodes in a cycle of parents would never be reached, so the first of each cycle becomes a first message.
function breakCircles(nodes) {
  const good = new Set();
  for (const start of nodes.values()) {
    const way = new Set();
    let node = start;
    while (node && !good.has(node.id) && !way.has(node.id)) { way.add(node.id); node = nodes.get(node.parent); }
    if (node && way.has(node.id)) node.parent = null;
    way.forEach(id => good.add(id));
  }
}

// parameters ----------------------------------------------------------------------------------------------------------

// Parses text as a value of this parameter; undefined if it is not valid.
function parameterValue({min, max, step, choices}, text) {
  if (choices) return choices.find(choice => choice === String(text).trim().toLowerCase());
  const value = Number(text);
  return String(text).trim() !== "" && value >= min && value <= max && (step !== 1 || Number.isInteger(value)) ? value : undefined;
}

function checkedParameters(given) {
  const checked = {};
  for (const parameter of Parameters.all) {
    const value = parameterValue(parameter, given[parameter.name] ?? "");
    if (value !== undefined) checked[parameter.name] = value;
  }
  if (Array.isArray(given.tools) && given.tools.length && given.tools.every(tool => isObject(tool?.function))) checked.tools = given.tools;
  if (isObject(given.response_format)) checked.response_format = given.response_format;
  if (Array.isArray(given.stop) && given.stop.every(isText)) checked.stop = given.stop.filter(Boolean).slice(0, 4);
  return checked;
}

return Object.freeze({newId, newConversation, newNode, childrenOf, pathTo, leafBelow, withDescendants, failed, isGrowing, messagesOf, newestMessages,
  titleOf, ThoughtTags, composeMessage, textOf, DOCUMENT, languageOf, partsOf, exportOf, importOf, importIn, untagged, parameterValue,
  checkedParameters});
})();
