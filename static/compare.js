// Answers side by side: the same question to two to four models, steps of a training run, adapters or sets of parameters.
"use strict";

const Compare = (() => {

const {TEXT, $, element, iconButton, setText, number} = Parts;

// While the dialog is open {node, columns: [{text, reasoning, end, differs, controls}], controller, writes}; `writes`: the columns continue a text.
let compared = null;

const MOST_COLUMNS = 4;
const VARIED = ["temperature", "top_k", "seed"];      // what each column may vary, besides its model

function openCompare(node, models = stepsBeside(node)) {
  compared = {node, columns: [], controller: null, writes: false};
  $("compare-columns").replaceChildren();
  setText($("compare-problem"), withoutTools(node));
  setText($("compare-question"), node.question ?? "");
  $("compare-question").hidden = node.question === undefined;
  for (const model of models) addColumn(model, model && node.seed);
  updateCompare();
  $("compare-dialog").showModal();
}

const withoutTools = ({tools, parameters}) => tools?.length || parameters?.tools?.length ? TEXT.comparedWithoutTools : "";

// Of a training run: the answer's step, or the one before the latest, against the latest. Else twice the answer's own model.
function stepsBeside(node) {
  const chosen = Server.models.find(({id}) => id === node.model) ?? Server.chatModel(), steps = Look.stepsOfRun(chosen?.run), own = chosen?.now ?? chosen?.id;
  return steps.length > 1 ? [own === steps.at(-1) ? steps.at(-2) : own, steps.at(-1)] : [undefined, undefined];
}

// Asks several models a question that no chat has, with one seed.
function compareModels(question, models) {
  const {parameters = {}} = Settings.preferences.defaults, seed = parameters.seed ?? Math.floor(Math.random() * 2 ** 31);
  openCompare({question, model: models.at(-1), system: "", parameters, seed}, models);
  return startCompare();
}

// Whether the models are to continue a text: so does the chat of an answer, and of a question without a chat so do they if all are for texts.
function continuesTexts(node, columns) {
  if (node.question === undefined) return Server.model.api === "text";
  return columns.every(({model, adapter}) => (Server.models.find(({id}) => id === (adapter.value || model.value)) ?? Server.chatModel())?.type === "text");
}

const pathAbove = node => node.question === undefined ? Tree.pathTo(Chat.nodes, node.parent) : [{role: "user", content: node.question}];

// Adds a column with the answer's own parameters and the next seed.
function addColumn(model = compared.node.model, ownSeed = compared.node.seed + compared.columns.length) {
  const {node: {parameters = {}, seed}} = compared, values = {...parameters, seed: ownSeed};
  const column = {text: "", reasoning: "", calculator: [], end: null, differs: null}, controls = VARIED.map(name => {
    const {min, max, step} = Parameters.all.find(each => each.name === name), usual = Server.model.defaults[name];
    const field = element("input", {type: "number", min, max, step, value: values[name] ?? "", placeholder: usual ?? TEXT.default});
    return [name, field, element("label", {}, element("span", {textContent: TEXT.parameters[name]}), field)];
  });
  column.fields = Object.fromEntries(controls);
  const bases = Server.models.filter(each => Look.baseOf(each) === each), chosen = Server.models.find(({id}) => id === model) ?? Server.chatModel();
  column.model = element("select", {}, ...bases.map(optionOf));
  column.model.value = Look.baseOf(chosen)?.id;
  column.adapter = element("select");
  column.thoughts = element("div", {className: "markdown thoughts"});
  column.answer = element("div", {className: "markdown"});
  column.body = element("div", {className: "compared"}, column.thoughts, column.answer);
  column.about = element("p", {className: "hint"});
  column.choose = element("button", {type: "button", className: "plain", textContent: TEXT.goOnWithThis, onclick: () => goOnWith(column)});
  column.remove = iconButton(TEXT.removeColumn, "close", () => { compared.columns = compared.columns.filter(each => each !== column); column.node.remove(); updateCompare(); });
  const models = element("label", {hidden: bases.length < 2}, element("span", {textContent: TEXT.model}), column.model);
  const [steps, showSteps] = stepsOf(column), [adapters, showAdapters] = adaptersOf(column);
  column.model.onchange = () => { showSteps(); showAdapters(); };
  showAdapters(chosen?.id);
  column.node = element("section", {}, column.remove, models, steps, adapters, element("div", {className: "grid"}, ...controls.map(each => each[2])),
    column.about, column.body, column.choose);
  // columns that differ otherwise share the seed, unless the reader changes it
  column.node.oninput = ({target}) => {
    column.ownSeed ||= target === column.fields.seed;
    if (!column.ownSeed) column.fields.seed.value = seed;
  };
  compared.columns.push(column);
  $("compare-columns").append(column.node);
}

const optionOf = ({id, state: loaded}) => element("option", {value: id, textContent: id, disabled: loaded === "failed"});

// A list of the model's adapters, if it has any: [label, function that shows it].
function adaptersOf({model, adapter}) {
  const label = element("label", {}, element("span", {textContent: TEXT.adapter}), adapter);
  const show = (chosen = "") => {
    const listed = Server.models.filter(each => Look.baseOf(each) !== each && Look.baseOf(each).id === model.value);
    label.hidden = !listed.length;
    adapter.replaceChildren(element("option", {value: "", textContent: TEXT.none}), ...listed.map(optionOf));
    adapter.value = listed.some(({id}) => id === chosen) ? chosen : "";
  };
  return [label, show];
}

// For a step of a training run, a slider over the run's steps: [label, function that shows it].
function stepsOf(column) {
  const slider = element("input", {type: "range", min: 0, step: 1}), label = element("label", {}, element("span", {textContent: TEXT.step}), slider);
  const ownSteps = () => Look.stepsOfRun(Server.models.find(({id}) => id === column.model.value)?.run);
  const show = () => {
    const steps = ownSteps();
    label.hidden = steps.length < 2;
    slider.max = steps.length - 1;
    slider.value = steps.indexOf(Server.models.find(({id}) => id === column.model.value)?.now ?? column.model.value);
    slider.setAttribute("aria-valuetext", column.model.value);
  };
  slider.oninput = () => { column.model.value = ownSteps()[slider.value]; show(); };
  show();
  return [label, show];
}

function updateCompare() {
  const {columns, controller} = compared;
  columns.forEach((column, i) => {
    column.node.setAttribute("aria-label", TEXT.column(i + 1));
    column.remove.hidden = columns.length < 3 || Boolean(controller);
    column.choose.hidden = !column.end || column.end.error;
    setText(column.about, aboutColumn(column, columns[0]));
    drawCompared(column, columns[0]);
  });
  $("add-column").disabled = columns.length >= MOST_COLUMNS || Boolean(controller);
  $("compare-columns").dataset.enter = controller ? "" : "start-compare";
  $("start-compare").textContent = controller ? TEXT.stop : TEXT.compare;
}

const wholeText = ({reasoning, text}) => [reasoning, text].filter(Boolean).join("\n\n");
const hasEnded = ({end}) => Boolean(end) && !end.error;

// What a column waits for, or how its answer compares to the first column's.
function aboutColumn(column, first) {
  const {end, differs, model, adapter} = column, wanted = adapter.value || model.value, entry = Server.models.find(({id}) => id === wanted);
  if (!end && !wholeText(column)) return !compared.controller ? "" : entry?.state === "loading" ? TEXT.loadingModel(wanted, entry.loading) : TEXT.waitingForFirst;
  const same = column !== first && hasEnded(column) && hasEnded(first) && (wholeText(column) === wholeText(first) ? TEXT.identical : TEXT.sameSoFar);
  return [end?.error?.message, end?.model, differs ? TEXT.differsFrom(differs) : same].filter(Boolean).join(" · ");
}

// Draws a column's text as it grows. When it and the first column have ended, the characters in which they differ are marked.
function drawCompared(column, first) {
  const ended = hasEnded(column) || !compared.controller, marks = Boolean(column.differs && hasEnded(column) && hasEnded(first)), key = `${marks} ${ended} ${column.calculator.length} ${wholeText(column)}`;
  if (column.drawn === key) return;
  column.drawn = key;
  for (const [box, content, calculator] of [[column.thoughts, column.reasoning], [column.answer, column.text, column.calculator]]) {
    if (compared.writes) { box.replaceChildren(...Calculator.plainWithCards({content, calculator})); box.style.whiteSpace = "pre-wrap"; continue; }
    if (!box.markdown || marks) box.markdown = new Markdown.View(box);
    box.markdown.update(content, ended, calculator);
  }
  if (marks) markDifferences(column.body, first.body);
  if (marks && typeof hljs === "undefined" && !column.plainCode && column.body.querySelector("pre")) {
    column.plainCode = true;                             // to be highlighted draws it anew, without marks
    Parts.need("highlight").then(() => { column.drawn = undefined; if (compared) updateCompare(); });
  }
}

// The text nodes of drawn Markdown, but not buttons and the sources of formulas; null where a block ends.
function drawnText(root) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT), found = [], block = node => node.parentElement.closest("p, li, td, th, h1, h2, h3, h4, h5, h6, pre, summary, div");
  for (let node, last = null; (node = walker.nextNode());) {
    if (node.parentElement.closest(".code-bar, annotation")) continue;
    if (last && block(last) !== block(node)) found.push(null);
    found.push(last = node);
  }
  return found;
}

