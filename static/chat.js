// The conversation: the chats and their nodes, questions, and the answers being written.
//
// The path of a message: `ask` adds the user's node, `answer` the assistant's. `runAnswer` reads the stream
// (`readAnswer`; `takeUp` resumes it when the connection or the page was lost). Every event grows the node,
// `Turns.paint` draws it once per frame, and `saveGrown` stores it now and then. Everything else changes `state`
// and calls `Page.render`.
"use strict";

const Chat = (() => {

const {TEXT, wait, newest} = Parts;

const state = {
  chats: new Map(),               // id -> conversation, all stored ones
  chat: Tree.newConversation(),   // the one that is shown; stored with its first message
  nodes: new Map(),               // its nodes
  children: new Map(),            // childrenOf(nodes)
  leaf: null,                     // id of the last node shown in this tab; chat.leaf is restored on the next visit
  path: [],                       // the nodes that are shown
  runs: new Map(),                // id of a node -> the answer that this tab is receiving into it, in any chat
  notice: "",                     // the page's own notice below the turns
  toasts: [],                     // {text, label, act, undo, chat} above the composer: the last deletion, answers of other chats
  ended: 0,                       // answers that ended while this tab was hidden
  editing: null,                  // id of the node being edited
};

const SAVE_MS = 500;              // a growing answer is stored this often

const lastNode = () => state.path.at(-1);
// A question is sent to an unreachable server, where it waits; while a model loads, it waits in the composer.
const modelComes = () => ["connecting", "loading"].includes(Server.phase);
const canAsk = () => !Tree.isGrowing(lastNode()) && !modelComes() && Server.model.api !== "none";
const isStored = chat => state.chats.has(chat.id);

// chats ---------------------------------------------------------------------------------------------------------------

function changeChat(chat, changes) {
  Object.assign(chat, changes);
  if (isStored(chat)) Store.change("conversations", chat.id, changes);
}

// Updates what is derived from nodes and leaf.
function refresh() {
  state.children = Tree.childrenOf(state.nodes);
  if (!state.nodes.has(state.leaf)) state.leaf = Tree.leafBelow(state.children, null);
  state.path = Tree.pathTo(state.nodes, state.leaf);
  Page.render();
}

// Reads the stored chats, when the page starts.
async function readStored() {
  for (const chat of await Store.read("conversations")) state.chats.set(chat.id, chat);
}

// The node of this id is edited; null: none is.
const edit = id => { state.editing = id; };

function showLeaf(id) {
  state.leaf = id;
  changeChat(state.chat, {leaf: id});
  refresh();
}

const opening = newest();         // only the newest request to open a chat counts

// `known`: the chat's nodes, if they need not be read.
async function openChat(id, known = null) {
  const isMine = opening(), chat = state.chats.get(id);
  if (!chat) return newChat();
  const nodes = known ?? await Store.read("nodes", id);
  if (!isMine()) return;
  state.nodes = new Map(nodes.map(node => [node.id, state.runs.get(node.id)?.node ?? node]));
  for (const run of state.runs.values()) if (run.chat.id === id) state.nodes.set(run.node.id, run.node);
  const isShown = noteOpening(chat);
  showChat(chat, Tree.leafBelow(Tree.childrenOf(state.nodes), chat.leaf));      // another device may have gone on there
  isShown();
  for (const node of state.nodes.values()) if (Tree.isGrowing(node)) adopt(node, chat);
  await Composer.loadDraft(id);
}

// A chat whose drawing never ends would be opened again at each start. So its id is noted until the page has drawn it, or is left.
const OPENING = `${Store.name} opening`;

function noteOpening({id, temporary}) {
  if (temporary || document.hidden) return () => {};
  try { localStorage.setItem(OPENING, id); } catch (error) { /* no matter */ }
  return () => requestAnimationFrame(() => setTimeout(noteOpened));
}

function noteOpened() {
  try { localStorage.removeItem(OPENING); } catch (error) { /* no matter */ }
}

// The id of a chat with which the page has ended.
const stuckAt = () => { try { return localStorage.getItem(OPENING); } catch (error) { return null; } };

function showChat(chat, leaf) {
  Page.closeViews();
  Object.assign(state, {chat, leaf, notice: "", editing: null});
  Page.follow();
  Composer.refuse("");
  if (Server.models.length > 1 || Server.model.base) Server.useModel();
  state.toasts = state.toasts.filter(toast => toast.chat !== chat.id);
  rememberPlace();
  refresh();
}

// `temporary`: nothing of it is kept, neither here nor on the server (store.js).
function newChat(temporary = false) {
  opening();
  state.nodes = new Map();
  showChat(Tree.newConversation({...(temporary ? {temporary} : {}), parameters: {...Settings.preferences.defaults.parameters}, system: Settings.preferences.defaults.system ?? "",
    ...(state.chat.model ? {model: state.chat.model} : {})}), null);
  if (temporary) Store.keepOut(state.chat.id);
  Composer.loadDraft(Composer.draftKey());
}

// Begins a temporary chat with what has been typed for a new one; from a temporary chat, an ordinary one.
function switchTemporary() {
  const {draft: {text, files}} = Composer, isNew = !isStored(state.chat);
  newChat(!state.chat.temporary);
  if (!isNew) return;
  if (state.chat.temporary) Composer.dropNewDraft();
  Composer.setDraft(text, files);
}

// The address names the chat shown, so that a reload, a bookmark and the back button find it.
function rememberPlace() {
  const place = isStored(state.chat) && !state.chat.temporary ? state.chat.id : "", hash = place && `#${place}`;
  if (location.hash !== hash) history.pushState(null, "", location.pathname + location.search + hash);
  try { localStorage.setItem(`${Store.name} last`, place); } catch (error) { /* no matter */ }
}

const lastPlace = () => { try { return localStorage.getItem(`${Store.name} last`); } catch (error) { return null; } };

// Deletes chats, and offers to bring them back.
async function deleteChats(chats, text) {
  const gone = await removeChats(chats);
  offerUndo(text, () => bringBack(gone));
  if (!isStored(state.chat)) newChat();
  else Page.render();
}

// Deletes records of chats, and returns them as [{chat, nodes}].
async function removeChats(chats) {
  const gone = [];
  for (const {id} of chats) Store.change("conversations", id, null);  // at once: the page may be closed while messages are read
  for (const {running, ...chat} of chats) {
    const nodes = await Store.read("nodes", chat.id);
    for (const node of nodes) {
      stopRun(node.id);
      Store.change("nodes", node.id, null, true);          // they go with the chat
    }
    state.chats.delete(chat.id);
    gone.push({chat, nodes: nodes.map(node => ({...node, stream: null}))});
  }
  return gone;
}

function bringBack(gone) {
  for (const {chat, nodes} of gone) addChat(chat, nodes);
  openChat(gone[0].chat.id);
}

function addChat(chat, nodes) {
  state.chats.set(chat.id, chat);
  Store.change("conversations", chat.id, chat);
  for (const node of nodes) Store.change("nodes", node.id, node);
}

function deleteNode(node) {
  const ids = Tree.withDescendants(state.children, node.id), nodes = ids.map(id => state.nodes.get(id)), {chat} = state;
  for (const id of ids) {
    stopRun(id);
    state.nodes.delete(id);
    Store.change("nodes", id, null);
  }
  offerUndo(TEXT.deletedMessages(ids.length), () => {
    for (const each of nodes) Store.change("nodes", each.id, {...each, stream: null});
    changeChat(chat, {leaf: nodes.at(-1).id});
    openChat(chat.id);
  });
  if (!state.nodes.has(state.leaf)) state.leaf = Tree.leafBelow(Tree.childrenOf(state.nodes), node.parent);
  showLeaf(state.leaf);
}

function offerUndo(text, restore) {
  showToast({text, label: TEXT.undo, act: restore, undo: true});
}

// The newest three; a deletion can be undone until the next one.
function showToast(toast) {
  state.toasts = [...state.toasts.filter(({undo}) => !(undo && toast.undo)), toast].slice(-3);
  Page.announce(toast.text);
}

const dropToast = toast => { state.toasts = state.toasts.filter(each => each !== toast); };
const dropUndo = () => { state.toasts = state.toasts.filter(({undo}) => !undo); };

// Announces that an answer has ended, if its reader is looking at something else.
function noticeEnd({node, chat}, failed) {
  const away = document.hidden || !document.hasFocus(), text = (failed ? TEXT.endedBadly : TEXT.endedIn)(chat.title);
  if (chat.id !== state.chat.id) showToast({text, label: TEXT.show, act: () => openChat(chat.id), chat: chat.id});
  if (!away) return;
  if (document.hidden) state.ended++;
  if (!Settings.preferences.notify) return;
  try {
    const notice = new Notification(text, {body: chat.temporary ? "" : node.content.slice(0, 200), tag: node.id});
    notice.onclick = () => { window.focus(); openChat(chat.id); notice.close(); };
  } catch (error) { /* some browsers allow none from pages */ }
}

// A title that no chat has: the base with the next free number.
function numbered(title) {
  const titles = new Set([...state.chats.values()].map(chat => chat.title)), base = (title || TEXT.untitled).replace(/ \(\d+\)$/, "");
  for (let count = 2; ; count++) if (!titles.has(`${base} (${count})`)) return `${base} (${count})`;
}

// A new chat with the messages up to a node.
function branchFrom(node) {
  const chat = Tree.newConversation({...state.chat, id: Tree.newId(), created: Date.now(), updated: Date.now(), pinned: false, running: null,
    title: numbered(state.chat.title)});
  let parent = null;
  const nodes = Tree.pathTo(state.nodes, node.id).map(each => {
    const copy = {...each, id: Tree.newId(), conversation: chat.id, parent, stream: null};
    parent = copy.id;
    return copy;
  });
  chat.leaf = parent;
  addChat(chat, nodes);
  openChat(chat.id);
}

// asking --------------------------------------------------------------------------------------------------------------

function addNode(parent, role, content, more = {}) {
  const {chat} = state, node = Tree.newNode(chat.id, parent, role, content, more);
  state.nodes.set(node.id, node);
  if (!isStored(chat)) storeNewChat(chat, content || (more.pictures?.[0].name ?? ""));
  Store.change("nodes", node.id, {...node});
  state.leaf = node.id;
  changeChat(chat, {leaf: node.id, updated: node.created});
  return node;
}

function storeNewChat(chat, content) {
  chat.title = chat.temporary ? TEXT.temporary : Tree.titleOf(content);           // browsers keep the titles of pages
  state.chats.set(chat.id, chat);
  Store.change("conversations", chat.id, {...chat});
  if (!chat.temporary) Composer.dropNewDraft();
  rememberPlace();
}

// Sends a message as a child of `parent`. If the server refuses its content, it returns to the composer.
function ask(text, files = [], parent = state.leaf, onRefused = () => {}) {
  if (!canAsk() || !text.trim() && !files.length) return false;
  const before = state.leaf, {content, ...more} = Server.model.api === "text" && !files.length ? {content: text} : Tree.composeMessage(text, files);
  Object.assign(state, {notice: "", editing: null});
  Composer.refuse("");
  dropUndo();
  const question = addNode(parent, "user", content, more);
  answer(question, (error, node) => {
    if (![400, 413, 422].includes(error.status)) return false;
    removeNodes([node.id, question.id], before);
    Composer.giveBack(text, files, error.message);
    onRefused();
    return true;
  });
  return true;
}

function removeNodes(ids, leaf) {
  const {chat} = state;
  for (const id of ids) {
    state.nodes.delete(id);
    Store.change("nodes", id, null);
  }
  state.leaf = leaf;
  changeChat(chat, {leaf});
  if (state.nodes.size) return;
  state.chats.delete(chat.id);                          // its first message was refused
  Store.change("conversations", chat.id, null);
  rememberPlace();
}

// Another answer to the same question. The old one stays, unless it was an empty failure and the server
// accepts the new one.
function regenerate(node) {
  const question = state.nodes.get(node.parent);
  if (!canAsk() || !question) return;
  Object.assign(state, {notice: "", editing: null});
  Composer.refuse("");
  dropUndo();
  answerAgain(question, {}, () => { if (Tree.failed(node)) forget(node); });
}

// An additional answer. It is removed if the server refuses the request.
function answerAgain(question, more, onAccepted = () => {}) {
  const before = state.leaf;
  answer(question, (error, made) => {
    removeNodes([made.id], before);
    Composer.refuse(error.message);
    return true;
  }, onAccepted, more);
}

function forget(node) {
  state.nodes.delete(node.id);
  Store.change("nodes", node.id, null);
  refresh();
}

// A new answer below `question`. `onRefusal(error, node)` returns true if it has undone it; `onAccepted`
// runs when the server accepts.
function answer(question, onRefusal, onAccepted = () => {}, more = {}) {
  const {chat} = state, made = Look.madeBy(chat, {parameters: {...chat.parameters}, ...more});
  if (Server.models.length > 1 && chat.model !== Server.model.name) changeChat(chat, {model: Server.model.name});
  const node = addNode(question.id, "assistant", "", {stream: {id: Tree.newId(), next: 0}, ...made});
  Page.follow();
  refresh();
  const path = Tree.pathTo(state.nodes, question.id);
  return runAnswer(node, chat, run => connect(run, given(messagesToSend(path, made.system ?? ""), made), onAccepted), onRefusal);
}

function messagesToSend(path, system) {
  if (Server.model.api === "text") return Object.assign(path.map(node => ({role: node.role, content: Calculator.withNames(node)})).filter(({content}) => content), {dropped: 0});
  const {messages, dropped} = Tree.newestMessages(Tree.messagesOf(path, system, Boolean(Server.model.can.reasoning_history)), Server.model.context);
  return Object.assign(messages, {dropped});
}

// Messages with what an answer was given to read, if that is known already.
const given = (messages, {knowledge = {}}) => Object.assign(Knowledge.given(messages, knowledge), {dropped: messages.dropped});

// What asks for an answer again, with all that it was asked with: {messages, parameters}. Whatever looks into one, or repeats, compares or continues it,
// makes its request with this.
async function requestOf(node, path = Tree.pathTo(state.nodes, node.parent)) {
  const messages = given(messagesToSend(path, Look.systemOf(node)), node), {parameters = {}, knowledge} = node;
  const tools = await Tools.wanted({tools: node.tools}, node, parameters);
  const unknown = knowledge?.passages?.length && !knowledge.text ? {knowledge: {stores: [...new Set(knowledge.passages.map(({vector_store_id: id}) => id))]}} : {};       // of an older page
  return {messages, parameters: {...parameters, ...tools, ...unknown}};
}

async function connect(run, messages, onAccepted, goOn = false) {
  const {node, controller: {signal}} = run;
  run.dropped = messages.dropped;
  const model = Server.model.name;                       // this chat's, even if another is shown later
  const seed = goOn && Number.isSafeInteger(node.seed) ? {seed: node.seed} : node.prefix ? {prefix_token_ids: node.prefix} : {};
  const tools = await Tools.wanted(run.chat, node, node.parameters ?? {});
  const knowledge = node.knowledge?.text ? {} : Knowledge.wanted(run.chat);      // one that goes on, or branches off another, has it already
  const post = place => onceReady(run, () =>
    Server.postAnswer({messages, parameters: {...seed, ...node.parameters, ...tools, ...knowledge, ...(run.chat.temporary ? {resumable: false, ...Server.forgotten()} : {})}, id: node.stream.id, signal, model, goOn, place}));
  const place = run.chat.temporary || typeof Sync === "undefined" ? null : await Sync.placeOf(node, goOn);
  run.kept = Boolean(place);                             // the server writes the answer into the chat itself
  let response;
  try {
    response = await post(place);
  } catch (error) {
    if (error.code === "other_answer") return takeUp(run);         // an earlier try has begun it
    if (await Knowledge.isGone(run.chat, error) || !run.kept || !NOT_KEPT.includes(error.code)) throw error;
    run.kept = false;
    response = await post(null);
  }
  run.resumable = !run.chat.temporary && response.headers.has("X-Request-Id");
  node.stream = {...node.stream, id: response.headers.get("X-Request-Id") ?? node.stream.id};
  onAccepted();
  return response;
}

const NOT_KEPT = ["not_found", "other_node", "storage_full", "missing_space"];        // the server cannot write it there

// Posts; if the server is unreachable or wants a key, posts again once that has changed. Stop ends the wait.
async function onceReady(run, post) {
  for (;;) {
    if (Server.phase === "locked") Settings.openServer();
    run.waiting = Server.phase !== "ready";
    Page.render();
    await Server.untilReady(run.controller.signal);
    run.waiting = false;
    try {
      return await post();
    } catch (error) {
      const away = error.status === undefined || error.status === 503;
      if (error.name === "AbortError" || !(error.status === 401 && Server.phase === "locked" || away && await Server.isAway())) throw error;
    }
  }
}

const canGoOn = node => Boolean(node.content || node.calculator?.length || node.reasoning && !node.error && Server.model.can.reasoning_history && Server.model.can.continue_final_message);

const LEAST_ROOM = 16;            // tokens of the context without which it is not worth while to read it all again

// Continues an answer that was cut off: in the same node if the server can, otherwise by asking for more.
async function goOn(node) {
  if (!canAsk()) return;
  if (!Server.model.can.continue_final_message) return ask(TEXT.pleaseContinue);
  if (await isFull()) return say(TEXT.noRoom(Server.model.context));
  if (!canAsk() || node !== lastNode()) return;
  const before = {note: node.note, error: node.error, timings: node.timings, parameters: node.parameters, calculator: node.calculator};
  Object.assign(node, {stream: {id: Tree.newId(), next: 0, begin: Calculator.charactersIn(node.content)}, calculator: Calculator.beforeGoingOn(node), note: null, error: null, timings: null, earlier: node.timings, continued: true, parameters: state.chat.parameters});
  const messages = given(messagesToSend(Tree.pathTo(state.nodes, node.id), Projects.systemOf(state.chat)), node);
  if (!node.content && !node.calculator.length) messages.push({role: "assistant", content: "", ...(node.reasoning ? {reasoning_content: node.reasoning} : {})});      // cut off while thinking
  runAnswer(node, state.chat, run => connect(run, messages, () => {}, true), error => {
    Object.assign(node, before, {earlier: null});
    Composer.refuse(error.message);
    return true;
  });
}

// Whether the last question and its answer alone fill the context: then the server has no older message to leave out.
async function isFull() {
  const {context} = Server.model, {used, guessed} = Composer.usedTokens();
  if (!context || used + guessed <= context - LEAST_ROOM) return false;
  return await Composer.tokensAlone(state.path) > context - LEAST_ROOM;
}

// The title of a chat follows its first question, unless it has got another one, and goes back with a refused question.
function editQuestion(node, text) {
  const {chat} = state, before = chat.title, title = Tree.titleOf(text), follows = !state.nodes.has(node.parent) && before === Tree.titleOf(node.content);
  if (!ask(text, Tree.partsOf(node).files, node.parent, () => { if (follows && chat.title === title) changeChat(chat, {title: before}); })) return false;
  if (follows && text.trim()) { changeChat(chat, {title}); Page.render(); }
  return true;
}

const keepCalls = ({id, calls}) => Store.change("nodes", id, {calls});

// Sends the results of an answer's calls, from which the model goes on in a new node.
function sendResults(node) {
  keepCalls(node);
  answer(node, (error, made) => {
    removeNodes([made.id], node.id);
    Composer.refuse(error.message);
    return true;
  });
}

// The edited answer becomes a sibling of the old one.
function editAnswer(node, text) {
  const {reasoning, model, parameters} = node, calculator = Calculator.afterEdit(node.content, text, node.calculator);
  addNode(node.parent, "assistant", text, {reasoning, model, parameters, edited: true, ...(calculator.length ? {calculator} : {})});
  state.editing = null;
  refresh();
}

// answers being written ---------------------------------------------------------------------------------------------------

// Shows an answer growing until it ends in any way. `connecting(run)` resolves to the response with its
// next events, or null if there are no more.
async function runAnswer(node, chat, connecting, onRefusal = () => false) {
  const run = {node, chat, controller: new AbortController(), progress: null, chunks: 0, prompt: 0, tokens: 0, firstAt: 0, lastAt: 0,
    tags: node.content ? null : new Tree.ThoughtTags(), resumable: true, waiting: false, lost: false, resumed: false, saving: 0, frame: 0, dropped: 0,
    thought: node.earlier && !node.content ? node.thought ?? 0 : 0};
  state.runs.set(node.id, run);
  changeChat(chat, {running: node.id});
  saveGrown(run);
  Page.render();
  Page.announce(TEXT.waiting);
  let response = null, failure = null;
  try {
    response = await connecting(run);
    if (response) await readAnswer(run, response);
    else node.note = "interrupted";
  } catch (error) {
    failure = error;
    run.controller.abort();                              // the rest of the stream is not needed
  }
  endRun(run, failure, !response && failure && !run.stopped ? onRefusal : () => false);
}

function endRun(run, failure, onRefusal) {
  const {node, chat} = run, {text, reasoning} = run.tags?.finish() ?? {};
  if (text || reasoning) grow(run, {text, reasoning});
  state.runs.delete(node.id);
  Object.assign(node, {stream: null, ended: node.stream.id});
  changeChat(chat, {running: null, updated: Date.now()});
  if (run.stopped || failure?.code === "cancelled") node.note = "stopped";
  else if (failure) Object.assign(node, {error: failure.message, remedy: failure.status === 401 ? "key" : "again"});
  if (!node.timings) node.timings = {...countsOf(run), ...(run.chunks > 1 ? {measured: liveSpeed(run)} : {})};
  if (node.earlier) Object.assign(node, {timings: wholeOf(node.earlier, node.timings), earlier: null});
  if (!state.nodes.has(node.id) && state.chat.id === chat.id) return Page.render();       // deleted in the meantime
  if (!failure || state.chat.id !== chat.id || !onRefusal(failure, node)) saveGrown(run);
  if (state.chat.id === chat.id) refresh();
  else Page.render();
  Page.announce(failure && !run.stopped ? "" : node.note ? TEXT.answerStopped : TEXT.answerFinished);
  if (!run.stopped) noticeEnd(run, failure);
  if (!failure) nameChat(chat, node);
  if (!failure && !run.stopped) Tools.take(node, chat);
  Page.render();
}

const TITLE_TOKENS = 24, TITLE_CHARACTERS = 1500;      // limits: the title, and each message it is made from

// Lets the model title a chat after its first answer, when the server is otherwise idle.
async function nameChat(chat, node) {
  if (!Settings.preferences.titles || chat.temporary || Server.model.api !== "v1" || !node.content) return;
  const nodes = await Store.read("nodes", chat.id), question = nodes.find(({id}) => id === node.parent), before = chat.title;
  if (nodes.length !== 2 || before !== Tree.titleOf(question?.content ?? "")) return;
  const part = text => text.slice(0, TITLE_CHARACTERS), content = TEXT.titleRequest(part(question.content), part(node.content));
  const made = await Server.jsonOf(Server.post(Server.ROUTES.v1, {messages: [{role: "user", content}], max_tokens: TITLE_TOKENS, temperature: 0,
    ...(Server.model.ours ? {priority: "low", reasoning_effort: "none"} : {}), ...Server.modelNamed(chat.model)}));
  const said = made?.choices?.[0]?.message?.content, text = Fields.isText(said) ? said : "";
  const title = Tree.titleOf((Tree.untagged({content: text}).content ?? text).replace(/^\W*title\W+/i, "").replace(/["“”*]|\.\W*$/g, ""));
  if (!title || chat.title !== before || !isStored(chat)) return;
  changeChat(chat, {title});
  Page.render();
}

async function readAnswer(run, response) {
  for (;;) {
    try {
      return await readEvents(run, response);
    } catch (error) {
      if (error instanceof Server.Lost) Server.watch();
      if (!(error instanceof Server.Lost) || !run.resumable) throw error;
      response = await takeUp(run);
      if (!response) { run.node.note = "interrupted"; return undefined; }
    }
  }
}

async function readEvents(run, response) {
  const {node} = run;
  let ended = false;
  for await (const {id, event} of Server.events(response.body, run.resumable ? Server.SILENCE_MS : Server.FOREVER_MS)) {
    const news = untaggedNews(run, Server.readEvent(event));
    if (id) node.stream = {...node.stream, next: Number(id) + 1};
    if (news.prompt) run.prompt = news.prompt;
    if (news.knowledge) node.knowledge = news.knowledge;
    if (news.ids.length) (node.ids ??= []).push(...news.ids);
    run.tokens = news.usage?.completion_tokens || run.tokens + news.ids.length;
    Calls.grow(node, news.calls);
    const grown = news.text || news.reasoning || news.moved || news.calls.length || news.calculator.length;
    run.progress = news.progress ?? (grown ? null : run.progress);
    if (grown) grow(run, news);
    if (grown || news.progress) paintSoon(run);
    ended ||= news.reason !== null;
    noteFacts(run, news, ended);
  }
  if (!ended) throw new Server.Lost(TEXT.endedEarly);
}

// Other servers may leave reasoning in the text, between tags.
function untaggedNews(run, news) {
  if (Server.model.ours || news.reasoning) run.tags = null;
  return run.tags && news.text ? {...news, ...run.tags.push(news.text)} : news;
}

// Records the server's facts about an answer, most of them in its last events.
function noteFacts({node, dropped}, {gpu, model, seed, timings, usage, reason, cause}, ended) {
  if (model) node.model = model;
  if (Number.isSafeInteger(seed)) node.seed = seed;
  if (!ended) return;
  const {prompt_tokens, completion_tokens, prompt_tokens_details, completion_tokens_details} = usage ?? {};
  const cached = usage?.cached_tokens ?? prompt_tokens_details?.cached_tokens;
  const facts = {...timings, prompt_tokens, completion_tokens, cached_tokens: cached, reasoning_tokens: completion_tokens_details?.reasoning_tokens ?? usage?.reasoning_tokens, gpu, finish_reason: reason,
    ...(reason ? {stop_reason: cause === "repetition" ? cause : ""} : {})};
  const known = Object.entries(facts).filter(fact => fact[1] !== null && Fields.isTiming(fact));
  node.timings = {...node.timings, ...Object.fromEntries(known)};
  if (dropped) node.timings.dropped_messages = dropped + (timings?.dropped_messages ?? 0);
}

function grow(run, {text, reasoning, moved = false, calculator = []}) {
  const {node} = run, now = performance.now();
  if (calculator.length) node.calculator = [...node.calculator ?? [], ...Calculator.callsOf(calculator, node.stream.begin)];
  if (moved) {
    Object.assign(node, {reasoning: node.content, content: ""});
    Turns.paint(node);                                         // once with no text: a view only ever grows
  }
  if (!run.chunks++) { Object.assign(run, {firstAt: now, first: run.tokens || 1}); Page.announce(TEXT.answering); }
  run.lastAt = now;
  if (reasoning) Object.assign(node, {reasoning: (node.reasoning ?? "") + reasoning, thought: run.thought + Math.round(now - run.firstAt)});
  node.content += text;
  run.saving ||= setTimeout(saveGrown, SAVE_MS, run);
}

function paintSoon(run) {
  run.frame ||= requestAnimationFrame(() => { run.frame = 0; Turns.paint(run.node); });
}

// The facts about an answer that went on: what was said of its parts, together. The later prompt has the earlier part in it.
function wholeOf(earlier, later) {
  const {completion_tokens: before = 0} = earlier, {prompt_tokens: prompt, completion_tokens: count = 0} = later, whole = {...earlier, ...later};
  for (const name of ["ttft_ms", "queue_ms", "cached_tokens"]) whole[name] = earlier[name];
  for (const name of ["drafted_tokens", "accepted_tokens", "reasoning_tokens"]) if (name in whole) whole[name] = (earlier[name] ?? 0) + (later[name] ?? 0);
  whole.completion_tokens = before + count;
  if (prompt) whole.prompt_tokens = Math.max(1, prompt - before);
  whole.waited_ms = (earlier.waited_ms ?? 0) + (later.ttft_ms ?? 0);         // before the first tokens of the later parts
  const [first, second] = [earlier, later].map(speedIn), speed = first && second ? (before + count) / (before / first + count / second) : first || second;
  for (const name of ["tokens_per_second", "predicted_per_second", "measured"]) delete whole[name];
  if (whole.ttft_ms === undefined) whole.waited_ms = undefined;              // nobody measured the first part
  if (speed) whole[isMeasured(earlier) || isMeasured(later) ? "measured" : "tokens_per_second"] = speed;
  return Object.fromEntries(Object.entries(whole).filter(([, value]) => value !== undefined));
}

const speedIn = facts => facts.tokens_per_second ?? facts.predicted_per_second ?? facts.measured ?? 0;
const isMeasured = ({measured, tokens_per_second: exact, predicted_per_second: theirs}) => measured !== undefined && (exact ?? theirs) === undefined;

// Stores what an answer has, without what it had from its beginning.
function saveGrown(run) {
  const {id, conversation, parent, role, created, parameters, system, weights, prefix, verdict, revision, rev, unsent, ...grown} = run.node;
  clearTimeout(run.saving);
  run.saving = 0;
  Store.change("nodes", id, grown);
}

// The token counts so far of a growing answer and its prompt; null if the prompt's is unknown.
const countsOf = run => run?.prompt ? {prompt_tokens: run.prompt, completion_tokens: run.tokens || run.chunks} : null;

// Tokens per second since the first event, which may hold several (drafts); where the server counts none, each event counts as one.
const liveSpeed = run => Math.max(1, (run.tokens || run.chunks) - run.first) / Math.max(0.001, (run.lastAt - run.firstAt) / 1000);

const takeUp = run => Server.reconnected(run.node.stream, run.controller.signal, lost => {
  Object.assign(run, {lost, resumed: !lost});
  Page.render();
});

// What came of generating an answer again; it is not stored.
const noteVerdict = (node, text) => { node.verdict = text; };

// Closing the connection is not enough: the server would wait for the page to reconnect.
function stopRun(id) {
  const run = state.runs.get(id);
  if (!run) return false;
  run.stopped = true;
  run.controller.abort();
  Server.request(`v1/cancel/${encodeURIComponent(run.node.stream.id)}`, {method: "POST"}).catch(() => {});
  return true;
}

// Stops the growing answer on screen, even if another tab is receiving it.
function stopAnswer() {
  const node = lastNode();
  if (!Tree.isGrowing(node) || stopRun(node.id)) return;
  Store.tell({stop: node.id});
  Server.request(`v1/cancel/${encodeURIComponent(node.stream.id)}`, {method: "POST"}).catch(() => {});
}

// Ends the thinking of a growing answer, which continues with its content. False if the server did not do so.
const answerNow = node => Server.request(`v1/cancel/${encodeURIComponent(node.stream.id)}?reasoning=true`, {method: "POST"}).then(response => response.ok, () => false);

// other tabs ----------------------------------------------------------------------------------------------------------

const ANSWER_MS = 300;            // time for a tab to claim an answer
const claimed = new Set();        // ids of nodes that another tab has just claimed

// Resumes an answer that no tab is receiving: the page was left, or the receiving tab was closed.
async function adopt(node, chat) {
  if (!Tree.isGrowing(node) || state.runs.has(node.id)) return;
  if (Store.channel) {
    claimed.delete(node.id);
    Store.tell({who: node.id});
    await wait(ANSWER_MS);
    if (claimed.has(node.id) || !Tree.isGrowing(node) || state.runs.has(node.id)) return;
  }
  runAnswer(node, chat, takeUp);
}

function hearTab({who, mine, stop, left}) {
  if (who && state.runs.has(who)) Store.tell({mine: who});
  if (mine) claimed.add(mine);
  if (stop) stopRun(stop);
  if (left) adoptOrphans();
}

function adoptOrphans() {
  for (const node of state.nodes.values()) if (Tree.isGrowing(node)) adopt(node, state.chat);
}

// When the page opens: resumes the answers in the other chats.
async function adoptAll() {
  for (const chat of state.chats.values()) {
    if (!chat.running || chat.id === state.chat.id) continue;
    const node = (await Store.read("nodes", chat.id)).find(({id}) => id === chat.running);
    if (node) adopt(node, chat);
  }
}

// Applies what another tab has stored or deleted (null): a list of [kind, id, record].
function hearNews(news) {
  let leaf = null;                                      // a new one below the leaf that is shown
  for (const [kind, id, record] of news) {
    if (kind === "conversations") hearChat(id, record);
    else if (kind === "projects") Projects.hear(id, record);
    else if (kind === "prompts") Prompts.hear(id, record);
    else if (kind === "nodes" && hearNode(id, record)) leaf = id;
  }
  if (leaf && !state.editing) state.leaf = Tree.leafBelow(Tree.childrenOf(state.nodes), leaf);
  refresh();
}

// Applies another tab's version of a node; true if it is a new one below the leaf.
function hearNode(id, record) {
  const known = state.nodes.get(id);
  if (state.runs.has(id) && record) return false;
  if (!record && known) {
    stopRun(id);
    state.nodes.delete(id);
    if (id === state.leaf) state.leaf = known.parent;
  } else if (record?.conversation === state.chat.id && !(record.revision <= known?.revision)) {
    state.nodes.set(id, known ? Object.assign(known, record) : record);
    return !known && record.parent === state.leaf;
  }
  return false;
}

function hearChat(id, record) {
  const known = state.chats.get(id);
  if (!record) {
    state.chats.delete(id);
    if (known && state.chat.id === id) { newChat(); state.notice = TEXT.deletedElsewhere; }
  } else if (known && !(record.revision <= known.revision)) Object.assign(known, record);
  else if (!known) state.chats.set(id, record);
}

function say(text) {
  state.notice = text;
  Page.follow();
  Page.render();
  Page.announce(text);
}

Parts.register({
  strings: {
    temporary: "Temporary chat", notTemporary: "Ordinary chat", temporaryHint: "Nothing of this chat is kept: not in this browser, and not on the server. It is gone when you close this tab.",
    temporaryElsewhere: "Nothing of this chat is kept in this browser. The server at this address is another program, which may keep it.",
  },
  bind() {
    Store.listen({onNews: hearNews, onMessage: hearTab, onTrouble: Page.render});
    addEventListener("pagehide", () => {
      noteOpened();
      for (const run of state.runs.values()) saveGrown(run);
      Store.leave();
      if (state.runs.size) Store.tell({left: true});
    });
    document.addEventListener("visibilitychange", () => {
      if (document.hidden) return;
      state.ended = 0;
      Page.render();
    });
    addEventListener("popstate", () => {
      const view = Page.viewAt(location.hash);
      if (view) view.open(location.hash);
      else if (Page.openView() || location.hash.slice(1) !== state.chat.id) openChat(location.hash.slice(1));
    });
    setInterval(adoptOrphans, 5000);
  },
});

return Object.freeze({
  get chats() { return state.chats; }, get current() { return state.chat; }, get nodes() { return state.nodes; }, get children() { return state.children; },
  get leaf() { return state.leaf; }, get path() { return state.path; }, get runs() { return state.runs; }, get notice() { return state.notice; },
  get toasts() { return state.toasts; }, get ended() { return state.ended; }, get editing() { return state.editing; },
  lastNode, canAsk, modelComes, isStored, canGoOn, countsOf, liveSpeed, wholeOf, messagesToSend, requestOf,
  readStored, hear: hearNews, lastPlace, stuckAt, opening, open: openChat, openNew: () => newChat(), switchTemporary, change: changeChat, showLeaf, addChat, deleteChats, removeChats, bringBack, branchFrom,
  addNode, deleteNode, edit, editQuestion, editAnswer, offerUndo, dropToast, say,
  ask, regenerate, answerAgain, noteVerdict, keepCalls, sendResults, goOn, stopAnswer, answerNow, adoptAll,
});
})();
