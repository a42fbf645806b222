// Tools that run: which a chat has, the reader's approval of each call, running it, and sending the results back.
//
// `Chat` asks `wanted` what to send with a question, and tells `take` when an answer with calls has ended. Once all its calls have results, the model goes on.
"use strict";

const Tools = (() => {

const {TEXT, $, element, setText, plural} = Parts;

const AT_ONCE = 4;                // calls of one answer that run at the same time
const EQUAL_CALLS = 2;            // of one question; the model is told not to call again
const FOLDED = 400;               // characters of a result above which it is folded

// The page's own tool. Not on pages opened from files, where the frame would lack its header.
const JAVASCRIPT = {name: "run_javascript", server: "page", tool: "run_javascript", title: "JavaScript", ask: true, digest: "page 1", enforced: true,
  description: "Runs JavaScript, as the body of an async function, without network and storage. What it returns and logs is the result. It has 10 seconds.",
  parameters: {type: "object", properties: {code: {type: "string"}}, required: ["code"], additionalProperties: false}};
const OWN = location.protocol === "file:" ? [] : [JAVASCRIPT];

const runJavascript = Parts.late("javascript", () => Javascript, "run");

const state = {
  tools: new Map(OWN.map(tool => [tool.name, tool])),      // name -> tool, as GET v1/tools has it
  servers: [],                    // {label, state, reason, notices}
  rounds: 8,                      // of calls, before the model must answer without tools
  of: "",                         // the server, key and model that these belong to
  reading: null,                  // the promise of them
};
const running = new Map();        // id of a call -> {controller, text} while it runs here

// what there is ---------------------------------------------------------------------------------------------------------

const placeOf = () => JSON.stringify([Server.home(), Server.key(), Server.model.name]);

// Reads the tools of the server. `anew`: even if they are known. Who comes while they are read waits for the same reading.
function load(anew = false) {
  const place = placeOf();
  if (!Server.model.ours || Server.phase !== "ready") return null;
  if (state.of !== place || anew) {
    state.of = place;
    state.reading = read(place);
  }
  return state.reading;
}

async function read(place) {
  const found = await Server.jsonOf(Server.request(`v1/tools?model=${encodeURIComponent(Server.model.name)}`, {cache: "no-store"}));
  if (placeOf() !== place) return;
  Object.assign(state, {tools: new Map([...found?.data ?? [], ...OWN].map(tool => [tool.name, tool])), servers: [...found?.servers ?? [], ...OWN.map(() => ({label: "page", state: "ready", reason: ""}))], rounds: found?.rounds ?? 8});
  Page.render();
}

const chosen = chat => (chat.tools ?? []).map(name => state.tools.get(name)).filter(Boolean);

// What a question sends beside the chat's parameters; after too many rounds no tools, so that the model answers.
async function wanted(chat, node, parameters) {
  if (!chat.tools?.length || !Server.model.can.tools) return {};
  await load();
  const tools = chosen(chat).map(({name, description, parameters: schema, enforced}) => ({type: "function", function: {name, description, parameters: schema, ...(enforced === true ? {strict: true} : {})}}));
  const all = [...parameters.tools ?? [], ...tools];
  if (!all.length) return {};
  return {tools: all, ...(roundsBefore(node) >= state.rounds ? {tool_choice: "none"} : {})};
}

// The answers with calls since the last question, the newest first.
function callersBefore(node) {
  const callers = [];
  for (let at = Chat.nodes.get(node.parent); at?.role === "assistant"; at = Chat.nodes.get(at.parent)) if (at.calls?.length) callers.push(at);
  return callers;
}

const roundsBefore = node => callersBefore(node).length;

// approval --------------------------------------------------------------------------------------------------------------

const isAllowed = (chat, tool) => !tool.ask || chat.allowed?.[tool.name] === tool.digest || Settings.preferences.allowed[tool.name] === tool.digest;

// An answer has ended: runs those of its calls that need no question.
function take(node, chat) {
  if (!node.calls?.length) return;
  const cut = node.timings?.finish_reason === "length";
  node.calls.forEach((call, i) => {
    const tool = state.tools.get(call.name);
    if (call.result !== undefined || !tool || !chat.tools?.includes(call.name)) return;
    describe(call, tool);
    const refusal = cut && i === node.calls.length - 1 ? TEXT.callWasCut : refusalOf(call, node);
    if (refusal) finish(call, {text: refusal, is_error: true});
  });
  keep(node);
  const free = node.calls.filter(call => call.server && call.result === undefined && isAllowed(chat, state.tools.get(call.name)));
  run(free, node, chat);
}

const describe = (call, {server, tool, description: about, digest}) => Object.assign(call, {server, tool, about, digest});

// Why a call is not run at all; "" if it may be. The text is for the model.
function refusalOf(call, node) {
  const {value} = Settings.readJson(call.arguments);
  if (!Fields.isObject(value)) return TEXT.badArguments;
  const earlier = callersBefore(node).flatMap(({calls}) => calls), own = node.calls.slice(0, node.calls.indexOf(call));
  const same = [...earlier, ...own].filter(each => each.name === call.name && each.arguments === call.arguments);
  return same.length >= EQUAL_CALLS ? TEXT.calledBefore : "";
}

function allow(call, node, how, tool) {
  const chat = Chat.current, {digest} = tool;
  if (how === "chat") Chat.change(chat, {allowed: {...chat.allowed, [call.name]: digest}});
  if (how === "always") Settings.change({allowed: {...Settings.preferences.allowed, [call.name]: digest}});
  const alike = how === "once" ? [call] : node.calls.filter(each => each.name === call.name && each.result === undefined);
  for (const each of alike) describe(each, tool);
  run(alike, node, chat);
}

function deny(call, node) {
  finish(call, {text: TEXT.callDenied, is_error: true});
  keep(node);
  goOn(node, Chat.current);
}

// running ---------------------------------------------------------------------------------------------------------------

async function run(calls, node, chat) {
  const waiting = calls.filter(call => !running.has(call.id));
  for (const call of waiting) running.set(call.id, {controller: new AbortController(), text: TEXT.callWaits});
  Page.render();
  const next = async () => {
    for (let call = waiting.shift(); call; call = waiting.shift()) {
      await runOne(call, node);
      running.delete(call.id);
      keep(node);
      Page.render();
    }
  };
  await Promise.all(Array.from({length: AT_ONCE}, next));
  goOn(node, chat);
}

async function runOne(call, node) {
  const {controller: {signal}} = running.get(call.id);
  call.begun = Date.now();
  keep(node);
  try {
    if (call.server === "page") return finish(call, await runJavascript(JSON.parse(call.arguments).code, signal));
    const body = {name: call.name, arguments: JSON.parse(call.arguments), digest: call.digest, stream: true};
    const response = await Server.accepted(await Server.post("v1/tools/call", body, {signal}));
    let result = null;
    for await (const {event} of Server.events(response.body, Server.SILENCE_MS)) {
      if (event.type === "result") result = event;
      else showProgress(call, event);
    }
    finish(call, result ?? {text: TEXT.outcomeUnknown, is_error: true});
  } catch (error) {
    if (error.code === "tool_changed") return changed(call);
    finish(call, {text: signal.aborted ? TEXT.callCancelled : error.status ? error.message : TEXT.outcomeUnknown, is_error: true});
  }
}

// Its server describes the tool differently now: the reader is asked again.
async function changed(call) {
  await load(true);
  const tool = state.tools.get(call.name);
  if (tool) Object.assign(call, {about: tool.description, digest: tool.digest, changed: true});
  else finish(call, {text: TEXT.toolGone, is_error: true});
}

function showProgress(call, {progress, total, message}) {
  const one = running.get(call.id);
  if (!one) return;
  one.text = message || (total ? `${progress} / ${total}` : String(progress));
  Page.render();
}

function finish(call, {text, is_error: failed = false, images = [], cut = 0, ms = 0}) {
  Object.assign(call, {result: text, ms, ...(failed ? {failed} : {}), ...(cut ? {cut} : {}), ...(images.length ? {images} : {})});
}

const keep = node => Chat.keepCalls(node);

// Lets the model go on once every call has a result, if its chat is shown.
function goOn(node, chat) {
  Page.render();
  const isLast = Chat.lastNode() === node;
  const stopped = node.calls.some(call => call.result === TEXT.callCancelled);
  if (Chat.current === chat && isLast && Calls.isAnswered(node) && !stopped && Chat.canAsk()) Chat.sendResults(node);
}

function cancel(call) { running.get(call.id)?.controller.abort(); }

// the cards -------------------------------------------------------------------------------------------------------------

// What a card has below the arguments of a tool's call; null: it is a function of the reader's own.
function partOf(call, node) {
  if (!call.server) return null;
  const box = element("div", {className: "tool"});
  if (call.result !== undefined) return resultOf(box, call);
  const one = running.get(call.id);
  if (one) {
    box.append(element("p", {className: "hint", textContent: one.text}), element("button", {type: "button", className: "plain", textContent: TEXT.cancelCall, onclick: () => cancel(call)}));
    return box;
  }
  // what is shown is what will run: another device, or whoever has its chats, may have written something else into the call
  const tool = state.tools.get(call.name);
  if (!tool) {
    box.append(element("p", {className: "hint", textContent: TEXT.toolAway}));
    return box;
  }
  const note = call.changed || call.digest !== tool.digest ? TEXT.toolChanged : call.begun ? TEXT.begunBefore : "";
  box.append(element("p", {className: "hint", textContent: tool.description}), ...(note ? [element("p", {className: "alert", textContent: note})] : []));
  const ways = [[TEXT.allowOnce, () => allow(call, node, "once", tool), "primary"], [TEXT.allowInChat, () => allow(call, node, "chat", tool), "plain"],
    [TEXT.allowAlways, () => allow(call, node, "always", tool), "plain"], [TEXT.allowNo, () => deny(call, node), "plain"]];
  const row = element("div", {className: "line"}, ...ways.map(([textContent, onclick, className]) => element("button", {type: "button", className, textContent, onclick})));
  row.setAttribute("role", "group");
  row.setAttribute("aria-label", TEXT.allowCall(tool.tool, tool.server));
  box.append(row);
  return box;
}

function resultOf(box, call) {
  const facts = [call.failed ? TEXT.callFailed : TEXT.result, call.ms ? TEXT.callTook(call.ms / 1000) : "", call.cut ? TEXT.cutBy(call.cut) : ""].filter(Boolean).join(" · ");
  const text = element("pre", {textContent: call.result, tabIndex: 0});
  if (call.result.length > FOLDED) box.append(element("details", {}, element("summary", {textContent: facts}), text));
  else box.append(element("p", {className: "hint", textContent: facts}), text);
  for (const {mime_type: type, data} of call.images ?? []) if (/^image\/(png|jpeg|gif|webp)$/.test(type)) box.append(element("img", {src: `data:${type};base64,${data}`, alt: TEXT.pictureOf(call.tool)}));
  return box;
}

// A card is drawn again when this differs.
const lookOf = calls => calls.map(({id, name}) => [running.get(id)?.text ?? "", state.tools.get(name)?.digest ?? ""].join(" ")).join("\n");

// choosing --------------------------------------------------------------------------------------------------------------

function open() {
  load(true)?.then(show);
  show();
  $("tools-dialog").showModal();
}

function show() {
  const {current: chat} = Chat, on = new Set(chat.tools ?? []);
  setText($("tools-hint"), Server.model.can.tools ? `${TEXT.toolsHint} ${whoIsAsked(chat)}` : TEXT.noToolsModel);
  $("tools-list").replaceChildren(...state.servers.map(server => groupOf(server, [...state.tools.values()].filter(tool => tool.server === server.label), on)));
}

// Whether calls wait for the reader: those of the tools that are listed below.
function whoIsAsked(chat) {
  const asking = [...state.tools.values()].filter(tool => !isAllowed(chat, tool)).length;
  if (asking === state.tools.size) return TEXT.asksFirst;
  return asking ? TEXT.asksForSome : TEXT.asksNever;
}

function groupOf(server, tools, on) {
  const all = element("input", {type: "checkbox", disabled: !tools.length, checked: tools.length > 0 && tools.every(({name}) => on.has(name)), onchange: () => choose(tools, all.checked)});
  const label = element("label", {className: "check"}, all, " ", element("b", {textContent: server.label}), " ",
    element("small", {textContent: server.state === "ready" ? plural(tools.length, TEXT.toolCounted, TEXT.toolsCounted) : [TEXT.toolStates[server.state] ?? server.state, server.reason].filter(Boolean).join(": ")}));
  const notices = (server.notices ?? []).map(text => element("small", {className: "tool-notice", textContent: text}));
  return element("section", {}, label, ...notices, ...tools.map(tool => rowOf(tool, on)));
}

function rowOf(tool, on) {
  const box = element("input", {type: "checkbox", checked: on.has(tool.name), onchange: () => choose([tool], box.checked)});
  const marks = [isAllowed(Chat.current, tool) ? TEXT.notAsked : "", tool.enforced === true || !Server.model.can.tools ? "" : TEXT.notEnforced].filter(Boolean).join(" · ");
  return element("label", {className: "check tool-row", title: tool.enforced === true ? "" : tool.enforced}, box, element("span", {textContent: tool.title || tool.tool}),
    element("small", {textContent: [tool.description.split("\n")[0].slice(0, 160), marks].filter(Boolean).join(" · ")}));
}

function choose(tools, isOn) {
  const {current: chat} = Chat, names = new Set(chat.tools ?? []);
  for (const {name} of tools) names[isOn ? "add" : "delete"](name);
  Chat.change(chat, {tools: [...names].sort()});
  show();
  Page.render();
}

function render() {
  load();
  const button = $("tools"), count = chosen(Chat.current).length;
  button.hidden = !state.servers.length || !Server.model.can.tools && !state.servers.some(({label}) => label !== "page");
  if (count) button.dataset.count = count;
  else delete button.dataset.count;
  const label = count ? TEXT.toolsOn(count) : TEXT.tools;
  if (button.title === label) return;
  button.title = label;
  button.setAttribute("aria-label", label);
}

Parts.register({
  strings: {
    tools: "Tools", toolsOn: count => `Tools (${count} on)`, toolsHint: "The model may call what is checked, in this chat.", asksFirst: "You are asked before a call runs.", asksForSome: "You are asked before a call runs, unless its tool runs without asking.", asksNever: "Calls run without asking.", noToolsModel: "This model can't call tools.",
    toolCounted: "tool", toolsCounted: "tools", toolStates: {starting: "starting", failed: "not running", stopped: "stopped"}, notAsked: "runs without asking", notEnforced: "arguments are not enforced",
    allowCall: (tool, server) => `Allow ${tool} of ${server}?`, allowOnce: "Once", allowInChat: "This chat", allowAlways: "Always", allowNo: "No", cancelCall: "Cancel",
    callWaits: "Running …", callFailed: "Failed", callTook: count => `${Parts.number(count)} s`, cutBy: count => `${plural(count, "character", "characters")} left out`, pictureOf: tool => `Picture of ${tool}`,
    toolAway: "The server does not have this tool now, so the call cannot run.", toolChanged: "This tool has changed since you allowed it.", begunBefore: "This call was begun before, and nobody knows how it ended.",
    // for the model
    callDenied: "The user did not allow this call.", callCancelled: "The user cancelled this call.", callWasCut: "Not run: the call was cut off by the limit of tokens.", badArguments: "Not run: the arguments are not a complete JSON object.",
    calledBefore: "Not run: the same call was made twice before. Use its result.", outcomeUnknown: "The connection was lost. The call may have been carried out: the outcome is unknown.", toolGone: "Not run: the tool is not there any more.",
  },
  bind() {
    $("tools").onclick = open;
  },
  render,
});

return Object.freeze({wanted, take, partOf, lookOf});
})();