const textOfNodes = nodes => nodes.map(node => node?.data ?? "\n").join("");

function markDifferences(own, other) {
  const nodes = drawnText(own), marked = [];
  let start = 0;
  for (const [part, differs] of differing(textOfNodes(nodes), textOfNodes(drawnText(other)))) {
    if (differs) marked.push([start, start + part.length]);
    start += part.length;
  }
  start = 0;
  for (const node of nodes) {
    const begin = start, length = node?.data.length ?? 1;
    start += length;
    if (!node) continue;
    for (const [from, to] of marked.filter(([from, to]) => from < begin + length && to > begin).reverse()) mark(node, Math.max(0, from - begin), Math.min(length, to - begin));
  }
}

// Marks characters of a text node; of a formula, all of it.
function mark(node, from, to) {
  const formula = node.parentElement.closest("math"), range = document.createRange();
  if (formula?.closest("mark")) return;
  if (formula) range.selectNode(formula);
  else { range.setStart(node, from); range.setEnd(node, to); }
  range.surroundContents(element("mark"));
}

const MOST_CELLS = 4e6;           // of the table that compares two texts word by word

// The parts of a text, [part, whether it differs from the other text].
function differing(text, other) {
  const [own, others] = [text, other].map(each => each.match(/[\p{L}\p{N}]+|\s+|[^]/gu) ?? []), parts = [];
  let start = 0, end = 0;
  while (start < Math.min(own.length, others.length) && own[start] === others[start]) start++;
  while (end < Math.min(own.length, others.length) - start && own.at(-1 - end) === others.at(-1 - end)) end++;
  const words = own.slice(start, own.length - end), theirs = others.slice(start, others.length - end), wide = theirs.length + 1;
  parts.push([own.slice(0, start).join(""), false]);
  const table = words.length * wide <= MOST_CELLS ? new Uint16Array((words.length + 1) * wide) : null;       // the most words in common from here on
  for (let i = words.length - 1; table && i >= 0; i--) {
    for (let j = theirs.length - 1; j >= 0; j--) {
      table[i * wide + j] = words[i] === theirs[j] ? table[(i + 1) * wide + j + 1] + 1 : Math.max(table[(i + 1) * wide + j], table[i * wide + j + 1]);
    }
  }
  let mine = "", lost = "";                      // what stands in one text and in the other between two common words
  const close = () => { parts.push(...changedPart(mine, lost)); mine = lost = ""; };
  for (let i = 0, j = 0; i < words.length || j < theirs.length;) {
    if (table && i < words.length && words[i] === theirs[j]) { close(); parts.push([words[i], false]); i++; j++; }
    else if (i < words.length && (j >= theirs.length || !table || table[(i + 1) * wide + j] >= table[i * wide + j + 1])) mine += words[i++];
    else lost += theirs[j++];
  }
  close();
  return [...parts, [own.slice(own.length - end).join(""), false]].filter(([part]) => part);
}

