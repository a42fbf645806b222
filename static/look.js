// Looking inside an answer: the probability of each token, replays, comparisons, and the prompt behind it.
//
// An answer stores its inputs (seed, parameters, system prompt, weights, token ids), so that the same request can be sent
// again: a replay. The token lens is a replay that asks for log-probabilities; "Check that it repeats" compares its tokens.
"use strict";

let compared = null;              // {node, columns: [{text, reasoning, end, differs, controls}], controller} while the dialog is open

{

const BESIDE = 5;                 // alternatives listed for each token
const SHADES = [0.8, 0.5, 0.2, 0.05];         // class p1 .. p4: how many of these exceed a token's probability
const lenses = new Map();         // id of a node -> {tokens, at, text, controller}, while its lens is on

const canLook = node => Number.isSafeInteger(node.seed) && !node.edited && !isGrowing(node) && state.model.api !== "none" &&
  Boolean(state.model.can.token_ids);

// The inputs of an answer besides its parameters.
const madeBy = (chat, more = {}) => ({model: state.model.name, ...(state.model.weights ? {weights: state.model.weights} : {}),
  ...(chat.system.trim() ? {system: chat.system} : {}), ...more});

// The digest of a listed model's weights.
const weightsOf = name => state.models.find(({id}) => id === name)?.weights_digest ?? state.model.weights;

// An answer's system prompt; answers from older versions of the page lack it.
const systemOf = ({system, ids}) => system ?? (ids ? "" : state.chat.system);

// replays -------------------------------------------------------------------------------------------------------------

// Generates an answer again with the same inputs: {ids, entries, text, reasoning}. A stopped answer ends where it was stopped.
async function replay(node, {more = {}, signal, onToken = () => {}}) {
  const {parameters = {}, continued, prefix, seed, model, note, ids: before} = node, {max_tokens: most, ...others} = parameters;
  const messages = messagesToSend(pathTo(state.nodes, node.parent), systemOf(node));
  const stop = new AbortController(), made = {ids: [...prefix ?? []], entries: [], text: "", reasoning: ""};
  const response = await postAnswer({messages, id: newId(), signal: AbortSignal.any([signal, stop.signal]), model,
    parameters: {...others, ...(most && !continued ? {max_tokens: most} : {}), seed, ...(prefix ? {prefix_token_ids: prefix} : {}),
      resumable: false, progress: false, ...more}});
  for await (const {event} of serverEvents(response.body, FOREVER_MS)) {
    const {text, reasoning, ids, logprobs} = readEvent(event);
    made.text += text;
    made.reasoning += reasoning;
    made.ids.push(...ids);
    made.entries.push(...logprobs);
    onToken(made.ids.length);
    if ((note || continued) && before?.length && made.ids.length >= before.length) {
      stop.abort();
      made.ids.length = before.length;
      break;
    }
  }
  return made;
}

// The text of each token; a character split across tokens goes to its last one: [{id, text, special}]. Throws what postAnswer does.
async function piecesOf(ids, model) {
  const response = await accepted(await post("tokenize", {content: ids, with_pieces: true, ...modelOfSeveral(model)}));
  return spelled((await response.json()).tokens);
}

function spelled(tokens) {
  const decoder = new TextDecoder(), encoder = new TextEncoder();
  return tokens.map(({id, piece, special = false}) => ({id, special,
    text: decoder.decode(isText(piece) ? encoder.encode(piece) : new Uint8Array(piece), {stream: true})}));
}

// Replays the answer and reports whether its tokens are the same; a different answer is kept as a sibling.
async function runAgain(view) {
  const {node} = view, {chat} = state, controller = new AbortController();
  view.checking = true;
  const report = text => { node.verdict = text; setText(view.verdict, text); };
  try {
    const made = await replay(node, {signal: controller.signal, onToken: count => report(TEXT.runningAgain(count))});
    const at = await firstDifference(node, made), other = node.weights && node.weights !== weightsOf(node.model) ? TEXT.otherWeights : "";
    report([at === null ? TEXT.sameAgain(made.ids.length) : TEXT.differsAt(at), other].filter(Boolean).join(" "));
    if (at !== null && state.chat.id === chat.id) keepBeside(node, made);
  } catch (error) {
    report(error.message);
  }
  announce(node.verdict);
  view.checking = false;
}

// Where a replay first differs from the answer: {at, was, is}, `at` counted from 1; null if it is the same.
async function firstDifference({ids, content, reasoning = "", model}, made) {
  if (!ids?.length) return content === made.text && reasoning === made.reasoning ? null : {at: 0, was: "", is: ""};
  const at = made.ids.findIndex((id, i) => id !== ids[i]), first = at < 0 ? made.ids.length : at;
  if (at < 0 && made.ids.length === ids.length) return null;
  const [was, is] = await Promise.all([ids, made.ids].map(each => first < each.length ? piecesOf([each[first]], model) : []));
  return {at: first + 1, was: was[0]?.text ?? "", is: is[0]?.text ?? ""};
}

function keepBeside(node, {text, reasoning, ids}) {
  const {leaf} = state, {parameters, seed, prefix} = node, system = systemOf(node);
  addNode(node.parent, "assistant", text, {...madeBy({system}), ids, parameters, seed, ...(prefix ? {prefix} : {}), ...(reasoning ? {reasoning} : {})});
  showLeaf(leaf);
}

// the lens ------------------------------------------------------------------------------------------------------------

function toggleLens(view) {
  const {node} = view, on = lenses.get(node.id);
  if (on) {
    on.controller.abort();
    lenses.delete(node.id);
  } else lookThrough(node);
  updateAnswer(view);
}

async function lookThrough(node) {
  const lens = {tokens: [], at: -1, text: TEXT.reading(0), controller: new AbortController(), drawn: null};
  const show = () => { const view = views.get(node.id); if (lenses.get(node.id) === lens && view?.complete) updateLens(view); };
  lenses.set(node.id, lens);
  try {
    const forced = forcedEntries(node), made = await replay(node, {more: state.model.api === "text" ? {logprobs: BESIDE + 1} : {logprobs: true, top_logprobs: BESIDE + 1}, signal: lens.controller.signal,
      onToken: count => { lens.text = TEXT.looking(count); show(); }});
    const at = node.ids?.length ? await firstDifference(node, made) : null;
    lens.tokens = joined(await piecesOf(made.ids, node.model), [...await forced, ...made.entries]);
    lens.text = at ? TEXT.differsAt(at) : TEXT.lensHint;
  } catch (error) {
    if (error.name === "AbortError") return;
    lens.text = error.message;
  }
  show();
}

// Log-probabilities of an answer's forced first tokens. They were not sampled, so the model reads them as a prompt.
async function forcedEntries(node) {
  const {prefix = [], model} = node, {tokens} = prefix.length ? await promptOf(node) : {};
  if (!tokens) return [];
  const read = await jsonOf(post(ROUTES.text, {prompt: [...tokens.map(({id}) => id), ...prefix], max_tokens: 0, echo: true, logprobs: BESIDE + 1,
    return_token_ids: true, ...modelOfSeveral(model)}));
  return read?.choices?.[0]?.logprobs?.content?.slice(-prefix.length) ?? [];
}

// Tokens with their probabilities and alternatives. The server forces some without asking the model.
function joined(tokens, entries) {
  let next = 0;
  return tokens.map(token => {
    const entry = entries[next]?.id === token.id ? entries[next++] : null;
    if (!entry) return token;
    const beside = entry.top_logprobs.filter(({id}) => id !== token.id).slice(0, BESIDE);
    return {...token, share: Math.exp(entry.logprob), beside: beside.map(({id, token: text, logprob}) => ({id, text, share: Math.exp(logprob)}))};
  });
}

function updateLens(view) {
  const {node} = view, lens = lenses.get(node.id);
  if (!view.verdict.parentNode) view.actions.before(view.verdict);
  setText(view.verdict, node.verdict ?? "");
  view.article.classList.toggle("looked-through", Boolean(lens));
  if (!lens) { view.lens?.remove(); view.lens = null; return; }
  if (!view.lens) makeLens(view);
  if (lens.drawn !== lens.tokens) drawTokens(view, lens);
  setText(view.lens.hint, lens.text);
}

function makeLens(view) {
  const list = element("div", {className: "tokens", tabIndex: 0, role: "listbox"});
  list.setAttribute("aria-label", TEXT.tokensOf);
  const close = element("button", {type: "button", className: "plain", textContent: TEXT.closeLens, onclick: () => { toggleLens(view); view.inside.focus(); }});
  const legend = element("p", {className: "legend"}, element("b", {textContent: TEXT.lensOn}), TEXT.legend,
    ...[1, ...SHADES].map((most, i) => element("span", {className: i ? `p${i}` : "", textContent: TEXT.shareRange(SHADES[i] ?? 0, most)})), close);
  view.lens = element("div", {className: "lens"}, legend, list);
  Object.assign(view.lens, {list, hint: element("p", {className: "hint"}), panel: element("div", {className: "beside"})});
  view.lens.append(view.lens.panel, view.lens.hint);
  const lens = () => lenses.get(view.node.id), at = target => target.dataset?.at === undefined ? -1 : Number(target.dataset.at);
  list.onmouseover = ({target}) => { if (mouse.matches && at(target) >= 0) chooseToken(view, lens(), at(target)); };
  list.onclick = ({target}) => { if (at(target) >= 0) chooseToken(view, lens(), at(target)); };
  list.onkeydown = event => {
    const {at: now, tokens} = lens(), to = {ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: tokens.length - 1}[event.key];
    if (to >= 0 && to < tokens.length) chooseToken(view, lens(), to);
    else if (["ArrowDown", "Enter"].includes(event.key)) view.lens.panel.querySelector("button")?.focus();
    else return;
    event.preventDefault();
  };
  view.lens.panel.onkeydown = event => {
    const buttons = [...view.lens.panel.querySelectorAll("button")], by = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1}[event.key];
    if (event.key === "ArrowUp") list.focus();
    else if (by) buttons.at((buttons.indexOf(document.activeElement) + by) % buttons.length).focus();
    else return;
    event.preventDefault();
  };
  view.body.after(view.lens);
}

