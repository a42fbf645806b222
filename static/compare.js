// The same question to several models, or with other parameters: answers side by side, written at the same time by /v1/compare.
"use strict";

const MOST_COLUMNS = 4;
const VARIED = ["temperature", "top_k", "seed"];      // what a column may have of its own, beside its model

let compared = null;              // {node, columns: [{text, reasoning, end, differs, controls}], controller} while the dialog is open

function openCompare(node) {
  compared = {node, columns: [], controller: null};
  $("compare-columns").replaceChildren();
  setText($("compare-problem"), "");
  addColumn();
  addColumn();
  updateCompare();
  $("compare-dialog").showModal();
}

// One more column: as the answer was made, with the next seed.
function addColumn() {
  const {node: {parameters = {}, model, seed}, columns} = compared, values = {...parameters, seed: seed + columns.length};
  const column = {text: "", reasoning: "", end: null, differs: null}, controls = VARIED.map(name => {
    const {min, max, step} = PARAMETERS.find(each => each.name === name), usual = state.model.defaults[name];
    const field = element("input", {type: "number", min, max, step, value: values[name] ?? "", placeholder: usual ?? TEXT.default});
    return [name, field, element("label", {}, element("span", {textContent: TEXT.parameters[name]}), field)];
  });
  column.fields = Object.fromEntries(controls);
  const bases = state.models.filter(each => baseOf(each) === each), chosen = state.models.find(({id}) => id === model) ?? chatModel();
  column.model = element("select", {}, ...bases.map(optionOf));
  column.model.value = baseOf(chosen)?.id;
  column.adapter = element("select");
  column.body = element("div", {className: "compared", dir: "auto"});
  column.about = element("p", {className: "hint"});
  column.choose = element("button", {type: "button", className: "plain", textContent: TEXT.goOnWithThis, onclick: () => goOnWith(column)});
  column.remove = iconButton(TEXT.removeColumn, "close", () => { compared.columns = compared.columns.filter(each => each !== column); column.node.remove(); updateCompare(); });
  const models = element("label", {hidden: bases.length < 2}, element("span", {textContent: TEXT.model}), column.model);
  const [steps, showSteps] = stepsOf(column), [adapters, showAdapters] = adaptersOf(column);
  column.model.onchange = () => { showSteps(); showAdapters(); };
  showAdapters(chosen?.id);
  column.node = element("section", {}, column.remove, models, steps, adapters, element("div", {className: "grid"}, ...controls.map(each => each[2])),
    column.about, column.body, column.choose);
  // what differs by something else is drawn with the same noise, unless the reader says otherwise
  column.node.oninput = ({target}) => {
    column.ownSeed ||= target === column.fields.seed;
    if (!column.ownSeed) column.fields.seed.value = seed;
  };
  compared.columns.push(column);
  $("compare-columns").append(column.node);
}

// The model that an adapter changes, where it is listed; else the model itself.
const baseOf = model => model?.parent && state.models.find(({id, root, parent}) => !parent && [id, root].includes(model.parent)) || model;

const optionOf = ({id, state: its}) => element("option", {value: id, textContent: id, disabled: its === "failed"});

// A choice among the adapters of a model that has some: [label, function that shows it].
function adaptersOf({model, adapter}) {
  const label = element("label", {}, element("span", {textContent: TEXT.adapter}), adapter);
  const show = (chosen = "") => {
    const its = state.models.filter(each => baseOf(each) !== each && baseOf(each).id === model.value);
    label.hidden = !its.length;
    adapter.replaceChildren(element("option", {value: "", textContent: TEXT.none}), ...its.map(optionOf));
    adapter.value = its.some(({id}) => id === chosen) ? chosen : "";
  };
  return [label, show];
}

