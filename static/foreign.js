// Chats of other programs, turned into those of our own files (tree.js): ChatGPT's have a `mapping` of messages, Open WebUI's a `chat` with
// a `history`, and those of llama-server's page a `conv` with `messages`.
"use strict";

const Foreign = (() => {

const {TEXT, register} = Parts;

// What a program writes: how its chats look, and what becomes of one.
const PROGRAMS = [
  {wrote: chat => Fields.isObject(chat?.mapping), ownOf: chatOfChatGpt},
  {wrote: chat => Fields.isObject(chat?.chat), ownOf: chatOfOpenWebUi},
  {wrote: chat => Fields.isObject(chat?.conv) && Array.isArray(chat.messages), ownOf: chatOfLlamaServer},
];
const programOf = chat => PROGRAMS.find(({wrote}) => wrote(chat));

// The chats of a parsed file that another program wrote; null if it is none of these.
function chatsIn(file) {
  const chats = databaseOf(file) ?? (Array.isArray(file?.conversations) ? file.conversations : [file].flat());
  return chats.some(programOf) ? chats.filter(programOf) : null;
}

// Such a chat in the format of our own files; null if it is ours.
const ownOf = (chat, name, index) => programOf(chat)?.ownOf(chat, name, index) ?? null;

const isShown = ({content, shown = content}) => Boolean(shown);

// ChatGPT and Open WebUI ------------------------------------------------------------------------------------------------

// Their times are seconds, some milliseconds.
const timeOf = value => Number.isFinite(value) && value > 0 ? Math.round(value < 1e11 ? 1000 * value : value) : undefined;

function chatOfChatGpt({title, create_time: created, update_time: updated, mapping, current_node: leaf}) {
  const entries = Object.entries(mapping).map(([id, {parent, message}]) => ({id, parent, ...messageOfChatGpt(message ?? {})}));
  return {title, created: timeOf(created), updated: timeOf(updated ?? created), ...shownOnly(entries, leaf)};
}

// Calls of tools, their results and what ChatGPT hides have no content here; thoughts are reasoning of the answer below them.
function messageOfChatGpt({author, content, create_time: created, metadata, recipient}) {
  const {parts = [], thoughts = [], content_type: type} = content ?? {}, role = author?.role;
  const said = ["user", "assistant"].includes(role) && ["text", "multimodal_text"].includes(type) && (recipient ?? "all") === "all" && !metadata?.is_visually_hidden_from_conversation;
  return {role, created: timeOf(created), model: metadata?.model_slug, content: said ? joinedText(parts.map(part => Fields.isText(part) ? part : part?.text)) : "",
    reasoning: type === "thoughts" ? joinedText(thoughts.map(thought => thought?.content)) : ""};
}

const joinedText = texts => texts.filter(text => Fields.isText(text) && text.trim()).join("\n\n");

function chatOfOpenWebUi({title, pinned, created_at: created, updated_at: updated, chat}) {
  const {history, messages = []} = chat, listed = Fields.isObject(history?.messages) ? Object.values(history.messages) : messages.map((each, i) => ({parentId: messages[i - 1]?.id, ...each}));
  const entries = listed.map(({id, parentId, role, content, model, timestamp}) => ({id, parent: parentId, role, created: timeOf(timestamp), model,
    ...role === "system" ? {} : thoughtsApart(Fields.isText(content) ? content : "")}));
  const system = chat.params?.system ?? chat.system ?? listed.find(({role}) => role === "system")?.content;
  return {title: title ?? chat.title, pinned, system, created: timeOf(created ?? chat.timestamp), updated: timeOf(updated ?? chat.timestamp),
    ...shownOnly(entries, history?.currentId ?? listed.at(-1)?.id)};
}

// Open WebUI keeps reasoning as a quotation in <details>.
function thoughtsApart(text) {
  const thoughts = [], content = text.replace(/<details type="reasoning"[^>]*>\s*(?:<summary>[^<]*<\/summary>)?([^]*?)<\/details>\s*/g, (_, quoted) => {
    thoughts.push(quoted.trim().replace(/^(?:>|&gt;) ?/gm, ""));
    return "";
  });
  return {content: content.trim(), reasoning: joinedText(thoughts)};
}

// llama-server ----------------------------------------------------------------------------------------------------------
//
// A chat is {conv: {id, name, lastModified, currNode, pinned}, messages: [DatabaseMessage]}; a file has one, or a list. Since 2026 a file has a line of JSON for
// the chat ("session") and one for each message, and several chats are a zip of such files. In 2025 some builds exported their database (Dexie).
// Ids were numbers then, with -1 above the first. Sources: tools/ui and tools/server/webui in llama.cpp, src/lib/types/database.d.ts.

// The chats of a file with a record in each line; null if it is none. Throws an Error if a line is damaged.
function sessionsIn(text, name) {
  if (!/^\s*\{[^\n]*"type"\s*:\s*"session"[^\n]*\}[ \t\r]*(?:\n|$)/.test(text)) return null;
  const sessions = [];
  for (const [i, line] of text.split("\n").entries()) {
    const record = line.trim() ? recordOf(line, i, name) : null;
    if (record?.type === "session") sessions.push({conv: record, messages: []});
    else if (record?.type === "message") sessions.at(-1).messages.push(record.message);
  }
  return sessions;
}

function recordOf(line, i, name) {
  try { return JSON.parse(line); } catch (error) { throw new Error(TEXT.damagedLine(name, i + 1)); }
}

function databaseOf(file) {
  if (file?.formatName !== "dexie" || !Array.isArray(file.data?.data)) return null;
  const rowsOf = name => file.data.data.find(({tableName}) => tableName === name)?.rows ?? [];
  const messages = new Map(rowsOf("conversations").map(({id}) => [id, []]));
  for (const message of rowsOf("messages")) messages.get(message?.convId)?.push(message);
  return rowsOf("conversations").map(conv => ({conv, messages: messages.get(conv.id)}));
}

const idOf = value => value === null || value === undefined || value === -1 ? null : String(value);

function chatOfLlamaServer({conv, messages}, name, index) {
  const wrong = messages.findIndex(message => !Fields.isObject(message) || !Fields.isText(message.role) || !Fields.isText(message.content ?? ""));
  if (wrong >= 0) throw new Error(TEXT.badMessage(name, index, wrong));
  const entries = messages.map(entryOfLlamaServer), known = new Map(entries.map(entry => [entry.id, entry]));
  entries.filter(({role}) => role === "tool").forEach(entry => giveResult(entry, known));
  const leaf = known.has(idOf(conv.currNode)) ? idOf(conv.currNode) : newestOf(entries)?.id;
  const times = entries.map(({created}) => created).filter(Boolean);
  return {title: conv.name, pinned: conv.pinned === true, system: systemAbove(known, leaf), updated: timeOf(conv.lastModified),
    created: times.length ? times.reduce((first, time) => Math.min(first, time)) : timeOf(conv.lastModified),
    leftOut: entries.reduce((count, {leftOut}) => count + leftOut, 0), ...shownOnly(entries, leaf)};
}

const newestOf = entries => entries.reduce((newest, entry) => (entry.created ?? 0) >= (newest?.created ?? 0) ? entry : newest, null);

// A message as a node; those of roots, system prompts and tools are not shown.
function entryOfLlamaServer(message) {
  const {id, parent, role, type, timestamp, model, timings, extra} = message, files = filesOf(extra);
  const entry = {id: idOf(id), parent: idOf(parent), role, model, created: timeOf(timestamp), leftOut: files.leftOut, said: message.content ?? "", content: "", shown: false};
  if (type === "root" || role === "system") return entry;
  if (role === "tool") return {...entry, callId: message.toolCallId};
  if (role === "user") {
    const composed = Tree.composeMessage(entry.said, files.kept);
    return {...entry, ...composed, shown: Boolean(composed.content || composed.pictures)};
  }
  if (role !== "assistant") return entry;
  const {content, reasoning} = withoutMarks(entry.said), thoughts = joinedText([message.reasoningContent ?? message.thinking, reasoning]);
  const calls = callsOf(message.toolCalls ?? message.tool_calls);
  return {...entry, content, reasoning: thoughts, ...(calls.length ? {calls} : {}), timings: timingsOf(timings ?? {}), leftOut: files.leftOut + files.kept.length,
    shown: Boolean(content || thoughts || calls.length)};
}

// Attached files: those that a question can have here, and how many others.
function filesOf(extra) {
  const found = (Array.isArray(extra) ? extra : []).map(fileOf);
  return {kept: found.flatMap(files => files ?? []), leftOut: found.filter(files => !files).length};
}

function fileOf(extra) {
  const {type, name = "context.txt", base64Url, content, images, processedAsImages} = extra ?? {};
  if (/^image/i.test(type)) return Fields.isPicture(base64Url) ? [{name, picture: base64Url}] : null;
  if (processedAsImages && images?.length && images.every(Fields.isPicture)) return images.map((picture, i) => ({name: `${name} (${i + 1})`, picture}));
  return Fields.isText(content) && Fields.isText(name) ? [{name, text: content}] : null;
}

// Calls of tools, a list or its JSON.
function callsOf(given) {
  const listed = Fields.isText(given) ? Settings.readJson(given).value : given;
  return (Array.isArray(listed) ? listed : []).filter(call => Fields.isText(call?.function?.name))
    .map(({id, function: {name, arguments: text}}, i) => ({id: Fields.isText(id) ? id : `call_${i + 1}`, name, arguments: Fields.isText(text) ? text : JSON.stringify(text ?? {})}));
}

// The result of a tool goes to the call above it that has its id, or else to the first one without a result.
function giveResult({parent, callId, said}, known) {
  const passed = new Set();
  for (let above = known.get(parent); above && !passed.has(above); above = known.get(above.parent)) {
    passed.add(above);
    const waiting = above.calls?.filter(({result}) => result === undefined) ?? [], call = waiting.find(({id}) => id === callId) ?? (callId ? null : waiting[0]);
    if (call) { call.result = said; return; }
    if (above.role === "user") return;
  }
}

function systemAbove(known, leaf) {
  const passed = new Set();
  for (let entry = known.get(leaf); entry && !passed.has(entry); entry = known.get(entry.parent)) {
    if (entry.role === "system" && entry.said) return entry.said;
    passed.add(entry);
  }
  return "";
}

function timingsOf({prompt_n: computed, cache_n: cached, predicted_n: count, predicted_ms: ms}) {
  const facts = {prompt_tokens: computed === undefined ? undefined : computed + (cached ?? 0), cached_tokens: cached, completion_tokens: count, tokens_per_second: 1000 * count / ms};
  const known = Object.entries(facts).filter(([, value]) => Number.isFinite(value));
  return known.length ? Object.fromEntries(known) : undefined;
}

// Early in 2026, thoughts and calls stood in the text between marks.
function withoutMarks(text) {
  const thoughts = [];
  const content = text.replace(/<<<reasoning_content_start>>>([^]*?)(?:<<<reasoning_content_end>>>|$)/g, (_, thought) => { thoughts.push(thought.trim()); return ""; })
    .replace(/<<<AGENTIC_TOOL_CALL_START>>>\s*<<<TOOL_NAME:([^]*?)>>>\s*<<<TOOL_ARGS_START>>>\s*([^]*?)\s*<<<TOOL_ARGS_END>>>\s*([^]*?)\s*<<<AGENTIC_TOOL_CALL_END>>>/g,
      (_, name, given, result) => `<details>\n<summary>${name}</summary>\n\n\`\`\`json\n${given}\n\`\`\`\n\n${result}\n</details>\n`);
  return {content: thoughts.length ? content.trim() : content, reasoning: joinedText(thoughts)};
}

// -----------------------------------------------------------------------------------------------------------------------

// The entries with content (or, if they say it, that are `shown`), each below the nearest other such one; the leaf likewise.
function shownOnly(entries, leaf) {
  const known = new Map(entries.map(entry => [entry.id, entry]));
  const above = id => {                                    // [the entry, reasoning of those passed over]
    const passed = new Set(), reasoning = [];
    for (let entry = known.get(id); entry && !passed.has(entry); entry = known.get(entry.parent)) {
      if (isShown(entry)) return [entry, reasoning];
      passed.add(entry);
      reasoning.unshift(entry.reasoning);
    }
    return [null, reasoning];
  };
  const nodes = entries.filter(isShown).map((entry, i) => {
    const [parent, thoughts] = above(entry.parent), reasoning = joinedText([...thoughts, entry.reasoning]);
    return {...entry, parent: parent?.id ?? null, created: entry.created ?? (parent?.created ?? Date.now()) + i,
      reasoning: entry.role === "assistant" && reasoning ? reasoning : undefined};
  });
  return {leaf: above(leaf)[0]?.id, nodes};
}

register({
  strings: {
    damagedLine: (name, line) => `${name} is damaged: line ${line} is not valid JSON. It may have been cut off.`,
  },
});

return Object.freeze({chatsIn, sessionsIn, ownOf});
})();