const shown = text => text.replace(/\n/g, "↵\n");

function drawTokens({lens: {list, panel}, node}, lens) {
  lens.drawn = lens.tokens;
  list.replaceChildren(...lens.tokens.map(({text, special, share}, i) => {
    const shade = share === undefined ? 0 : SHADES.filter(most => share < most).length;
    const option = element("span", {id: `${node.id}-${i}`, role: "option", textContent: shown(text) || "·",
      className: `${shade ? `p${shade}` : ""}${special ? " special" : ""}`});
    option.dataset.at = i;
    option.setAttribute("aria-selected", "false");
    if (!text.trim()) option.setAttribute("aria-label", quoted(text));
    return option;
  }));
  panel.replaceChildren();
}

const quoted = text => `“${text.replace(/\n/g, "↵")}”`;

// Shows a token's id, its probability and its alternatives; each alternative starts another answer.
function chooseToken(view, lens, at) {
  const {list, panel} = view.lens, {id, text, share, beside = []} = lens.tokens[at];
  list.children[lens.at]?.setAttribute("aria-selected", "false");
  lens.at = at;
  list.children[at].setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", list.children[at].id);
  const about = [quoted(text), TEXT.tokenId(id), share === undefined ? TEXT.notDrawn : TEXT.share(share)].join(" · ");
  panel.replaceChildren(element("p", {textContent: about}), ...beside.map(other => {
    const made = element("button", {type: "button", className: "plain", disabled: !canAsk(), title: TEXT.tokenId(other.id),
      onclick: () => branchAt(view.node, lens, at, other)}, element("span", {textContent: quoted(other.text)}), element("small", {textContent: TEXT.share(other.share)}));
    made.setAttribute("aria-label", TEXT.goOnWith(quoted(other.text), TEXT.share(other.share)));
    return made;
  }));
}

