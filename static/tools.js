// Functions that the model may call, the format of its answers, and how long it thinks: settings of a chat, and the cards of calls.
"use strict";

const CALCULATOR = {type: "function", function: {name: "calculator", description: "Works out + - * / and parentheses.",
  parameters: {type: "object", properties: {expression: {type: "string"}}, required: ["expression"]}}};
const BUDGETS = [0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, null];   // places of the slider; null: no limit

const budgetPlace = budget => BUDGETS.findIndex(each => each === null || each >= (budget ?? Infinity));

// What a text says as functions: {tools} or {problem}. Functions as OpenAI has them, or without what is around them.
function readFunctions(text) {
  if (!text.trim()) return {tools: []};
  const found = readJson(text), listed = found.value === undefined ? [] : [found.value].flat();
  const tools = listed.map(each => isObject(each?.function) ? {...each, type: "function"} : {type: "function", function: each});
  const wrong = tools.findIndex(({function: its}) => !isObject(its) || !/^[\w.-]{1,64}$/.test(its.name ?? "") || !isObject(its.parameters ?? {}));
  return found.problem ? found : wrong >= 0 ? {problem: TEXT.badFunction(wrong + 1)} : {tools};
}

// What a text says as a format: {format}, undefined for none, or {problem}.
function readSchema(text) {
  if (!text.trim()) return {};
  const {value, problem} = readJson(text);
  return problem ? {problem} : !isObject(value) ? {problem: TEXT.badSchema}
    : {format: value.type === "json_object" || value.type === "json_schema" ? value : {type: "json_schema", json_schema: {name: "answer", schema: value}}};
}

function readJson(text) {
  try {
    return {value: JSON.parse(text)};
  } catch (error) {
    return {problem: TEXT.notValidJson(error.message)};
  }
}

const schemaText = format => format ? JSON.stringify(format.json_schema?.schema ?? format, null, 2) : "";
const functionsText = tools => tools?.length ? JSON.stringify(tools.map(({function: its}) => its), null, 2) : "";

const checking = newest();

// What is written in the settings as parameters. The server then checks what the page cannot: a schema that cannot be enforced.
function takeTools() {
  const {tools, problem: first} = readFunctions($("functions").value), {format, problem: second} = readSchema($("schema").value), {parameters} = state.chat;
  setText($("functions-problem"), first ?? "");
  setText($("schema-problem"), second ?? "");
  const place = Number($("budget").value);
  // a budget between two places, which /budget may set, stays until the slider is moved
  const budget = place === budgetPlace(parameters.thinking_budget) ? parameters.thinking_budget ?? null : BUDGETS[place], kept = {tools: first ? parameters.tools : tools, response_format: second ? parameters.response_format : format};
  showBudget(budget);
  checking();                                            // what is under way is about other words
  if (!first && !second && (tools.length || format)) checkTools({...(tools.length ? {tools} : {}), ...(format ? {response_format: format} : {})});
  return {...(kept.tools?.length ? {tools: kept.tools} : {}), ...(kept.response_format ? {response_format: kept.response_format} : {}),
    ...(budget === null ? {} : {thinking_budget: budget})};
}

async function checkTools(wanted) {
  const isMine = checking();
  await wait(500);
  if (!isMine() || state.phase !== "ready") return;
  const asked = await post(ROUTES.v1, {messages: [{role: "user", content: "a"}], max_tokens: 1, priority: "low", ...wanted, ...modelOfSeveral()}).catch(() => null);
  const problem = asked?.status === 400 ? (await errorOf(asked)).message : "";
  if (isMine() && problem) setText($(wanted.response_format ? "schema-problem" : "functions-problem"), problem);
}

