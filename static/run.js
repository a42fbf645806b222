// Training runs, at /#run/NAME: the curves of a lineage (base, SFT, RL of a tag) or of one of its stages, beside those of a second one; what is
// loaded and scored now, a chat with a step, two steps side by side. Where the steps lie in the charts is in curves.js.
"use strict";

const Run = (() => {

const {TEXT, $, element, iconButton, setText, number, plural, inOrder} = Parts;

// While the view is open {name, other: of a second run, at: the chosen step, follows: it is the latest one until the reader chooses, metric, axis, pages: what /v1/runs has of each name, charts, rows, timer}
let shownRun = null;

const LOOK_MS = 2000;             // between two looks at the server
const REST = 5;                   // so many times the duration of a look, if that is more
const BITS = "bits_per_byte";
const OWN_CHARTS = ["val_bpb", "core_metric", "train_loss", "reward"];       // beside the chart of the chosen metric
const FIRST = ["val_bpb", "core_metric", "train_loss", "reward"];            // of the choice of metrics, after bits per byte
const LESS_IS_BETTER = [BITS, "val_bpb", "min_val_bpb", "own_val_bpb", "train_loss"];
const MOST_SPOKEN = 40;           // points of a curve that its label has; the table has all

// `gap`: to another value that is to be told from it.
const write = (value, gap = 1) => Math.abs(value) < 1000 ? value.toFixed(Math.max(3, Math.ceil(-Math.log10(gap)))) : new Intl.NumberFormat(undefined, {notation: "compact", maximumSignificantDigits: 4}).format(value);
const isScored = step => Curves.metricOf(step, BITS) !== undefined;
const hasValue = step => Curves.metricOf(step, shownRun.metric) !== undefined;
const isGone = step => step.state === "removed";
const answersNow = step => step.state !== "failed" && !isGone(step);
const unique = values => [...new Set(values)];
const nameOf = metric => TEXT.metrics[metric] ?? metric;
const written = (step, metric) => `${write(Curves.metricOf(step, metric))}${step.stale.includes(metric) ? ` ${TEXT.ofEarlierStep}` : ""}`;

// the steps ------------------------------------------------------------------------------------------------------------

// A step from its entry in the list of models, which has its state, and from /v1/runs, which has all else; steps whose files were removed are only there.
const stepOf = (id, entry = {}, found = {}) => ({id, run: entry.run ?? found.run ?? "", stage: entry.stage ?? found.stage ?? "", step: entry.step ?? found.step,
  state: entry.state ?? found.state ?? "", loading: entry.loading, scoring: Boolean(entry.scoring), reason: entry.reason ?? found.reason ?? "",
  compares: Boolean(entry.capabilities?.compare), metrics: typeof entry.bits_per_byte === "number" ? {...found.metrics, [BITS]: entry.bits_per_byte} : found.metrics ?? {},
  stale: [found.stale, entry.stale].find(Array.isArray) ?? [], warning: warningText(found.warning ?? entry.warning)});

const warningText = warning => typeof warning === "string" ? warning : warning?.message ?? "";

// The steps of a run, else of a lineage of this name, in order of training. The array is the same one as long as nothing of it has changed.
function stepsOf(name) {
  const page = shownRun.pages.get(name) ?? {}, {models} = Server;
  if (page.models === models && page.merged === page.steps && page.view) return page.view;
  const listed = models.filter(each => !each.now && each.run), own = listed.filter(({run}) => run === name);
  const entries = new Map(listed.map(each => [each.id, each])), found = new Map((page.steps ?? []).map(step => [step.model, step]));
  const ids = (own.length ? own : listed.filter(each => Views.lineageOf(each) === name)).map(({id}) => id);
  const view = unique([...found.keys(), ...ids]).map(id => stepOf(id, entries.get(id), found.get(id)))
    .sort((a, b) => Curves.placeOfStage(a.stage) - Curves.placeOfStage(b.stage) || (a.run < b.run ? -1 : a.run > b.run ? 1 : a.step - b.step));
  const key = JSON.stringify(view);
  Object.assign(page, {models, merged: page.steps}, page.key === key ? {} : {key, view});
  page.view.forEach((step, i) => { step.previous = page.view[i - 1]; });
  shownRun.pages.set(name, page);
  return page.view;
}

// Of two views that overlap, as a lineage and one of its stages do, the second shows nothing.
function otherSteps() {
  const {name, other} = shownRun, steps = other ? stepsOf(other) : [], own = other ? new Set(stepsOf(name).map(({run}) => run)) : null;
  return steps.some(({run}) => own.has(run)) ? NONE : steps;
}

const NONE = [];
const allSteps = () => [...stepsOf(shownRun.name), ...otherSteps()];
const bothRuns = () => [stepsOf(shownRun.name), otherSteps()].filter((steps, i) => !i || steps.length);
const stepNamed = id => allSteps().find(step => step.id === id);

// The step before in its lineage that can answer, which the first of SFT has in base; undefined if there is none.
function before(step) {
  if (!step || !answersNow(step)) return undefined;
  let last = step.previous;
  while (last && !answersNow(last)) last = last.previous;
  return last;
}

// By how much a step's value differs from that of the scored step before in its stage, with a sign; "" if there is none.
function changeOf(step) {
  let last = step.previous;
  while (last?.run === step.run && !hasValue(last)) last = last.previous;
  if (last?.run !== step.run || !hasValue(step)) return "";
  const by = Curves.metricOf(step, shownRun.metric) - Curves.metricOf(last, shownRun.metric);
  return `${by < 0 ? "−" : "+"}${write(Math.abs(by))}`;
}

// opened and polled ----------------------------------------------------------------------------------------------------

// Without a name: the lineage of the chat's model, else the first one, once the server has listed its models.
async function openRun(given, other = "") {
  await Parts.need("curves");
  if (typeof Curves === "undefined") { Chat.say(TEXT.notLoaded); return; }
  const name = given || Views.runsOf()[0] || "", beside = other === name ? "" : other, isOpen = Boolean(shownRun), unnamed = /^#run\/?$/.test(location.hash);
  const hash = addressOf(name, beside);
  if (location.hash !== hash) history[unnamed ? "replaceState" : "pushState"](null, "", location.pathname + location.search + hash);
  const known = shownRun?.listed ?? [];
  closeRun();
  shownRun = {name, other: beside, at: null, follows: true, metric: BITS, chosen: false, axis: "step", listed: known, pages: new Map(), found: [], charts: new Map(), rows: new Map(), drawn: [], turn: 0, timer: 0, asked: false, exports: false, exported: new Map()};
  $("run-question").value ||= lastQuestion();
  Page.render();
  if (!isOpen) $("run").focus({preventScroll: true});
  look();
  listRuns(shownRun);
  await Promise.all([Parts.need("charts"), Parts.need("uplot")]);
  Page.render();
}

const addressOf = (name, other) => name ? `#run/${encodeURIComponent(name)}${other ? `?with=${encodeURIComponent(other)}` : ""}` : "#run";

function showBeside(other) {
  shownRun.other = other;
  history.replaceState(null, "", location.pathname + location.search + addressOf(shownRun.name, other));
  Page.render();
  look();
}

// Runs whose models are all gone are only in this list.
async function listRuns(mine) {
  const found = await Server.jsonOf(Server.request("v1/runs", {signal: AbortSignal.timeout(Server.HEALTH_MS)}));
  if (!Array.isArray(found?.data) || mine !== shownRun) return;
  mine.listed = found.data;
  Page.render();
}

// One look after the other, with a rest between them that grows with what a look costs.
async function look() {
  const mine = shownRun, turn = ++mine.turn, began = performance.now();
  clearTimeout(mine.timer);
  if (!document.hidden) {
    Server.lookAtModels();
    askForExports();
    await Promise.all([mine.name, mine.other].filter(Boolean).map(name => lookAtRun(mine, name)));
  }
  if (mine === shownRun && turn === mine.turn) mine.timer = setTimeout(look, Math.max(LOOK_MS, REST * (performance.now() - began)));
}

async function lookAtRun(mine, name) {
  const page = mine.pages.get(name) ?? {isNews: inOrder()};
  page.isNews ??= inOrder();
  mine.pages.set(name, page);
  const isNews = page.isNews();
  const text = await Server.request(`v1/runs/${encodeURIComponent(name)}`, {signal: AbortSignal.timeout(Server.HEALTH_MS)}).then(response => response.ok ? response.text() : "").catch(() => "");
  if (!text || mine !== shownRun || !isNews() || page.text === text) return;
  page.text = text;
  try { page.steps = (JSON.parse(text).steps ?? []).filter(step => typeof step?.model === "string"); } catch (error) { return; }
  if (name === mine.name) mine.found = page.steps;
  if (page.steps.some(({samples, judged}) => samples?.length || judged)) Parts.need("evals").then(() => { if (mine === shownRun) { mine.drawn = []; Page.render(); } });
  Page.render();
}

function closeRun() {
  if (!shownRun) return;
  clearTimeout(shownRun.timer);
  for (const metric of [...shownRun.charts.keys()]) removeChart(metric);
  shownRun = null;
  $("run-curve").replaceChildren();
  $("run-charts").replaceChildren();
  $("run-steps").replaceChildren();
}

// What the chat asked last, or the first example.
const lastQuestion = () => Chat.path.findLast(({role}) => role === "user")?.content ?? TEXT.examples[0];

// the view -------------------------------------------------------------------------------------------------------------

function renderRun() {
  $("run").hidden = !shownRun;
  if (!shownRun) return;
  if (!shownRun.name && Views.runsOf().length) { openRun(); return; }
  const {name, other, metric, axis, found, listed} = shownRun, steps = stepsOf(name), all = allSteps();
  const inputs = [name, other, metric, axis, found, listed, steps, otherSteps(), Views.runsOf().join("\n"), typeof Charts, typeof uPlot, Server.phase];
  if (inputs.length === shownRun.drawn.length && inputs.every((input, i) => input === shownRun.drawn[i])) return;
  if (shownRun.follows || !stepNamed(shownRun.at)) shownRun.at = steps.at(-1)?.id ?? null;
  const metrics = metricsOf(all);
  shownRun.drawn = inputs;
  shownRun.drawn[2] = shownRun.metric;
  fillChoices(metrics);
  setText($("run-title"), name ? TEXT.runTitle(name) : TEXT.trainingRun);
  setText($("run-about"), steps.length ? TEXT.runAbout(steps, steps.findLast(step => !isGone(step))) : Server.phase === "ready" ? TEXT.noRun(name) : Server.trouble());
  setText($("run-now"), nowText(all));
  showWarnings(all);
  $("run-compare").hidden = latestTwo().length < 2 || !latestTwo().some(({compares}) => compares);       // a new step may be in one list before it is in the other
  setText($("run-compare").querySelector("button"), other ? TEXT.compareBoth : TEXT.compareLatest);
  drawCurves();
  showStep();
  listSteps(metrics);
  showMore(steps);
}

// The metrics that any step has, bits per byte first. Where no step has these, another is shown until the reader chooses.
function metricsOf(steps) {
  const names = new Set(steps.flatMap(({metrics}) => Object.keys(metrics)));
  const placeOf = metric => FIRST.includes(metric) ? FIRST.indexOf(metric) : FIRST.length;
  const found = [...(steps.some(isScored) ? [BITS] : []), ...[...names].filter(metric => metric !== BITS).sort((a, b) => placeOf(a) - placeOf(b) || (a < b ? -1 : 1))];
  if (!shownRun.chosen) shownRun.metric = found[0] ?? BITS;
  return found;
}

function fillChoices(metrics) {
  const {name, other, metric, axis, listed} = shownRun, lineages = lineagesOf(listed), names = namesOf(lineages);
  const own = runsNamed(lineages, name), beside = names.filter(each => !runsNamed(lineages, each).some(run => own.includes(run)));
  fillSelect($("run-metric"), metrics.map(each => [each, nameOf(each)]), metric);
  $("run-metric").parentElement.hidden = metrics.length < 2;
  fillSelect($("runs"), names.map(each => [each, each]), name);
  $("runs").hidden = names.length < 2;
  fillSelect($("run-other"), [["", TEXT.none], ...beside.map(each => [each, each])], other);
  $("run-other").parentElement.hidden = !beside.length;
  fillSelect($("run-axis"), [["step", TEXT.bySteps], ["tokens", TEXT.byTokens]], axis);
  $("run-axis").parentElement.hidden = !allSteps().length || !Curves.knowsTokens(bothRuns());
}

// Map: lineage -> its runs, of what is served and what the server has listed.
function lineagesOf(listed) {
  const lineages = new Map(listed.map(({id, runs}) => [id, new Set(runs?.map(run => run.id))]));
  for (const model of Server.models.filter(({run}) => run)) {
    const lineage = Views.lineageOf(model);
    if (!lineages.has(lineage)) lineages.set(lineage, new Set());
    lineages.get(lineage).add(model.run);
  }
  return lineages;
}

const runsNamed = (lineages, name) => [...lineages.get(name) ?? [name]];

// The names of all lineages, each followed by its stages if it has several.
function namesOf(lineages) {
  const shown = [shownRun.name, shownRun.other], inOrder = [...lineages].sort(([a], [b]) => a < b ? -1 : 1);
  return unique(inOrder.flatMap(([lineage, runs]) => [lineage, ...[...runs].filter(run => runs.size > 1 || shown.includes(run))]));
}

// A list that is open stays so while its options are the same.
function fillSelect(select, options, chosen) {
  const key = JSON.stringify(options);
  if (select.dataset.filled !== key) select.replaceChildren(...options.map(([value, textContent]) => element("option", {value, textContent})));
  select.dataset.filled = key;
  select.value = chosen;
}

// What is in memory, what is scored now, and how many steps wait for it.
function nowText(steps) {
  const named = of => steps.filter(of).map(({id}) => id).join(", "), waiting = steps.filter(step => !isScored(step) && answersNow(step)).length;
  const loading = named(step => step.state === "loading"), scoring = named(step => step.scoring);
  return !steps.length ? "" : [TEXT.loadedNow(named(step => step.state === "ready")), loading && TEXT.loadingNow(loading), scoring && TEXT.scoringNow(scoring),
    waiting && steps.some(step => isScored(step) || step.scoring) ? TEXT.toScore(waiting) : ""].filter(Boolean).join(" ");
}

// Each warning once, with the steps that have it.
function showWarnings(steps) {
  const warnings = Map.groupBy(steps.filter(({warning}) => warning), ({warning}) => warning);
  $("run-warnings").replaceChildren(...[...warnings].map(([warning, own]) => element("li", {className: "alert", textContent: TEXT.warningOf(own.map(({id}) => id), warning)})));
}

// What other scripts show of the run; drawn anew only if the samples and verdicts have changed.
function showMore(steps) {
  const {name, found} = shownRun, drawers = Parts.all.filter(({run}) => run);
  const key = JSON.stringify([name, drawers.length, steps.map(({id}) => id), found.map(({model, weights_digest: digest, judged, samples}) => [model, digest, judged, samples])]);
  if (shownRun.more === key) return;
  shownRun.more = key;
  $("run-more").replaceChildren(...drawers.flatMap(({run}) => run.nodes(steps, found) ?? []));
}

// the curves -----------------------------------------------------------------------------------------------------------

function drawCurves() {
  const {metric, axis, charts} = shownRun, shown = bothRuns(), all = allSteps(), scored = all.filter(hasValue), several = scored.length > 1;
  setText($("run-caption"), several ? TEXT.curve(captionOf(metric)) : all.length ? TEXT.noCurve(scored.length) : "");
  $("run-curve").hidden = !several;
  showLegend(all);
  const others = OWN_CHARTS.filter(each => each !== metric && all.filter(step => Curves.metricOf(step, each) !== undefined).length > 1);
  const wanted = [...(several ? [metric] : []), ...others];
  for (const each of [...charts.keys()]) {
    const isMain = charts.get(each).box === $("run-curve");
    if (!wanted.includes(each) || isMain !== (each === metric)) removeChart(each);
  }
  if (typeof uPlot !== "function" || typeof Charts === "undefined" || !all.length) return;
  const layout = Curves.layOut(shown, axis);
  for (const each of wanted) drawMetric(each, each === metric ? $("run-curve") : figureOf(each), layout);
  $("run-charts").append(...others.map(each => $(`run-chart-${each}`).parentElement).filter((figure, i) => $("run-charts").children[i] !== figure));
}

const captionOf = metric => [nameOf(metric), TEXT.units[metric] ?? "", ofItsStage(metric) ? TEXT.ofItsStage : "", LESS_IS_BETTER.includes(metric) ? TEXT.lessIsBetter : ""].filter(Boolean).join(", ");

// Each stage validates on data of its own, so the values of two are not compared.
const ofItsStage = metric => /val_bpb$/.test(metric) && unique(allSteps().map(({stage}) => stage)).length > 1;

// The box of a chart beside the first one.
function figureOf(metric) {
  const id = `run-chart-${metric}`;
  if (!$(id)) {
    const box = element("div", {id, className: "chart"});
    box.setAttribute("role", "img");
    $("run-charts").append(element("figure", {}, element("figcaption"), box));
  }
  setText($(id).previousSibling, captionOf(metric));
  return $(id);
}

function drawMetric(metric, box, layout) {
  const {charts} = shownRun, curves = Curves.of(bothRuns(), metric, layout), kind = JSON.stringify([curves.looks, layout.isPlain, Boolean(curves.scales)]);
  if (charts.has(metric) && charts.get(metric).kind !== kind) charts.get(metric).plot.destroy();
  box.shown = {...curves, layout};
  if (charts.get(metric)?.kind !== kind) charts.set(metric, madeChart(metric, box, curves, kind));
  Charts.drawOfSteps(charts.get(metric).plot, box, curves, layout);
  box.setAttribute("aria-label", spoken(curves, layout, metric));
}

function madeChart(metric, box, {looks}, kind) {
  const mark = element("i", {className: "mark", hidden: true}), tip = element("span", {className: "tip", hidden: true});
  const plot = Charts.makeOfSteps(box, {write, looks, onDraw: () => placeMark(metric)});
  plot.over.append(mark, tip);
  plot.over.onmousemove = event => choose(nearest(plot, box, event)?.id);
  plot.over.onclick = event => chatWith(nearest(plot, box, event));
  return {plot, box, mark, tip, kind};
}

function removeChart(metric) {
  const {plot, box} = shownRun.charts.get(metric);
  plot.destroy();
  shownRun.charts.delete(metric);
  if (box !== $("run-curve")) box.parentElement.remove();
}

function spoken({points}, {isPlain}, metric) {
  const named = ({step}) => isPlain && !shownRun.other ? number(step.step) : step.id;
  if (points.length <= MOST_SPOKEN) return points.map(point => `${named(point)}: ${written(point.step, metric)}`).join(", ");
  const sorted = points.toSorted((a, b) => a.value - b.value);
  return TEXT.manyPoints(points.length, ...[points[0], points.at(-1), sorted[0], sorted.at(-1)].map(point => `${named(point)}: ${write(point.value)}`));
}

// The step whose point is nearest to the mouse along the axis; of those above each other, the nearest one.
function nearest(plot, box, {clientX, clientY}) {
  const {left, top} = plot.over.getBoundingClientRect();
  const far = box.shown.points.map(({x, y, step}) => ({step, x: Math.round(Math.abs(plot.valToPos(x, "x") - clientX + left)), y: Math.abs(plot.valToPos(y, "y") - clientY + top)}));
  return far.reduce((a, b) => b.x < a.x || b.x === a.x && b.y < a.y ? b : a, {x: Infinity}).step;
}

// Marks the chosen step in a chart, with its value for who points at it.
function placeMark(metric) {
  const {plot, box, mark, tip} = shownRun?.charts.get(metric) ?? {};
  if (!plot) return;
  const point = box.shown.points.find(({step}) => step.id === shownRun.at);
  mark.hidden = tip.hidden = !point;
  if (!point) return;
  const left = plot.valToPos(point.x, "x"), top = plot.valToPos(point.y, "y"), {clientWidth: width} = plot.over;
  mark.style.left = `${left}px`;
  mark.style.top = tip.style.top = `${top}px`;
  tip.style.left = left > width / 2 ? "auto" : `${left}px`;
  tip.style.right = left > width / 2 ? `${width - left}px` : "auto";
  tip.classList.toggle("low", top < plot.over.clientHeight / 2);
  setText(tip, [point.step.id, written(point.step, metric), isGone(point.step) ? TEXT.filesRemoved : ""].filter(Boolean).join(" · "));
}

// Which curve is whose, and what the marks mean; only what is needed.
function showLegend(all) {
  const {name, other} = shownRun, shown = [shownRun.metric, ...OWN_CHARTS];
  const isStale = all.some(step => step.stale.some(metric => shown.includes(metric) && Curves.metricOf(step, metric) !== undefined));
  const entries = [...(other ? [["first", name], ["second", other]] : []), ...(isStale ? [["stale", TEXT.staleMark]] : []),
    ...(all.some(({warning}) => warning) ? [["warned", TEXT.warningMark]] : [])];
  const legend = $("run-legend"), key = JSON.stringify(entries);
  legend.hidden = !entries.length;
  if (legend.dataset.filled === key) return;
  legend.dataset.filled = key;
  legend.replaceChildren(...entries.map(([kind, text]) => element("li", {}, element("i", {className: `swatch ${kind}`}), text)));
}

// the chosen step ------------------------------------------------------------------------------------------------------

function choose(name) {
  if (!name || shownRun.at === name) return;
  Object.assign(shownRun, {at: name, follows: name === stepsOf(shownRun.name).at(-1)?.id});
  showStep();
}

function showStep() {
  const steps = allSteps(), at = steps.findIndex(({id}) => id === shownRun.at), step = steps[at], slider = $("run-step"), {metric} = shownRun;
  $("run-slider").hidden = steps.length < 2;
  slider.max = Math.max(0, steps.length - 1);
  slider.value = at;
  slider.setAttribute("aria-valuetext", step?.id ?? "");
  const values = !step ? [] : unique([metric, ...shownRun.charts.keys()]).filter(each => Curves.metricOf(step, each) !== undefined)
    .map(each => [TEXT.valueIs(nameOf(each), written(step, each)), each === metric && changeOf(step) ? TEXT.changeIs(changeOf(step)) : ""]).flat();
  setText($("run-chosen"), !step ? "" : [step.id, ...values, isGone(step) ? TEXT.filesRemoved : "", step.reason, step.warning].filter(Boolean).join(" · "));
  $("run-chat").hidden = Boolean(step) && isGone(step);
  $("run-chat").disabled = !step || !answersNow(step);
  $("run-before").hidden = $("run-compare").hidden || Boolean(step) && isGone(step);
  $("run-before").disabled = !before(step);
  for (const each of shownRun.charts.keys()) placeMark(each);
}

function chatWith(step) {
  if (!step || !answersNow(step)) return;
  Chat.openNew();
  Settings.chooseModel(step.id);
  Composer.focusAfterClick();
}

const compareWithBefore = step => compareSteps([before(step)?.id, step?.id]);

// The latest step and the one before it, or the latest ones of both runs.
const latestTwo = () => shownRun.other ? bothRuns().map(steps => steps.findLast(answersNow)).filter(Boolean) : stepsOf(shownRun.name).filter(answersNow).slice(-2);

function compareSteps(names) {
  const question = $("run-question").value.trim();
  if (!question) return $("run-question").focus();
  return Look.compareModels(question, names);
}

// the table ------------------------------------------------------------------------------------------------------------

// A group for each run, the latest first. Of a row that has not changed, the nodes stay.
function listSteps(metrics) {
  const all = allSteps(), runs = Map.groupBy(all, ({run}) => run), {metric, rows} = shownRun, isGrouped = runs.size > 1;
  const others = OWN_CHARTS.filter(each => each !== metric && metrics.includes(each)), compares = !$("run-compare").hidden;
  const columns = [TEXT.runColumns.step, nameOf(metric), TEXT.runColumns.change, ...others.map(nameOf), TEXT.runColumns.state, TEXT.runColumns.acts];
  const table = $("run-steps"), focused = document.activeElement?.dataset?.act, kept = new Set();
  const kind = JSON.stringify([columns, [...runs.keys()], isGrouped, compares]);
  if (table.dataset.kind !== kind || !table.children.length) {
    rows.clear();
    table.dataset.kind = kind;
    table.replaceChildren(element("thead", {}, element("tr", {}, ...columns.map(textContent => element("th", {textContent, scope: "col"})))), ...[...runs.keys()].map(() => element("tbody")));
  }
  const bodies = [...table.tBodies], groups = bothRuns().flatMap(steps => [...Map.groupBy(steps, ({run}) => run).values()].reverse());
  for (const [i, steps] of groups.entries()) {
    const shown = steps.map(step => rowOf(step, {others, isGrouped, compares}));
    if (isGrouped) shown.push(groupRow(steps, columns.length));
    shown.forEach(row => kept.add(row));
    putRows(bodies[i], shown.reverse());
  }
  for (const [id, {row}] of rows) if (!kept.has(row)) rows.delete(id);
  table.parentElement.hidden = !all.length;
  if (focused && document.activeElement?.dataset?.act !== focused) table.querySelector(`[data-act="${CSS.escape(focused)}"]`)?.focus();
}

// Makes these the rows of a group; those that stand there already are not touched.
function putRows(body, wanted) {
  const stays = new Set(wanted);
  for (const row of [...body.rows]) if (!stays.has(row)) row.remove();
  let next = body.firstChild;
  for (const row of wanted) {
    if (row === next) next = next.nextSibling;
    else body.insertBefore(row, next);
  }
}

function groupRow(steps, columns) {
  const text = `${steps[0].run} · ${plural(steps.length, "step", "steps")}`, {rows} = shownRun;
  if (rows.get(steps[0].run + "\n")?.key !== text) rows.set(steps[0].run + "\n", {key: text, row: element("tr", {className: "group"}, element("th", {textContent: text, colSpan: columns, scope: "rowgroup"}))});
  return rows.get(steps[0].run + "\n").row;
}

function rowOf(step, {others, isGrouped, compares}) {
  const {id, state: loaded, loading, scoring, reason, warning} = step, {metric, rows} = shownRun, shown = each => Curves.metricOf(step, each) === undefined ? "" : written(step, each);
  const about = [TEXT.modelStates[loaded] ?? TEXT.stepStates[loaded] ?? loaded, loading ? `${Math.floor(100 * loading)}\u00a0%` : "", scoring ? TEXT.scoring : "", reason, warning, shownRun.exported.get(id)].filter(Boolean).join(" ");
  const texts = [isGrouped ? id : number(step.step), shown(metric), changeOf(step), ...others.map(shown), about];
  const acts = [...(isGone(step) ? [] : [["new", TEXT.chatWith(id), () => chatWith(stepNamed(id)), !answersNow(step)],
    ...(shownRun.exports && step.state !== "failed" ? [["export", TEXT.exportOf(id), () => exportStep(id), shownRun.exported.get(id) === TEXT.exporting]] : []),
    ...(compares ? [["columns", TEXT.compareWith(id), () => compareWithBefore(stepNamed(id)), !before(step)]] : [])])];
  const key = JSON.stringify([texts, acts]);
  if (rows.get(id)?.key === key) return rows.get(id).row;
  const row = element("tr", {}, ...texts.map(textContent => element("td", {textContent})), element("td", {className: "acts"}, ...acts.map(([icon, label, act, disabled]) => {
    const made = iconButton(label, icon, act);
    made.disabled = disabled;
    made.dataset.act = `${icon} ${id}`;
    return made;
  })));
  if (warning) row.className = "warned";
  rows.set(id, {key, row});
  return row;
}

// Operators may export steps where the server has a folder for that.
async function askForExports() {
  const mine = shownRun;
  if (!Server.exports || mine.asked) return;
  mine.asked = true;
  const found = await Server.jsonOf(Server.request("models/exports"));
  mine.exports = Boolean(found);
  if (mine === shownRun && found) drawAgain();
}

// The folder has the step's name; what became of it stands in the step's row.
async function exportStep(id) {
  const mine = shownRun, name = id.replace(/[^A-Za-z0-9._-]/g, "-"), say = text => { mine.exported.set(id, text); if (mine === shownRun) drawAgain(); };
  say(TEXT.exporting);
  try {
    const response = await Server.post("models/export", {model: id, name});
    if (!response.ok) throw await Server.errorOf(response);
    say(TEXT.exported(name));
  } catch (error) {
    say(error.message);
  }
}

// Renders the view although nothing of the server's has changed.
function drawAgain() {
  shownRun.drawn = [];
  Page.render();
}

// How many steps each stage has, if there are several.
function stagesText(steps) {
  const stages = [...Map.groupBy(steps, ({run}) => run)];
  return stages.length > 1 ? `: ${stages.map(([run, own]) => `${number(own.length)} of ${own[0].stage || run}`).join(", ")}` : "";
}

Parts.register({
  strings: {
    runTitle: name => `Training run ${name}`, noRun: name => name ? `The server has no training run ${name}.` : "The server serves no training run: --watch serves one.",
    runAbout: (steps, latest) => [plural(steps.length, "step", "steps") + (stagesText(steps) || (steps.length > 1 ? `, ${number(steps[0].step)} to ${number(steps.at(-1).step)}` : "")),
      latest && `the latest is ${latest.id}`].filter(Boolean).join(" · "),
    curve: name => `${name}. A click on a point begins a chat with that step.`, metric: "Metric", lessIsBetter: "less is better",
    ofItsStage: "on each stage's own data",
    metrics: {bits_per_byte: "Bits per byte", val_bpb: "Validation bits per byte", min_val_bpb: "Least validation bits per byte", own_val_bpb: "Validation bits per byte, computed here",
      total_training_time: "Training time in seconds", tokens: "Tokens trained on", train_loss: "Training loss", reward: "Reward", core_metric: "CORE"},
    units: {train_loss: "nats per token, smoothed", reward: "mean of RL's answers", core_metric: "0 is chance, 1 is all right"},
    noCurve: scored => scored ? "The curve appears with the second score." : "No step is scored yet. A server with --watch-text FILE scores each by how well it predicts that text.",
    besideRun: "Beside", runAxis: "Axis", bySteps: "Steps", byTokens: "Tokens trained on", stageByTokens: stage => `${stage} (tokens)`,
    manyPoints: (count, first, last, least, most) => `${number(count)} points, ${first} to ${last}; least ${least}, most ${most}. The table has all.`,
    ofEarlierStep: "(of an earlier step)", staleMark: "hollow: the value is of an earlier step", warningMark: "ringed: see the warning", filesRemoved: "its files were removed",
    warningOf: (names, warning) => `${names.length > 3 ? `${names[0]} and ${number(names.length - 1)} more` : names.join(", ")}: ${warning}`,
    chatWithStep: "Chat with this step", compareBefore: "Compare with the step before",
    questionForBoth: "Question", compareLatest: "Previous against latest", compareBoth: "Latest against latest",
    valueIs: (name, value) => `${name}: ${value}`, changeIs: change => `${change} since the step before`,
    loadedNow: names => names ? `In memory: ${names}.` : "No step is in memory; a question loads its step.", loadingNow: names => `Being loaded: ${names}.`,
    scoringNow: names => `Being scored: ${names}.`, toScore: count => `${plural(count, "step waits", "steps wait")} for a score.`, scoring: "being scored",
    exportOf: name => `Export ${name}`, exporting: "being exported", exported: name => `exported as ${name}`,
    chatWith: name => `Chat with ${name}`, compareWith: name => `Compare ${name} with the step before`,
    runColumns: {step: "Step", change: "Change", state: "State", acts: "Try it"}, stepStates: {removed: "files removed"},
  },
  bind() {
    $("run-step").oninput = ({target}) => choose(allSteps()[target.value]?.id);
    $("run-chat").onclick = () => chatWith(stepNamed(shownRun.at));
    $("run-before").onclick = () => compareWithBefore(stepNamed(shownRun.at));
    $("run-metric").onchange = ({target}) => { Object.assign(shownRun, {metric: target.value, chosen: true}); Page.render(); };
    $("run-axis").onchange = ({target}) => { shownRun.axis = target.value; Page.render(); };
    $("run-other").onchange = ({target}) => showBeside(target.value);
    $("runs").onchange = ({target}) => openRun(target.value, shownRun.other);
    $("run-compare").onsubmit = event => {
      event.preventDefault();
      compareSteps(latestTwo().map(({id}) => id));
    };
    new ResizeObserver(() => {
      if (!shownRun?.charts.size) return;
      drawCurves();
    }).observe($("run"));
  },
  view: {isOpen: () => Boolean(shownRun), close: closeRun},
  render: renderRun,
  recoloured() { shownRun?.charts.forEach(({plot}) => plot.redraw()); },
});

return Object.freeze({open: openRun, get shown() { return shownRun; }});
})();