// Starts another answer to the same question, with this token at this position and otherwise the same inputs.
function branchAt(node, {tokens}, at, {id}) {
  const {parameters = {}, seed} = node, prefix = [...tokens.slice(0, at).map(token => token.id), id];
  answerAgain(state.nodes.get(node.parent), {prefix, ids: [...prefix], parameters: {...parameters, seed}, system: systemOf(node)});
}

register({
  strings: {
    lens: "Token lens", on: "on", lensOn: "Token lens: on.", legend: "Probability of each token:", closeLens: "Close the lens",
    shareRange: (least, most) => most === 1 ? `${100 * least}\u00a0% or more` : least ? `${100 * least} to ${100 * most}\u00a0%` : `under ${100 * most}\u00a0%`,
    again: "Check that it repeats", prompt: "Prompt", tokensOf: "Tokens of the answer", tokenId: id => `token ${id}`,
    share: share => `${share >= 0.0995 ? (100 * share).toFixed(0) : share >= 0.00095 ? (100 * share).toFixed(1) : "< 0.1"}\u00a0%`,
    notDrawn: "not sampled by the model", goOnWith: (text, share) => `Continue with ${text}, ${share}`,
    looking: count => `Running again to get the probabilities: ${plural(count, "token", "tokens")}`,
    lensHint: "Choose a token to see its alternatives; choosing one of these starts another answer.",
    runningAgain: count => `Checking: ${plural(count, "token", "tokens")}`, sameAgain: count => `It repeats: the same ${plural(count, "token", "tokens")}.`,
    differsAt: ({at, was, is}) => `It does not repeat: it differs${at ? ` from token ${number(at)} on: ${is ? `“${is}”` : "the end"} instead of ${was ? `“${was}”` : "the end"}` : ""}.`,
    otherWeights: "The model's weights have changed since.", noPrompt: "The server does not show the prompt.", template: "Template",
  },
  answer: {
    buttons(view) {
      view.verdict = element("p", {className: "nothing"});
      return [];
    },
    looks: view => !canLook(view.node) ? [] : [
      ...(canAsk() || lenses.has(view.node.id) ? [[TEXT.lens, "lens", () => toggleLens(view), lenses.has(view.node.id) ? TEXT.on : ""]] : []),
      ...(view.checking ? [] : [[TEXT.again, "play", () => runAgain(view)]])],
    update: updateLens,
  },
});