function showTools() {
  checking();
  const {parameters} = state.chat, {can, api} = state.model;
  $("functions").value = functionsText(parameters.tools);
  $("schema").value = schemaText(parameters.response_format);
  setText($("functions-problem"), "");
  setText($("schema-problem"), "");
  $("tools-settings").hidden = api !== "v1" || !can.tools && !can.json_schema;
  $("functions").closest("label").hidden = $("add-calculator").hidden = !can.tools;
  $("schema").closest("label").hidden = !can.json_schema;
  $("tools-settings").open = Boolean(parameters.tools || parameters.response_format);
  $("budget").closest("label").hidden = !can.reasoning_budget;
  $("budget").value = budgetPlace(parameters.thinking_budget);
  showBudget(parameters.thinking_budget ?? null);
}

function showBudget(budget) {
  const text = budget === null ? TEXT.noLimit : TEXT.tokens(budget);
  setText($("budget-text"), text);
  $("budget").setAttribute("aria-valuetext", text);
}

function addCalculator() {
  const {tools = []} = readFunctions($("functions").value);
  $("functions").value = functionsText([...tools.filter(each => each.function.name !== "calculator"), CALCULATOR]);
  $("functions").dispatchEvent(new Event("input", {bubbles: true}));
}

// calls -----------------------------------------------------------------------------------------------------------------

// Adds what an event says of calls to those of an answer.
function growCalls(node, news) {
  for (const {index = 0, id, function: its = {}} of news) {
    const calls = node.calls ??= [], call = calls[index] ??= {id: id ?? newId(), name: "", arguments: ""};
    call.name ||= its.name ?? "";
    call.arguments += its.arguments ?? "";
  }
}

// Calls whose results are not sent yet hold the chat up only for the model: a new question goes without them.
const isAnswered = ({calls}) => Boolean(calls?.every(({result}) => result !== undefined));

function messagesOfCalls({content, calls}) {
  return [{role: "assistant", content, tool_calls: calls.map(({id, name, arguments: its}) => ({id, type: "function", function: {name, arguments: its}}))},
    ...calls.map(({id, result}) => ({role: "tool", tool_call_id: id, content: result}))];
}

function updateCalls(view, growing) {
  const {node} = view, key = JSON.stringify([node.calls ?? [], growing]);
  if (view.callsDrawn === key) return;
  view.callsDrawn = key;
  view.calls ??= element("div", {className: "calls"});
  if (!view.calls.isConnected) view.nothing.before(view.calls);
  const calls = node.calls ?? [], cards = calls.map(call => cardOf(call, growing)), fields = cards.map(card => card.field);
  view.calls.replaceChildren(...cards.map(card => card.node));
  if (growing || !calls.length || isAnswered(node)) return;
  view.calls.append(element("button", {type: "button", className: "primary", textContent: TEXT.sendResults, onclick: () => {
    calls.forEach((call, i) => { call.result = fields[i].value; });
    store.change("nodes", node.id, {calls});
    answer(node, (error, made) => { removeNodes([made.id], node.id); state.refusal = error.message; return true; });
    focusAfterClick();
  }}));
}

function cardOf(call, growing) {
  let shownArguments = call.arguments;
  try { shownArguments = JSON.stringify(JSON.parse(call.arguments), null, 2); } catch (error) { /* not complete */ }
  const node = element("section", {className: "card"}, element("p", {className: "icon i-function", textContent: call.name}), codeBlock("json", shownArguments));
  node.setAttribute("aria-label", TEXT.callOf(call.name));
  if (growing) return {node};
  if (call.result !== undefined) {
    node.append(element("p", {className: "hint", textContent: TEXT.result}), element("pre", {textContent: call.result, tabIndex: 0}));
    return {node};
  }
  const field = element("textarea", {rows: 2, value: call.name === "calculator" ? calculated(call.arguments) : ""});
  node.append(element("label", {}, element("span", {textContent: TEXT.result}), field));
  return {node, field};
}

// The value of {"expression": "2 * (3 + 4)"}; "" if it is none.
function calculated(text) {
  const {value} = readJson(text), parts = String(value?.expression ?? "").replace(/,/g, "").match(/\d+\.?\d*(?:e[+-]?\d+)?|\.\d+|[-+*/()]|\S/gi) ?? [];
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
