// Calls of functions in answers: a card for each, whose result the reader writes.
"use strict";

const Calls = (() => {

const {TEXT, element} = Parts;

const MOST_PICTURES = 8;          // of results, in a request

// Adds an event's call deltas to an answer's calls.
function growCalls(node, news) {
  for (const {index = 0, id, function: delta = {}} of news) {
    const calls = node.calls ??= [], call = calls[index] ??= {id: id ?? Tree.newId(), name: "", arguments: ""};
    call.name ||= delta.name ?? "";
    call.arguments += delta.arguments ?? "";
  }
}

// Calls without results are left out of what the model gets; the reader may ask a new question instead.
const isAnswered = ({calls}) => Boolean(calls?.every(({result}) => result !== undefined));

// The calls whose results' pictures are sent, to a model that sees: the newest that fit into a request.
function shownPictures(path) {
  let left = Server.model.can.vision ? MOST_PICTURES : 0;
  const answered = path.flatMap(({calls = []}) => calls).reverse();
  return new Set(answered.filter(({images = []}) => images.length && (left -= images.length) >= 0));
}

// Pictures follow the results in a message of the user: no other place is known to every chat template.
function messagesOfCalls({content, calls, calculator = []}, pictured) {
  const pictures = calls.filter(call => pictured.has(call)).flatMap(({images}) => images);
  const parts = pictures.map(({mime_type: type, data}) => ({type: "image_url", image_url: {url: `data:${type};base64,${data}`}}));
  return [{role: "assistant", content, ...(calculator.length ? {calculator} : {}), tool_calls: calls.map(({id, name, arguments: args}) => ({id, type: "function", function: {name, arguments: args}}))},
    ...calls.map(call => ({role: "tool", tool_call_id: call.id, content: call.images?.length && !pictured.has(call) ? `${call.result}\n${TEXT.unseenPictures}` : call.result})),
    ...(parts.length ? [{role: "user", content: [...parts, {type: "text", text: TEXT.picturesOfResults}]}] : [])];
}

function updateCalls(view, growing) {
  const {node} = view, key = JSON.stringify([node.calls ?? [], growing, Tools.lookOf(node.calls ?? []), Chat.lastNode() === node]);
  if (view.callsDrawn === key) return;
  view.callsDrawn = key;
  view.calls ??= element("div", {className: "calls"});
  if (!view.calls.isConnected) view.nothing.before(view.calls);
  const calls = node.calls ?? [], cards = calls.map(call => cardOf(call, growing, node));
  view.calls.replaceChildren(...cards.map(card => card.node));
  const isOpen = cards.some(card => card.isOpen);   // the reader has not decided about a tool's call, or it runs
  if (growing || !calls.length || isOpen || isAnswered(node) && Chat.lastNode() !== node) return;
  view.calls.append(element("button", {type: "button", className: "primary", textContent: isAnswered(node) ? TEXT.goOn : TEXT.sendResults, onclick: () => {
    cards.forEach(({field}, i) => { if (field) calls[i].result = field.value; });
    Chat.sendResults(node);
    Composer.focusAfterClick();
  }}));
}

function cardOf(call, growing, answer) {
  let shownArguments = call.arguments;
  try { shownArguments = JSON.stringify(JSON.parse(call.arguments), null, 2); } catch (error) { /* incomplete */ }
  const node = element("section", {className: "card"}, element("p", {className: "icon i-function", textContent: call.name}), Turns.codeBlock("json", shownArguments));
  node.setAttribute("aria-label", TEXT.callOf(call.name));
  if (growing) return {node};
  const part = Tools.partOf(call, answer);
  if (part) {
    node.append(part);
    return {node, isOpen: call.result === undefined};
  }
  if (call.result !== undefined) {
    node.append(element("p", {className: "hint", textContent: TEXT.result}), element("pre", {textContent: call.result, tabIndex: 0}));
    return {node};
  }
  const field = element("textarea", {rows: 2, value: call.name === "calculator" ? calculated(call.arguments) : ""});
  node.append(element("label", {}, element("span", {textContent: TEXT.result}), field));
  return {node, field};
}

// The value of {"expression": "2 * (3 + 4)"}; "" if it has none.
function calculated(text) {
  const {value} = Settings.readJson(text), parts = String(value?.expression ?? "").replace(/,/g, "").match(/\d+\.?\d*(?:e[+-]?\d+)?|\.\d+|[-+*/()]|\S/gi) ?? [];
  let at = 0;
  const factor = () => {
    const part = parts[at++];
    if (part === "-" || part === "+") return (part === "-" ? -1 : 1) * factor();
    if (part !== "(") return Number(part ?? NaN);
    const inner = whole();
    return parts[at++] === ")" ? inner : NaN;
  };
  const term = () => {
    let found = factor();
    while ("*/".includes(parts[at] ?? " ")) found = parts[at++] === "*" ? found * factor() : found / factor();
    return found;
  };
  const whole = () => {
    let found = term();
    while ("+-".includes(parts[at] ?? " ")) found = parts[at++] === "+" ? found + term() : found - term();
    return found;
  };
  const found = whole();
  return at === parts.length && Number.isFinite(found) ? String(found) : "";
}

Parts.register({
  strings: {
    callOf: name => `Call of ${name}`, result: "Result", sendResults: "Send results",
    // for the model
    picturesOfResults: "The pictures of the results above.", unseenPictures: "[You are not shown the pictures of this result.]",
  },
  answer: {update: updateCalls},
});

return Object.freeze({grow: growCalls, isAnswered, messagesOf: messagesOfCalls, shownPictures, calculated});
})();
