// Of a training run: what its steps write after fixed prompts, and which items of a suite two of them judge differently.
"use strict";

{

const {TEXT, $, element, number, inOrder} = Parts;

// `before` and `after`: the names of the chosen steps.
const shownFlips = {run: "", before: null, after: null, found: null, error: "", isNews: inOrder()};

// A step is named by its number, or by its model among several stages.
const namesOf = found => new Set(found.map(({run}) => run)).size > 1 ? ({model}) => model : ({step}) => number(step);

const lensButton = (label, onclick) => {
  const made = element("button", {type: "button", className: "icon plain i-lens", title: label, onclick});
  made.setAttribute("aria-label", label);
  return made;
};

// samples --------------------------------------------------------------------------------------------------------------

function samplesOf(found) {
  const sampled = found.filter(({samples}) => samples?.length), prompts = [...new Set(sampled.flatMap(({samples}) => samples.map(({prompt}) => prompt)))], nameOf = namesOf(found);
  if (!sampled.length) return [];
  const head = element("tr", {}, ...[TEXT.runColumns.step, ...prompts].map(textContent => element("th", {textContent, scope: "col", dir: "auto"})));
  const rows = sampled.map(each => {
    const {model, samples, state: loaded} = each;
    const texts = new Map(samples.map(({prompt, text}) => [prompt, text]));
    return element("tr", {}, element("td", {textContent: nameOf(each)}), ...prompts.map(prompt => element("td", {}, ...(texts.has(prompt) ? [
      element("span", {textContent: texts.get(prompt), dir: "auto"}),
      ...(loaded === "removed" ? [] : [lensButton(TEXT.lensOf(model, prompt), () => Look.openLens(model, model, {text: prompt, most: SAMPLE_TOKENS}))])] : []))));
  });
  const table = element("div", {className: "table", tabIndex: 0}, element("table", {id: "run-samples"}, element("thead", {}, head), element("tbody", {}, ...rows.reverse())));
  return [element("h3", {textContent: TEXT.samples}), table];
}

const SAMPLE_TOKENS = 16;          // as the server draws

// items ----------------------------------------------------------------------------------------------------------------

// Two steps of a lineage are compared whichever stages they are of: all answered the same suite.
function flipsOf(name, found) {
  const judged = found.filter(step => step.judged), nameOf = namesOf(found);
  if (judged.length < 2) return [];
  if (shownFlips.run !== name) Object.assign(shownFlips, {run: name, before: null, after: null, found: null, error: ""});
  const has = name => judged.some(({model}) => model === name);
  if (!has(shownFlips.before)) shownFlips.before = judged.at(-2).model;
  if (!has(shownFlips.after)) shownFlips.after = judged.at(-1).model;
  const choice = (which, label) => element("label", {}, element("span", {textContent: label}), " ", element("select", {
    id: `flips-${which}`, onchange: ({target}) => { Object.assign(shownFlips, {[which]: target.value, found: null, error: ""}); renderFlips(); }},
    ...judged.map(step => element("option", {value: step.model, textContent: nameOf(step), selected: step.model === shownFlips[which]}))));
  const act = element("button", {type: "button", id: "flips-show", className: "plain", textContent: TEXT.showFlips, onclick: () => findFlips(name)});
  const list = element("div", {id: "flips"});
  fillFlips(list);
  return [element("h3", {textContent: TEXT.flips}), element("div", {className: "line"}, choice("before", TEXT.flipsBefore), choice("after", TEXT.flipsAfter), act), list];
}

async function findFlips(name) {
  const {before, after} = shownFlips, isNews = shownFlips.isNews();
  try {
    const response = await Server.accepted(await Server.request(`v1/runs/${encodeURIComponent(name)}?${new URLSearchParams({before, after})}`));
    const {flips} = await response.json();
    if (!isNews() || shownFlips.run !== name || shownFlips.before !== before || shownFlips.after !== after) return;
    Object.assign(shownFlips, {found: flips, error: ""});
  } catch (error) {
    if (isNews()) shownFlips.error = error.message;
  }
  renderFlips();
}

function renderFlips() {
  if ($("flips") && Run.shown) fillFlips($("flips"));
}

function fillFlips(list) {
  const {found, error, after: model} = shownFlips, isGone = Run.shown.found.find(step => step.model === model)?.state === "removed";
  if (error || !found) return list.replaceChildren(...(error ? [element("p", {textContent: error})] : []));
  const items = found.items.map(item => {
    const last = item.texts.map(text => item.chat ? text : text.slice(text.lastIndexOf("\n\n") + 1).trim());
    return element("li", {className: item.correct ? "gained" : "lost"},
      element("b", {textContent: item.correct ? TEXT.nowRight : TEXT.nowWrong}), " ", element("small", {textContent: `${item.task} · ${number(item.item)}`}),
      ...last.map((text, at) => element("p", {dir: "auto"}, text, ...(item.gold === at ? [" ", element("small", {textContent: TEXT.rightOption})] : []),
        ...(isGone ? [] : [lensButton(TEXT.lensOf(model, `${item.task} ${item.item}${last.length > 1 ? `, ${at + 1}` : ""}`),
          () => Look.openLens(model, model, item.chat ? {question: text} : {text: item.texts[at]}))]))),
      ...(typeof item.gold === "string" ? [element("small", {textContent: TEXT.rightIs(item.gold)})] : []));
  });
  return list.replaceChildren(element("p", {role: "status", textContent: TEXT.flipCounts(found)}), element("ul", {className: "flips"}, ...items));
}

Parts.register({
  strings: {
    samples: "Samples", lensOf: (model, what) => `Token lens: ${model}, ${what}`, flips: "Items that changed", flipsBefore: "From step", flipsAfter: "to step", showFlips: "Show items",
    nowRight: "Now right", nowWrong: "Now wrong", rightOption: "(right)", rightIs: text => `Right: ${text.trim()}`,
    flipCounts: ({gained, lost, items}) => `${number(gained)} now right, ${number(lost)} now wrong${gained + lost > items.length ? `; the first ${number(items.length)}:` : "."}`,
  },
  run: {nodes: (steps, found) => steps.length ? [...samplesOf(found ?? []), ...flipsOf(Run.shown.name, found ?? [])] : []},
});
}