// Of a part that replaces another, only the characters that differ.
function changedPart(mine, lost) {
  const [own, others] = [[...mine], [...lost]], most = Math.min(own.length, others.length);
  let start = 0, end = 0;
  while (start < most && own[start] === others[start]) start++;
  while (end < most - start && own.at(-1 - end) === others.at(-1 - end)) end++;
  return [[own.slice(0, start).join(""), false], [own.slice(start, own.length - end).join(""), true], [own.slice(own.length - end).join(""), false]];
}

async function startCompare() {
  if (compared.controller) return compared.controller.abort();
  const wrong = compared.columns.map(wrongField).find(Boolean);
  if (wrong) { setText($("compare-problem"), wrong); return undefined; }
  const mine = compared, {node, columns} = mine, controller = mine.controller = new AbortController();
  for (const column of columns) Object.assign(column, {text: "", reasoning: "", calculator: [], end: null, differs: null, drawn: undefined});
  setText($("compare-problem"), withoutTools(node));
  mine.writes = continuesTexts(node, columns);
  updateCompare();
  const {messages, parameters: all} = await Chat.requestOf(node, pathAbove(node)), {tools, tool_choice, response_format, seed, ...parameters} = all, watch = setInterval(Server.lookAtModels, 1000);       // for steps that load
  const variants = columns.map(({model, adapter, fields}) => ({...(Server.models.length > 1 ? {model: adapter.value || model.value} : {}),
    ...Object.fromEntries(VARIED.filter(name => fields[name].value !== "").map(name => [name, Number(fields[name].value)]))}));
  try {
    const asked = mine.writes ? {prompt: Server.textToContinue(pathAbove(node))} : {messages: [...messages]};
    const response = await Server.accepted(await Server.post("v1/compare", {...asked, ...parameters, truncate: "oldest", variants}, {signal: controller.signal}));
    for await (const {event} of Server.events(response.body, Server.FOREVER_MS)) {
      if (event.error && event.index === undefined) throw new Server.Refused(Server.sentence(Server.errorText(event)), {status: 0});
      hearCompared(columns, event);
      if (mine === compared) updateCompare();
    }
  } catch (error) {
    if (mine === compared && error.name !== "AbortError") setText($("compare-problem"), error.message);
  }
  clearInterval(watch);
  mine.controller = null;
  if (mine === compared) updateCompare();
  return undefined;
}