// compare --------------------------------------------------------------------------------------------------------------

const MOST_COLUMNS = 4;
const canCompare = node => canLook(node) && Boolean(state.model.can.compare) && state.model.api === "v1" && Boolean(node.content);
const VARIED = ["temperature", "top_k", "seed"];      // what each column may vary, besides its model

function openCompare(node) {
  compared = {node, columns: [], controller: null};
  $("compare-columns").replaceChildren();
  setText($("compare-problem"), "");
  const chosen = state.models.find(({id}) => id === node.model) ?? chatModel(), steps = stepsOfRun(chosen?.run), own = chosen?.now ?? chosen?.id;
  if (steps.length > 1) {                       // of a training run: the answer's step, or the one before the latest, against the latest
    addColumn(own === steps.at(-1) ? steps.at(-2) : own, node.seed);
    addColumn(steps.at(-1), node.seed);
  } else {
    addColumn();
    addColumn();
  }
  updateCompare();
  $("compare-dialog").showModal();
}

// Adds a column with the answer's own parameters and the next seed.
function addColumn(model = compared.node.model, ownSeed = compared.node.seed + compared.columns.length) {
  const {node: {parameters = {}, seed}} = compared, values = {...parameters, seed: ownSeed};
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
  // columns that differ otherwise share the seed, unless the reader changes it
  column.node.oninput = ({target}) => {
    column.ownSeed ||= target === column.fields.seed;
    if (!column.ownSeed) column.fields.seed.value = seed;
  };
  compared.columns.push(column);
  $("compare-columns").append(column.node);
}