// Of a model that is a step of a training run, a slider over the run's steps: [label, function that shows it].
function stepsOf(column) {
  const slider = element("input", {type: "range", min: 0, step: 1}), label = element("label", {}, element("span", {textContent: TEXT.step}), slider);
  const run = () => {
    const its = state.models.find(({id}) => id === column.model.value)?.run;
    return its ? state.models.filter(each => each.run === its && !each.now).sort((a, b) => a.step - b.step).map(({id}) => id) : [];
  };
  const show = () => {
    const steps = run();
    label.hidden = steps.length < 2;
    slider.max = steps.length - 1;
    slider.value = steps.indexOf(state.models.find(({id}) => id === column.model.value)?.now ?? column.model.value);
    slider.setAttribute("aria-valuetext", column.model.value);
  };
  slider.oninput = () => { column.model.value = run()[slider.value]; show(); };
  show();
  return [label, show];
}

function updateCompare() {
  const {columns, controller} = compared;
  columns.forEach((column, i) => {
    column.node.setAttribute("aria-label", TEXT.column(i + 1));
    column.remove.hidden = columns.length < 3 || Boolean(controller);
    column.choose.hidden = !column.end || column.end.error;
    setText(column.about, [column.end?.error?.message, column.end?.model, column.differs && TEXT.differsFrom(column.differs)].filter(Boolean).join(" · "));
    drawCompared(column, columns[0]);
  });
  $("add-column").disabled = columns.length >= MOST_COLUMNS || Boolean(controller);
  $("start-compare").textContent = controller ? TEXT.stop : TEXT.compare;
}

// A column's text; where it leaves the first one's, its next word is marked.
function drawCompared({body, text, reasoning, differs}, first) {
  const all = [reasoning, text].filter(Boolean).join("\n\n"), other = [first.reasoning, first.text].filter(Boolean).join("\n\n");
  let at = 0;
  while (at < all.length && all[at] === other[at]) at++;
  const start = all.lastIndexOf(" ", at - 1) + 1, word = /^\s*\S*/.exec(all.slice(start))[0];
  body.replaceChildren(...(differs && word ? [all.slice(0, start), element("mark", {textContent: word}), all.slice(start + word.length)] : [all]));
}

async function startCompare() {
  if (compared.controller) return compared.controller.abort();
  const mine = compared, {node, columns} = mine, controller = mine.controller = new AbortController();
  for (const column of columns) Object.assign(column, {text: "", reasoning: "", end: null, differs: null});
  setText($("compare-problem"), "");
  updateCompare();
  const {tools, response_format, seed, ...parameters} = node.parameters ?? {};
  const variants = columns.map(({model, adapter, fields}) => ({...(state.models.length > 1 ? {model: adapter.value || model.value} : {}),
    ...Object.fromEntries(VARIED.filter(name => fields[name].value !== "").map(name => [name, Number(fields[name].value)]))}));
  try {
    const messages = messagesToSend(pathTo(state.nodes, node.parent), systemOf(node));
    const response = await accepted(await post("v1/compare", {messages: [...messages], ...parameters, truncate: "oldest", variants}, {signal: controller.signal}));
    for await (const {event} of serverEvents(response.body, FOREVER_MS)) {
      if (event.error && event.index === undefined) throw new Refused(sentence(errorText(event)), {status: 0});
      hearCompared(columns, event);
      if (mine === compared) updateCompare();
    }
  } catch (error) {
    if (mine === compared && error.name !== "AbortError") setText($("compare-problem"), error.message);
  }
  mine.controller = null;
  if (mine === compared) updateCompare();
  return undefined;
}

function hearCompared(columns, {index, differs, token = "", reasoning = "", finish_reason: reason, ...end}) {
  if (differs) columns[differs.index].differs = differs;
  const column = columns[index];
  if (!column) return;
  column.text += token;
  column.reasoning += reasoning;
  if (reason) column.end = {...end, reason};
}

// Makes a column an answer of the chat, beside the one that was compared.
function goOnWith({text, reasoning, end, fields}) {
  const {node} = compared, parameters = {...node.parameters};
  for (const name of VARIED) if (name !== "seed" && fields[name].value !== "") parameters[name] = Number(fields[name].value);
  const made = addNode(node.parent, "assistant", text, {...madeBy({system: systemOf(node)}, {model: end.model, weights: weightsOf(end.model), system: systemOf(node)}), parameters, seed: end.seed,
    ...(reasoning ? {reasoning} : {}), timings: {...end.timings, ...end.usage, finish_reason: end.reason}});
  $("compare-dialog").close();
  showLeaf(made.id);
}