// What is wrong with a field of a column; "" if nothing is. The dialog closes in any case.
function wrongField({fields}, i) {
  for (const name of VARIED) {
    const parameter = Parameters.all.find(each => each.name === name), {value, validity} = fields[name];
    const wrong = validity.badInput || value !== "" && Tree.parameterValue(parameter, value) === undefined;
    fields[name].setAttribute("aria-invalid", wrong);
    if (wrong) return `${TEXT.column(i + 1)}, ${TEXT.parameters[name]}: ${TEXT.badField(parameter)}`;
  }
  return "";
}

function hearCompared(columns, {index, differs, token = "", reasoning = "", calculator = [], finish_reason: reason, ...end}) {
  if (differs) columns[differs.index].differs = differs;
  const column = columns[index];
  if (!column) return;
  column.text += token;
  column.reasoning += reasoning;
  column.calculator.push(...Calculator.callsOf([calculator].flat()));
  if (reason) column.end = {...end, reason};
}

// Turns a column into an answer of the chat, a sibling of the one compared, or into a chat with it.
function goOnWith({text, reasoning, calculator, end, fields}) {
  const {node} = compared, parameters = {...node.parameters};
  if (node.question !== undefined) {
    Chat.openNew();
    Chat.change(Chat.current, {model: end.model});
    node.parent = Chat.addNode(null, "user", node.question).id;
    Server.useModel();
  }
  for (const name of VARIED) if (name !== "seed" && fields[name].value !== "") parameters[name] = Number(fields[name].value);
  const made = Chat.addNode(node.parent, "assistant", text, {...Look.madeBy({system: Look.systemOf(node)}, {model: end.model, weights: Look.weightsOf(end.model), system: Look.systemOf(node)}), ...Look.askedWith(node), parameters, seed: end.seed,
    ...(reasoning ? {reasoning} : {}), ...(calculator.length ? {calculator} : {}), timings: {...end.timings, ...end.usage, finish_reason: end.reason}});
  $("compare-dialog").close();
  Chat.showLeaf(made.id);
}

Parts.register({
  strings: {
    comparedWithoutTools: "The models are asked without the tools of this answer.",
    identical: "Identical to the first answer.",
    sameSoFar: "The same as the first answer, as far as both go.", addColumn: "Add a column",
    removeColumn: "Remove the column", goOnWithThis: "Continue with this", adapter: "Adapter", column: count => `Answer ${count}`,
    differsFrom: ({position, probabilities: [first, own] = []}) => `Differs from token ${number(position + 1)} on: ${[["the first answer's token", "the first answer", first], ["this one's", "this one", own]].map(([token, answer, share], i) =>
      typeof share === "number" ? `${token} had ${i ? "" : "a probability of "}${TEXT.share(share)}` : `${answer} ended there`).join(", ")}.`,
  },
  bind() {
    $("add-column").onclick = () => { addColumn(); updateCompare(); };
    $("start-compare").onclick = startCompare;
    $("compare-dialog").onclose = () => { compared?.controller?.abort(); compared = null; };
  },
  render() { if (compared) updateCompare(); },
});

return Object.freeze({open: openCompare, compareModels, get shown() { return compared; }});
})();
