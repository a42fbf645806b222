// What can be looked at inside an answer, and what made it. What looks is loaded when it is first used: lens.js, compare.js.
//
// An answer stores its inputs (seed, parameters, system prompt, weights, token ids), so that the same request can be sent
// again: a replay.
"use strict";

const Look = (() => {

const {TEXT, element, setText, number} = Parts;

const lenses = new Map();         // id of a node -> {tokens, at, text, controller}, while its lens is on
const lensOf = id => lenses.get(id);
const keepLens = (id, lens) => { lenses.set(id, lens); };
const dropLens = id => { lenses.delete(id); };
const dropLenses = () => { lenses.clear(); };

const canLook = node => Number.isSafeInteger(node.seed) && !node.edited && !Tree.isGrowing(node) && Server.model.api !== "none" &&
  Boolean(Server.model.can.token_ids);

// The inputs of an answer besides its parameters, and besides what it was given to read (`knowledge`), which the server tells.
const madeBy = (chat, more = {}) => ({model: Server.model.name, ...(Server.model.weights ? {weights: Server.model.weights} : {}),
  ...(Projects.systemOf(chat) ? {system: Projects.systemOf(chat)} : {}), ...(chat.tools?.length ? {tools: chat.tools} : {}), ...more});

// What another answer has been given to read and call, for one that is to have the same.
const askedWith = ({knowledge, tools}) => ({...(knowledge ? {knowledge} : {}), ...(tools ? {tools} : {})});

// The digest of a listed model's weights.
const weightsOf = name => Server.models.find(({id}) => id === name)?.weights_digest ?? Server.model.weights;

// An answer's system prompt; answers from older versions of the page lack it.
const systemOf = ({system, ids}) => system ?? (ids ? "" : Projects.systemOf(Chat.current));

const canCompare = node => canLook(node) && Boolean(Server.model.can.compare) && ["v1", "text"].includes(Server.model.api) && Boolean(node.content);

// An adapter's base model, if it is listed; else the model itself.
const baseOf = model => model?.parent && Server.models.find(({id, root, parent}) => !parent && [id, root].includes(model.parent)) || model;

// The names of a training run's steps, the earliest first.
const stepsOfRun = run => run ? Server.models.filter(each => each.run === run && !each.now).sort((a, b) => a.step - b.step).map(({id}) => id) : [];

function updateInside(view) {
  if (!view.verdict.parentNode) view.actions.before(view.verdict);
  setText(view.verdict, view.node.verdict ?? "");
  if (view.lens || lenses.has(view.node.id)) Lens.update(view);
}

const toggleLens = Parts.late("lens", () => Lens, "toggle");
const openLens = Parts.late("lens", () => Lens, "open");
const openPrompt = Parts.late("lens", () => Lens, "openPrompt");
const runAgain = Parts.late("lens", () => Lens, "runAgain");
const openCompare = Parts.late("compare", () => Compare, "open");
const compareModels = Parts.late("compare", () => Compare, "compareModels");

Parts.register({
  strings: {
    lens: "Token lens", on: "on", again: "Check that it repeats", prompt: "Prompt", compare: "Compare", step: "Step",
    compareHint: "The same question, answered at the same time. What differs from the first answer is marked.", tokenId: id => `token ${id}`,
    share: share => `${share >= 0.0995 ? (100 * share).toFixed(0) : share >= 0.00095 ? (100 * share).toFixed(1) : "< 0.1"}\u00a0%`,
  },
  answer: {
    buttons(view) {
      view.verdict = element("p", {className: "nothing"});
      return [];
    },
    looks: view => [...(!canLook(view.node) ? [] : [
      ...(Chat.canAsk() || lenses.has(view.node.id) ? [[TEXT.lens, "lens", () => toggleLens(view), lenses.has(view.node.id) ? TEXT.on : ""]] : []),
      ...(view.checking ? [] : [[TEXT.again, "play", () => runAgain(view)]])]),
    ...(canCompare(view.node) ? [[TEXT.compare, "columns", () => openCompare(view.node)]] : []),
    ...(Server.model.can.token_ids && !view.node.edited && !Tree.isGrowing(view.node) ? [[TEXT.prompt, "prompt", () => openPrompt(view.node)]] : [])],
    update(view) {
      updateInside(view);
      updateMaker(view);
    },
  },
});

// what made an answer ---------------------------------------------------------------------------------------------------

// The model of an answer, with the step of a training run or the base of an adapter, and, on the whole, what its chat had changed.
function makerOf(node, whole = true) {
  const listed = Server.models.find(({id, now}) => !now && id === node.model), {defaults} = listed ?? {};
  const changed = !whole ? [] : Settings.changesOf({parameters: node.parameters, system: systemOf(node)}, defaults);
  return node.model ? [TEXT.modelBy(node.model, listed, baseOf(listed)?.id), ...changed].join(" · ") : "";
}

const several = {key: "", are: false};

// Do this chat's answers, or the server, have more than one model? Else nobody asks which one wrote an answer.
function severalModels() {
  const {path} = Chat, {models} = Server, key = [path.length, path[0]?.id, Chat.lastNode()?.id, Chat.lastNode()?.model, ...models.map(({id}) => id)].join("\n");
  if (several.key === key) return several.are;
  const names = [...models.filter(({now}) => !now).map(({id}) => id), ...path.map(({model}) => model)].filter(Boolean);
  return Object.assign(several, {key, are: new Set(names).size > 1}).are;
}

// The name of an answer's model before its figures. Where answers can be compared, it opens the comparison.
function updateMaker(view) {
  const {node} = view, text = severalModels() && !Tree.isGrowing(node) ? makerOf(node, false) : "", compares = canCompare(node), key = `${compares} ${text}`;
  view.maker ??= element("span", {className: "maker"});
  if (!view.maker.parentNode) view.speed.prepend(view.maker);
  if (text) view.speed.hidden = false;
  if (view.made === key) return;
  view.made = key;
  view.maker.replaceChildren(compares && text ? element("button", {type: "button", title: TEXT.compareHint, textContent: text, onclick: () => openCompare(view.node)}) : text);
}

Parts.register({
  strings: {
    modelBy: (name, {run, step, id} = {}, base) => run && step !== undefined ? `${run}, step ${number(step)}` : base && base !== id ? `${name}, adapter of ${base}` : name,
  },
});

return Object.freeze({makerOf, weightsOf, systemOf, madeBy, askedWith, baseOf, stepsOfRun, lensOf, keepLens, dropLens, dropLenses, openLens, compareModels});
})();
