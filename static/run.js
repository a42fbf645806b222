// A training run, at /#run/TAG: the curve over its steps, what is loaded and scored now, a chat with a step, two steps side by side.
"use strict";

let shownRun = null;              // {name, at: the chosen step, metric, known: metrics by step, chart, drawn, timer} while the view is open

{

const LOOK_MS = 2000;             // between two looks at the server
const BITS = "bits_per_byte";

// What the curve and the table show of a step. Bits per byte are in the list of models, all metrics in /v1/runs/TAG.
const valueOf = ({id, bits_per_byte: bits}, metric = shownRun.metric) => metric === BITS ? bits : shownRun.known.get(id)?.[metric];
const write = value => Math.abs(value) < 1000 ? value.toFixed(3) : new Intl.NumberFormat(undefined, {notation: "compact", maximumSignificantDigits: 4}).format(value);
const isScored = step => typeof step.bits_per_byte === "number";
const hasValue = step => typeof valueOf(step) === "number";
const isReady = step => step.state === "ready";
const nameOf = metric => TEXT.metrics[metric] ?? metric;

// The run's entries in the list of models, the earliest first.
const entriesOf = run => stepsOfRun(run).map(name => state.models.find(({id}) => id === name));

// Without a name: the run of the chat's model, else the first one, once the server has listed its models.
function openRun(given) {
  const name = given || runsOf()[0] || "", hash = name ? `#run/${encodeURIComponent(name)}` : "#run", isOpen = Boolean(shownRun), unnamed = /^#run\/?$/.test(location.hash);
  if (location.hash !== hash) history[unnamed ? "replaceState" : "pushState"](null, "", location.pathname + location.search + hash);
  closeRun();
  shownRun = {name, at: null, metric: BITS, chosen: false, known: new Map(), found: [], isNews: inOrder(), chart: null, drawn: "", timer: setInterval(look, LOOK_MS)};
  $("run-question").value ||= lastQuestion();
  render();
  if (!isOpen) $("run").focus({preventScroll: true});
  look();
  Promise.all([need("charts"), need("uplot")]).then(render);
}

async function look() {
  const mine = shownRun, isNews = mine.isNews();
  lookAtModels();
  if (!mine.name) return;
  const found = await jsonOf(request(`v1/runs/${encodeURIComponent(mine.name)}`, {signal: AbortSignal.timeout(HEALTH_MS)}));
  if (!found?.steps || mine !== shownRun || !isNews()) return;
  mine.known = new Map(found.steps.map(({model, metrics}) => [model, metrics ?? {}]));
  mine.found = found.steps;
  if (found.steps.some(({samples, judged}) => samples?.length || judged)) need("evals").then(() => { if (mine === shownRun) { mine.drawn = ""; render(); } });
  render();
}

const FIRST = ["val_bpb", "core_metric"];          // of the other metrics

// The metrics that any step has, bits per byte first. Where no step has these, another is shown until the reader chooses.
function metricsOf(steps) {
  const names = new Set(steps.flatMap(({id}) => Object.keys(shownRun.known.get(id) ?? {})));
  names.delete(BITS);
  const found = [...(steps.some(isScored) ? [BITS] : []), ...[...names].sort((a, b) => FIRST.includes(b) - FIRST.includes(a) || FIRST.indexOf(a) - FIRST.indexOf(b) || (a < b ? -1 : 1))];
  if (!shownRun.chosen) shownRun.metric = found[0] ?? BITS;
  return found;
}

function closeRun() {
  if (!shownRun) return;
  clearInterval(shownRun.timer);
  shownRun.chart?.destroy();
  shownRun = null;
  $("run-curve").replaceChildren();
}

// What the chat asked last, or the first example.
const lastQuestion = () => state.path.findLast(({role}) => role === "user")?.content ?? TEXT.examples[0];

function renderRun() {
  $("run").hidden = !shownRun;
  if (!shownRun) return;
  if (!shownRun.name && runsOf().length) { openRun(); return; }
  const {name} = shownRun, steps = entriesOf(name), key = JSON.stringify([steps, shownRun.at, shownRun.metric, [...shownRun.known], shownRun.found, typeof makeChart, typeof uPlot, state.phase]);
  if (shownRun.drawn === key) return;
  shownRun.drawn = key;
  shownRun.at ??= steps.at(-1)?.id ?? null;
  const runs = runsOf(), metrics = metricsOf(steps);
  $("run-metric").parentElement.hidden = metrics.length < 2;
  $("run-metric").replaceChildren(...metrics.map(metric => element("option", {value: metric, textContent: nameOf(metric), selected: metric === shownRun.metric})));
  setText($("run-title"), name ? TEXT.runTitle(name) : TEXT.trainingRun);
  $("runs").hidden = runs.length < 2;
  $("runs").replaceChildren(...[...runs].sort().map(run => element("option", {value: run, textContent: run, selected: run === name})));
  setText($("run-about"), steps.length ? TEXT.runAbout(steps) : state.phase === "ready" ? TEXT.noRun(name) : serverText());
  setText($("run-now"), nowText(steps));
  $("run-compare").hidden = steps.filter(({state: loaded}) => loaded !== "failed").length < 2 || !steps.at(-1).capabilities?.compare;
  drawCurve(steps);
  showStep(steps);
  listSteps(steps);
  $("run-more").replaceChildren(...parts.flatMap(({run}) => run?.nodes(steps, shownRun.found) ?? []));
}

// What is in memory, what is scored now, and how many steps wait for it.
function nowText(steps) {
  const named = of => steps.filter(of).map(({id}) => id).join(", "), waiting = steps.filter(step => !isScored(step) && step.state !== "failed").length;
  return !steps.length ? "" : [TEXT.loadedNow(named(isReady)), ...[["loading", TEXT.loadingNow], ["scoring", TEXT.scoringNow]].map(([what, text]) => {
    const found = named(step => what === "loading" ? step.state === "loading" : step.scoring);
    return found && text(found);
  }), waiting && steps.some(step => isScored(step) || step.scoring) ? TEXT.toScore(waiting) : ""].filter(Boolean).join(" ");
}

// the curve ------------------------------------------------------------------------------------------------------------

function drawCurve(steps) {
  const scored = steps.filter(hasValue), box = $("run-curve"), several = scored.length > 1;
  setText($("run-caption"), several ? TEXT.curve(nameOf(shownRun.metric), /^(bits_per_byte|(min_)?val_bpb)$/.test(shownRun.metric)) : steps.length ? TEXT.noCurve(scored.length) : "");
  box.hidden = !several;
  if (!several || typeof uPlot !== "function" || typeof makeChart !== "function") return;
  if (!shownRun.chart) {
    shownRun.mark = element("i", {className: "mark", hidden: true});
    shownRun.chart = makeChart(box, {write, steps: true, onDraw: placeMark});
    shownRun.chart.over.append(shownRun.mark);
    shownRun.chart.over.onmousemove = event => choose(nearest(event));
    shownRun.chart.over.onclick = event => chatWith(nearest(event));
  }
  drawChart(shownRun.chart, box, [scored.map(({step}) => step), scored.map(step => valueOf(step))]);
  box.setAttribute("aria-label", scored.map(step => `${number(step.step)}: ${write(valueOf(step))}`).join(", "));
}

// The name of the scored step whose point is nearest to the mouse.
function nearest({clientX}) {
  const scored = entriesOf(shownRun.name).filter(hasValue), {chart} = shownRun;
  return scored[chart.posToIdx(clientX - chart.over.getBoundingClientRect().left)]?.id;
}

function placeMark() {
  const {chart, mark, at} = shownRun ?? {}, step = chart && entriesOf(shownRun.name).find(({id}) => id === at);
  if (!mark) return;
  mark.hidden = !step || !hasValue(step);
  if (mark.hidden) return;
  mark.style.left = `${chart.valToPos(step.step, "x")}px`;
  mark.style.top = `${chart.valToPos(valueOf(step), "y")}px`;
}

// the chosen step ------------------------------------------------------------------------------------------------------

function choose(name) {
  if (!name || shownRun.at === name) return;
  shownRun.at = name;
  render();
}

function showStep(steps) {
  const at = steps.findIndex(({id}) => id === shownRun.at), step = steps[at], slider = $("run-step");
  $("run-slider").hidden = steps.length < 2;
  slider.max = Math.max(0, steps.length - 1);
  slider.value = at;
  slider.setAttribute("aria-valuetext", step?.id ?? "");
  setText($("run-chosen"), step ? TEXT.stepIs(step, hasValue(step) ? TEXT.valueIs(nameOf(shownRun.metric), write(valueOf(step))) : "", changeAt(steps, at)) : "");
  $("run-chat").disabled = !step || step.state === "failed";
  $("run-before").hidden = $("run-compare").hidden;
  $("run-before").disabled = !before(steps, at);
  placeMark();
}

// The step before that can answer; undefined if there is none.
const before = (steps, at) => steps[at]?.state === "failed" ? undefined : steps.slice(0, Math.max(0, at)).findLast(({state: loaded}) => loaded !== "failed");

// By how much a step's value differs from that of the scored step before, with a sign; "" if there is none.
function changeAt(steps, at) {
  const step = steps[at], last = steps.slice(0, at).findLast(hasValue);
  if (!last || !hasValue(step)) return "";
  const by = valueOf(step) - valueOf(last);
  return `${by < 0 ? "−" : "+"}${write(Math.abs(by))}`;
}

function chatWith(name) {
  if (!name) return;
  newChat();
  chooseModel(name);
  focusAfterClick();
}

function compareWithBefore(name) {
  const steps = entriesOf(shownRun.name), at = steps.findIndex(({id}) => id === name);
  compareSteps([before(steps, at)?.id, name]);
}

function compareSteps(names) {
  const question = $("run-question").value.trim();
  if (!question) return $("run-question").focus();
  return compareModels(question, names);
}

// the table ------------------------------------------------------------------------------------------------------------

function listSteps(steps) {
  const focused = document.activeElement?.dataset?.act;
  const cell = (text, more = {}) => element("td", {textContent: text, ...more});
  const act = (name, icon, label, onclick, disabled) => {
    const made = iconButton(label, icon, onclick);
    made.disabled = disabled;
    made.dataset.act = `${icon} ${name}`;
    return made;
  };
  const compares = !$("run-compare").hidden;
  $("run-steps").replaceChildren(element("thead", {}, element("tr", {}, ...["step", "value", "change", "state", "acts"].map(name =>
    element("th", {textContent: name === "value" ? nameOf(shownRun.metric) : TEXT.runColumns[name], scope: "col"})))), element("tbody", {}, ...steps.map((step, at) => {
    const {id, state: loaded, reason, loading} = step, failed = loaded === "failed";
    const acts = [act(id, "new", TEXT.chatWith(id), () => chatWith(id), failed),
      ...(compares ? [act(id, "columns", TEXT.compareWith(id), () => compareWithBefore(id), !before(steps, at))] : [])];
    return element("tr", {}, cell(number(step.step)), cell(hasValue(step) ? write(valueOf(step)) : ""), cell(changeAt(steps, at)),
      cell([TEXT.modelStates[loaded] ?? loaded, loading ? `${Math.floor(100 * loading)}\u00a0%` : "", step.scoring ? TEXT.scoring : "", reason ?? ""].filter(Boolean).join(" ")),
      element("td", {className: "acts"}, ...acts));
  }).reverse()));
  $("run-steps").parentElement.hidden = !steps.length;
  if (focused) $("run-steps").querySelector(`[data-act="${CSS.escape(focused)}"]`)?.focus();
}

register({
  strings: {
    runTitle: name => `Training run ${name}`, noRun: name => name ? `The server has no training run ${name}.` : "The server serves no training run: --watch serves one.",
    runAbout: steps => `${plural(steps.length, "step", "steps")}${steps.length > 1 ? `, ${number(steps[0].step)} to ${number(steps.at(-1).step)}` : ""} · the latest is ${steps.at(-1).id}`,
    curve: (name, less) => `${name} over the steps${less ? " (less is better)" : ""}. A click on a point begins a chat with that step.`, metric: "Metric",
    metrics: {bits_per_byte: "Bits per byte", val_bpb: "Validation bits per byte", min_val_bpb: "Least validation bits per byte", total_training_time: "Training time in seconds", tokens: "Tokens trained on"},
    noCurve: scored => scored ? "The curve appears with the second score." : "No step is scored yet. A server with --watch-text FILE scores each by how well it predicts that text.",
    chatWithStep: "Chat with this step", compareBefore: "Compare with the step before",
    questionForBoth: "Question", compareLatest: "Previous against latest",
    valueIs: (name, value) => `${name}: ${value}`, stepIs: ({id, reason}, value, change) => [id, value, change && `${change} since the step before`, reason].filter(Boolean).join(" · "),
    loadedNow: names => names ? `In memory: ${names}.` : "No step is in memory; a question loads its step.", loadingNow: names => `Being loaded: ${names}.`,
    scoringNow: names => `Being scored: ${names}.`, toScore: count => `${plural(count, "step waits", "steps wait")} for a score.`, scoring: "being scored",
    chatWith: name => `Chat with ${name}`, compareWith: name => `Compare ${name} with the step before`,
    runColumns: {step: "Step", change: "Change", state: "State", acts: "Try it"},
  },
  bind() {
    $("run-step").oninput = ({target}) => choose(entriesOf(shownRun.name)[target.value]?.id);
    $("run-chat").onclick = () => chatWith(shownRun.at);
    $("run-before").onclick = () => compareWithBefore(shownRun.at);
    $("run-metric").onchange = ({target}) => { Object.assign(shownRun, {metric: target.value, chosen: true}); render(); };
    $("runs").onchange = ({target}) => openRun(target.value);
    $("run-compare").onsubmit = event => {
      event.preventDefault();
      compareSteps(entriesOf(shownRun.name).filter(({state: loaded}) => loaded !== "failed").slice(-2).map(({id}) => id));
    };
    new ResizeObserver(() => {
      if (!shownRun?.chart) return;
      shownRun.drawn = "";
      render();
    }).observe($("run"));
  },
  view: {isOpen: () => Boolean(shownRun), close: closeRun},
  render: renderRun,
  recoloured() { shownRun?.chart?.redraw(); },
});

share({openRun});
}