// An adapter's base model, if it is listed; else the model itself.
const baseOf = model => model?.parent && state.models.find(({id, root, parent}) => !parent && [id, root].includes(model.parent)) || model;

const optionOf = ({id, state: loaded}) => element("option", {value: id, textContent: id, disabled: loaded === "failed"});

// A list of the model's adapters, if it has any: [label, function that shows it].
function adaptersOf({model, adapter}) {
  const label = element("label", {}, element("span", {textContent: TEXT.adapter}), adapter);
  const show = (chosen = "") => {
    const listed = state.models.filter(each => baseOf(each) !== each && baseOf(each).id === model.value);
    label.hidden = !listed.length;
    adapter.replaceChildren(element("option", {value: "", textContent: TEXT.none}), ...listed.map(optionOf));
    adapter.value = listed.some(({id}) => id === chosen) ? chosen : "";
  };
  return [label, show];
}

// The names of a training run's steps, the earliest first.
const stepsOfRun = run => run ? state.models.filter(each => each.run === run && !each.now).sort((a, b) => a.step - b.step).map(({id}) => id) : [];

// For a step of a training run, a slider over the run's steps: [label, function that shows it].
function stepsOf(column) {
  const slider = element("input", {type: "range", min: 0, step: 1}), label = element("label", {}, element("span", {textContent: TEXT.step}), slider);
  const ownSteps = () => stepsOfRun(state.models.find(({id}) => id === column.model.value)?.run);
  const show = () => {
    const steps = ownSteps();
    label.hidden = steps.length < 2;
    slider.max = steps.length - 1;
    slider.value = steps.indexOf(state.models.find(({id}) => id === column.model.value)?.now ?? column.model.value);
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
  $("start-compare").textContent = controller ? TEXT.stop : TEXT.compare;
}

const wholeText = ({reasoning, text}) => [reasoning, text].filter(Boolean).join("\n\n");
const hasEnded = ({end}) => Boolean(end) && !end.error;

// What a column waits for, or how its answer compares to the first column's.
function aboutColumn(column, first) {
  const {end, differs, model, adapter} = column, wanted = adapter.value || model.value, entry = state.models.find(({id}) => id === wanted);
  if (!end && !wholeText(column)) return !compared.controller ? "" : entry?.state === "loading" ? TEXT.loadingModel(wanted, entry.loading) : TEXT.waitingForFirst;
  const same = column !== first && hasEnded(column) && hasEnded(first) && (wholeText(column) === wholeText(first) ? TEXT.identical : TEXT.sameSoFar);
  return [end?.error?.message, end?.model, differs ? TEXT.differsFrom(differs) : same].filter(Boolean).join(" · ");
}

// Draws a column's text; when it and the first column have ended, the characters in which they differ are marked.
function drawCompared(column, first) {
  const text = wholeText(column), marks = column.differs && hasEnded(column) && hasEnded(first), key = `${Boolean(marks)} ${text}`;
  if (column.drawn === key) return;
  column.drawn = key;
  column.body.replaceChildren(...(marks ? differing(text, wholeText(first)) : [[text, false]]).map(([part, differs]) => differs ? element("mark", {textContent: part}) : part));
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
  const mine = compared, {node, columns} = mine, controller = mine.controller = new AbortController();
  for (const column of columns) Object.assign(column, {text: "", reasoning: "", end: null, differs: null});
  setText($("compare-problem"), "");
  updateCompare();
  const {tools, response_format, seed, ...parameters} = node.parameters ?? {}, watch = setInterval(lookAtModels, 1000);       // for steps that load
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
  clearInterval(watch);
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

// Turns a column into an answer of the chat, a sibling of the one compared.
function goOnWith({text, reasoning, end, fields}) {
  const {node} = compared, parameters = {...node.parameters};
  for (const name of VARIED) if (name !== "seed" && fields[name].value !== "") parameters[name] = Number(fields[name].value);
  const made = addNode(node.parent, "assistant", text, {...madeBy({system: systemOf(node)}, {model: end.model, weights: weightsOf(end.model), system: systemOf(node)}), parameters, seed: end.seed,
    ...(reasoning ? {reasoning} : {}), timings: {...end.timings, ...end.usage, finish_reason: end.reason}});
  $("compare-dialog").close();
  showLeaf(made.id);
}

register({
  strings: {
    compare: "Compare", compareHint: "The same question, answered at the same time. What differs from the first answer is marked.", identical: "Identical to the first answer.",
    sameSoFar: "The same as the first answer, as far as both go.", addColumn: "Add a column",
    removeColumn: "Remove the column", goOnWithThis: "Continue with this", step: "Step", adapter: "Adapter", column: count => `Answer ${count}`,
    differsFrom: ({position, probabilities: [first, own] = []}) => `Differs from token ${number(position + 1)} on: ${[["the first answer's token", "the first answer", first], ["this one's", "this one", own]].map(([token, answer, share], i) =>
      typeof share === "number" ? `${token} had ${i ? "" : "a probability of "}${TEXT.share(share)}` : `${answer} ended there`).join(", ")}.`,
  },
  bind() {
    $("add-column").onclick = () => { addColumn(); updateCompare(); };
    $("start-compare").onclick = startCompare;
    $("compare-dialog").onclose = () => { compared?.controller?.abort(); compared = null; };
  },
  render() { if (compared) updateCompare(); },
  answer: {
    looks: view => canCompare(view.node) ? [[TEXT.compare, "columns", () => openCompare(view.node)]] : [],
    update: updateMaker,
  },
});

// what made an answer ---------------------------------------------------------------------------------------------------

// The model of an answer, with the step of a training run or the base of an adapter, and what its chat had changed.
function makerOf(node) {
  const listed = state.models.find(({id, now}) => !now && id === node.model), {defaults} = listed ?? {};
  const changed = changesOf({parameters: node.parameters, system: systemOf(node)}, defaults);
  return node.model ? [TEXT.modelBy(node.model, listed, baseOf(listed)?.id), ...changed].join(" · ") : "";
}

// A line under the answer. Where answers can be compared, it opens the comparison.
function updateMaker(view) {
  const {node} = view, text = makerOf(node), compares = canCompare(node), key = `${compares} ${text}`;
  view.maker ??= element("p", {className: "maker"});
  if (!view.maker.parentNode) view.actions.after(view.maker);
  if (view.made === key) return;
  view.made = key;
  view.maker.replaceChildren(compares ? element("button", {type: "button", title: TEXT.compareHint, textContent: text, onclick: () => openCompare(view.node)}) : text);
}

register({
  strings: {
    modelBy: (name, {run, step, id} = {}, base) => run && step !== undefined ? `${run}, step ${number(step)}` : base && base !== id ? `${name}, adapter of ${base}` : name,
  },
});

// the prompt -----------------------------------------------------------------------------------------------------------

// The prompt of an answer: {messages, tokens}; no tokens if the server does not show them.
async function promptOf(node) {
  const {timings = {}, parameters = {}, model} = node, path = pathTo(state.nodes, node.parent);
  const all = messagesToSend(path, systemOf(node)), dropped = Math.max(0, (timings.dropped_messages ?? 0) - all.dropped);
  const fixed = all[0]?.role === "system" ? 1 : 0, messages = [...all.slice(0, fixed), ...all.slice(fixed + dropped)];
  const effort = parameters.reasoning_effort ? {reasoning_effort: parameters.reasoning_effort} : {};
  const wanted = state.model.api === "text" ? ["tokenize", {content: textToContinue(messages), add_special: true}]
    : ["apply-template", {messages, ...effort, ...(parameters.tools ? {tools: parameters.tools} : {})}];
  const found = await jsonOf(post(wanted[0], {...wanted[1], with_pieces: true, ...modelOfSeveral(model)}));
  return {messages, tokens: found?.tokens && spelled(found.tokens)};
}

const promptAsked = newest();

async function openPrompt(node) {
  const isMine = promptAsked();
  $("prompt-text").replaceChildren(TEXT.connecting);
  $("prompt-counts").replaceChildren();
  setText($("prompt-facts"), "");
  $("prompt-dialog").showModal();
  const {messages, tokens} = await promptOf(node), {timings = {}} = node;
  if (!isMine()) return undefined;
  if (!tokens) return setText($("prompt-text"), TEXT.noPrompt);
  const cached = timings.cached_tokens ?? 0, context = state.model.context;
  $("prompt-text").replaceChildren(...promptNodes(tokens, cached));
  $("prompt-counts").replaceChildren(...countsNodes(messages, tokens));
  setText($("prompt-facts"), TEXT.promptFacts({tokens: tokens.length, context, cached, dropped: timings.dropped_messages ?? 0}));
  $("prompt-bar").style.setProperty("--used", Math.min(1, tokens.length / (context || tokens.length)));
  return undefined;
}

// Draws runs of tokens as text, special ones separately.
function promptNodes(tokens, cached) {
  const nodes = [];
  let last = null;
  tokens.forEach(({text, special}, i) => {
    const look = [special ? "special" : "", i < cached ? "cached" : ""].filter(Boolean).join(" ");
    if (!last || special || last.className !== look) nodes.push(last = element("span", {className: look}));
    last.append(text);
  });
  return nodes;
}

// Counts the tokens of each message's text; the rest belong to the template.
function countsNodes(messages, tokens) {
  const text = tokens.map(token => token.text).join("");
  let at = 0, token = 0, offset = 0;
  const counts = messages.map(({role, content}) => {
    const start = text.indexOf(content.trim(), at);
    if (start < 0) return {role, content, count: 0};
    at = start + content.trim().length;
    for (; token < tokens.length && offset + tokens[token].text.length <= start; token++) offset += tokens[token].text.length;
    let count = 0;
    for (; token < tokens.length && offset < at; token++, count++) offset += tokens[token].text.length;
    return {role, content, count};
  });
  const rest = tokens.length - counts.reduce((sum, {count}) => sum + count, 0);
  return [...counts, {role: TEXT.template, content: "", count: rest}].map(({role, content, count}) => element("li", {},
    element("b", {textContent: TEXT.roles[role] ?? role}), element("span", {textContent: content.slice(0, 200)}), element("small", {textContent: TEXT.tokens(count)})));
}

register({
  strings: {
    roles: {system: "System", user: "You", assistant: "Assistant", tool: "Result"},
    promptFacts: ({tokens, context, cached, dropped}) => [`${plural(tokens, "token", "tokens")}${context ? ` of ${number(context)}` : ""}`,
      ...(cached ? [`the first ${number(cached)} (grey) were cached`] : []),
      ...(dropped ? [`${plural(dropped, "oldest message", "oldest messages")} left out`] : [])].join("; ") + ".",
  },
  answer: {
    looks: ({node}) => state.model.can.token_ids && !node.edited && !isGrowing(node) ? [[TEXT.prompt, "prompt", () => openPrompt(node)]] : [],
  },
});

share({lenses, weightsOf, madeBy, baseOf});
}
