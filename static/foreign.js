// Chats of other programs, turned into those of our own files (tree.js): ChatGPT's have a `mapping` of messages, Claude's `chat_messages`, Open WebUI's
// a `chat` with a `history`, and those of llama-server's page a `conv` with `messages`. What has no place here is counted by kind (`leftOut`): the reader
// is told before the import.
"use strict";

const Foreign = (() => {

const {TEXT, register} = Parts;

// What a program writes: how its chats look, and what becomes of one.
const PROGRAMS = [
  {wrote: chat => Fields.isObject(chat?.mapping), ownOf: chatOfChatGpt},
  {wrote: chat => Array.isArray(chat?.chat_messages), ownOf: chatOfClaude},
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

// Kinds with how many there are of each: {pictures: 2}.
function countOf(kinds) {
  const counts = {};
  for (const kind of kinds) if (kind) counts[kind] = (counts[kind] ?? 0) + 1;
  return counts;
}

const KINDS = ["pictures", "files", "canvases", "sources", "calls", "damaged"];
const sumOf = counts => Object.fromEntries(KINDS.map(kind => [kind, counts.reduce((sum, each) => sum + (each?.[kind] ?? 0), 0)]).filter(([, count]) => count));
const isPictureName = name => /\.(?:png|jpe?g|gif|webp|bmp|heic|avif|svg)$/i.test(name);
const kindOfFile = (name, type) => /^image/i.test(type ?? "") || isPictureName(name ?? "") ? "pictures" : "files";

// A question of nothing but what has no place here is still one: its answer belongs to it.
const questionOf = (content, leftOut) => content || (Object.keys(leftOut).length ? `(${TEXT.namedKinds(leftOut)})` : "");

// ChatGPT, Claude and Open WebUI ----------------------------------------------------------------------------------------

// Their times are seconds, some milliseconds.
const timeOf = value => Number.isFinite(value) && value > 0 ? Math.round(value < 1e11 ? 1000 * value : value) : undefined;

function chatOfChatGpt({title, create_time: created, update_time: updated, mapping, current_node: leaf}) {
  const entries = Object.entries(mapping).map(([id, {parent, message}]) => ({id, parent, ...messageOfChatGpt(message ?? {})}));
  return {title, created: timeOf(created), updated: timeOf(updated ?? created), leftOut: sumOf(entries.map(entry => entry.leftOut)), ...shownOnly(entries, leaf)};
}

// Calls of tools, their results and what ChatGPT hides have no content here; thoughts are reasoning of the answer below them.
function messageOfChatGpt({author, content, create_time: created, metadata, recipient = "all"}) {
  const {parts = [], thoughts = [], content_type: type} = content ?? {}, role = author?.role, entry = {role, created: timeOf(created), model: metadata?.model_slug, content: "", leftOut: {}};
  if (!["user", "assistant"].includes(role) || metadata?.is_visually_hidden_from_conversation) return entry;
  if (type === "thoughts") return {...entry, reasoning: joinedText([thoughts].flat().map(thought => thought?.content))};
  if (recipient && recipient !== "all") return {...entry, leftOut: countOf([/^canmore\.(?!comment)/.test(recipient) ? recipient.endsWith("create_textdoc") && "canvases" : "calls"])};
  if (!["text", "multimodal_text"].includes(type)) return entry;
  const {text, sources} = withoutCitations(joinedText([parts].flat().map(part => Fields.isText(part) ? part : part?.text)), metadata?.content_references);
  const pointers = [parts].flat().filter(part => Fields.isText(part?.asset_pointer)).map(({content_type: kind}) => /audio|video/.test(kind ?? "") ? "files" : "pictures");
  const files = listOf(metadata?.attachments).map(({name, mime_type: kind}) => kindOfFile(name, kind)).filter(kind => kind === "files");
  const leftOut = countOf([...pointers, ...files, ...Array(sources).fill("sources")]);
  return {...entry, content: role === "user" ? questionOf(text, leftOut) : text, leftOut};
}

const listOf = value => Array.isArray(value) ? value.filter(Fields.isObject) : [];

// A text without ChatGPT's marks of what it cites: each becomes the link that the export has for it, or goes and is counted.
function withoutCitations(text, references) {
  const links = new Map(listOf(references).filter(({matched_text: mark, alt}) => mark && Fields.isText(alt) && alt).map(({matched_text: mark, alt}) => [mark, alt]));
  let sources = 0;
  const whole = text.replace(/\ue200[^\ue200\ue201]*\ue201|【\d+(?::\d+)?†[^【】]*】/g, mark => {
    if (!links.has(mark)) sources++;
    return links.get(mark) ?? "";
  });
  return {text: whole, sources};
}

// Claude's are a list; in newer exports each message names the one above it.
function chatOfClaude({name, created_at: created, updated_at: updated, chat_messages: messages, current_leaf_message_uuid: leaf}) {
  const listed = listOf(messages), entries = listed.map((message, i) => ({id: message.uuid ?? i, parent: message.parent_message_uuid ?? listed[i - 1]?.uuid ?? i - 1, ...messageOfClaude(message)}));
  return {title: name, created: timeIn(created), updated: timeIn(updated ?? created), leftOut: sumOf(entries.map(entry => entry.leftOut)), ...shownOnly(entries, leaf ?? entries.at(-1)?.id)};
}

const timeIn = text => timeOf(Date.parse(text));

function messageOfClaude({sender, text, content, attachments, files, created_at: created, model}) {
  const blocks = listOf(content), textsOf = (type, member = type) => joinedText(blocks.filter(block => block.type === type).map(block => block[member]));
  const said = textsOf("text") || (Fields.isText(text) ? text.trim() : ""), calls = blocks.filter(({type}) => type === "tool_use");
  const kept = listOf(attachments).filter(({file_name: name, extracted_content: words}) => Fields.isText(name) && name && Fields.isText(words) && words);
  const leftOut = countOf([...[...listOf(attachments).filter(each => !kept.includes(each)), ...listOf(files)].map(({file_name: name, file_kind: kind}) => kindOfFile(name, kind)),
    ...calls.map(call => call.name === "artifacts" ? ["create", undefined].includes(call.input?.command) && "canvases" : "calls"),
    ...blocks.flatMap(({citations}) => listOf(citations).map(() => "sources"))]);
  const entry = {created: timeIn(created), model, leftOut};
  if (sender !== "human") return {...entry, role: "assistant", content: said, reasoning: textsOf("thinking")};
  return {...entry, role: "user", ...Tree.composeMessage(questionOf(said, kept.length ? {} : leftOut), kept.map(({file_name: file, extracted_content: words}) => ({name: file, text: words})))};
}

const joinedText = texts => texts.filter(text => Fields.isText(text) && text.trim()).join("\n\n");

function chatOfOpenWebUi({title, pinned, created_at: created, updated_at: updated, chat}) {
  const {history, messages = []} = chat, listed = Fields.isObject(history?.messages) ? Object.values(history.messages) : messages.map((each, i) => ({parentId: messages[i - 1]?.id, ...each}));
  const entries = listed.filter(Fields.isObject).map(message => ({id: message.id, parent: message.parentId, role: message.role, created: timeOf(message.timestamp), model: message.model, ...saidInOpenWebUi(message)}));
  const system = chat.params?.system ?? chat.system ?? listed.find(({role}) => role === "system")?.content;
  return {title: title ?? chat.title, pinned, system, created: timeOf(created ?? chat.timestamp), updated: timeOf(updated ?? chat.timestamp),
    leftOut: sumOf(entries.map(entry => entry.leftOut)), ...shownOnly(entries, history?.currentId ?? listed.at(-1)?.id)};
}

// What a message says, with those of its files that a question can have here.
function saidInOpenWebUi({role, content, files, sources}) {
  const parts = listOf(content), text = Fields.isText(content) ? content : joinedText(parts.map(part => part.text)), cited = listOf(sources).map(() => "sources");
  if (role !== "user") return role === "assistant" ? {...thoughtsApart(text), leftOut: countOf([...cited, ...listOf(files).map(({name, type}) => kindOfFile(name, type))])} : {};
  const brought = [...listOf(files), ...parts.filter(part => part.image_url).map(part => ({type: "image", url: part.image_url.url}))];
  const asHere = ({type, name, url, file}) => kindOfFile(name, type) === "pictures" ? Fields.isPicture(url) && {name: Fields.isText(name) ? name : "picture", picture: url}
    : Fields.isText(file?.data?.content) && {name: name ?? file.filename ?? "file.txt", text: file.data.content};
  const kept = brought.map(asHere), leftOut = countOf(brought.map(({name, type}, i) => !kept[i] && kindOfFile(name, type)));
  return {...Tree.composeMessage(questionOf(text, kept.some(Boolean) ? {} : leftOut), kept.filter(Boolean)), leftOut, ...(kept.some(each => each?.picture) ? {shown: true} : {})};
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
    leftOut: sumOf(entries.map(entry => entry.leftOut)), ...shownOnly(entries, leaf)};
}

const newestOf = entries => entries.reduce((newest, entry) => (entry.created ?? 0) >= (newest?.created ?? 0) ? entry : newest, null);

// A message as a node; those of roots, system prompts and tools are not shown.
function entryOfLlamaServer(message) {
  const {id, parent, role, type, timestamp, model, timings, extra} = message, files = filesOf(extra);
  const entry = {id: idOf(id), parent: idOf(parent), role, model, created: timeOf(timestamp), leftOut: files.leftOut, said: message.content ?? "", content: "", shown: false};
  if (type === "root" || role === "system") return entry;
  if (role === "tool") return {...entry, callId: message.toolCallId};
  if (role === "user") {
    const composed = Tree.composeMessage(questionOf(entry.said, files.kept.length ? {} : files.leftOut), files.kept);
    return {...entry, ...composed, shown: Boolean(composed.content || composed.pictures)};
  }
  if (role !== "assistant") return entry;
  const {content, reasoning} = withoutMarks(entry.said), thoughts = joinedText([message.reasoningContent ?? message.thinking, reasoning]);
  const calls = callsOf(message.toolCalls ?? message.tool_calls);
  return {...entry, content, reasoning: thoughts, ...(calls.length ? {calls} : {}), timings: timingsOf(timings ?? {}), leftOut: sumOf([files.leftOut, countOf(files.kept.map(({picture}) => picture ? "pictures" : "files"))]),
    shown: Boolean(content || thoughts || calls.length)};
}

// Attached files: those that a question can have here, and how many others.
function filesOf(extra) {
  const listed = Array.isArray(extra) ? extra : [], found = listed.map(fileOf);
  return {kept: found.flatMap(files => files ?? []), leftOut: countOf(listed.map((each, i) => !found[i] && kindOfFile(each?.name, each?.type)))};
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
    namedKinds: counts => Object.entries(counts).map(([kind, count]) => Parts.plural(count, ...TEXT.kinds[kind])).join(", "),
    kinds: {pictures: ["picture", "pictures"], files: ["file", "files"], canvases: ["canvas", "canvases"], sources: ["mark of a source", "marks of sources"],
      calls: ["call of a tool", "calls of tools"], damaged: ["damaged value", "damaged values"]},
    damagedLine: (name, line) => `${name} is damaged: line ${line} is not valid JSON. It may have been cut off.`,
  },
});

return Object.freeze({chatsIn, sessionsIn, ownOf, sumOf});
})();
