// The server at a glance, at /#server: /stats and /metrics, drawn since the view was opened.
"use strict";

let glanced = null;                // {samples, looks: histograms of the first and the latest polls, charts, timer} while the view is open

{

const STATUS_MS = 2000;           // between two polls of the server
const WINDOW = 15;                // polls that a point's percentiles cover
const MOST_SAMPLES = 1800;        // an hour's worth

const CHARTS = [                  // name, formatter, and a sample's values, one for each line
  ["throughput", value => TEXT.speed(value), sample => [sample.speed]],
  ["firstToken", value => TEXT.milliseconds(value), sample => sample.firstToken],
  ["interToken", value => TEXT.milliseconds(value), sample => sample.interToken],
  ["requests", value => number(value), sample => [sample.running, sample.queued]],
  ["pages", value => number(value), sample => [sample.pages]],
  ["memory", value => TEXT.bytes(value), sample => [sample.memory]],
];
const SHARES = [0.5, 0.95];       // the percentiles shown

function openStatus() {
  if (location.hash !== "#server") history.pushState(null, "", `${location.pathname}${location.search}#server`);
  if (glanced) return;
  glanced = {isNews: inOrder(), samples: [], looks: [], charts: null, runs: {}, timer: setInterval(lookAtServer, STATUS_MS)};
  render();
  $("status").focus({preventScroll: true});
  need("uplot").then(lookAtServer);
}

function closeStatus() {
  if (!glanced) return;
  clearInterval(glanced.timer);
  [...glanced.charts ?? [], ...Object.values(glanced.runs)].forEach(({plot}) => plot.destroy());
  glanced = null;
  $("status-charts").replaceChildren();
}

async function lookAtServer() {
  if (document.hidden && glanced?.samples.length) return;
  const mine = glanced, isNews = mine?.isNews(), options = {signal: AbortSignal.timeout(HEALTH_MS)};
  const [stats, metrics] = await Promise.all([jsonOf(request("stats", options)),
    request("metrics", options).then(response => response.ok ? response.text() : "").catch(() => "")]);
  if (!mine || mine !== glanced || !isNews()) return;
  if (stats) addSample(glanced, stats, readMetrics(metrics));
  setText($("status-about"), stats ? TEXT.statusAbout(stats) : serverText() || TEXT.noStatus);
  if (stats) showStatus(stats, glanced);
}

const sum = (list, value) => list.reduce((total, each) => total + (value(each) ?? 0), 0);

function addSample({samples, looks}, {workers = [], queue_depth: queued = 0}, metrics) {
  looks.push(metrics);
  if (looks.length > WINDOW) looks.splice(1, 1);        // the first stays
  const before = looks[looks.length < WINDOW ? 0 : 1];
  if (samples.length === MOST_SAMPLES) samples.shift();
  samples.push({at: Date.now() / 1000, queued, firstToken: percentiles(metrics, before, "time_to_first_token"),
    interToken: percentiles(metrics, before, "inter_token_latency"), running: sum(workers, each => each.running), speed: sum(workers, each => each.tokens_per_second),
    pages: sum(workers, each => each.kv_pages_used), memory: sum(workers, each => each.memory_used)});
}

// Map: name of a histogram -> [[upper bound, count up to it]], from Prometheus text.
function readMetrics(text) {
  const found = new Map();
  for (const [, name, bound, count] of text.matchAll(/^chat_server_(\w+)_seconds_bucket\{le="([^"]+)"\} (\S+)$/gm)) {
    if (!found.has(name)) found.set(name, []);
    found.get(name).push([bound === "+Inf" ? Infinity : Number(bound), Number(count)]);
  }
  return found;
}

// The percentiles in milliseconds of what was counted between two polls; null if nothing was.
function percentiles(metrics, before, name) {
  const earlier = before.get(name) ?? [], buckets = (metrics.get(name) ?? []).map(([bound, count], i) => [bound, count - (earlier[i]?.[1] ?? 0)]);
  const all = buckets.at(-1)?.[1] ?? 0;
  return SHARES.map(share => {
    const i = buckets.findIndex(([, count]) => count >= share * all);
    if (!all || i < 0) return null;
    const [low, below] = buckets[i - 1] ?? [0, 0], [high, count] = buckets[i];
    return 1000 * (high === Infinity ? low : low + (high - low) * (share * all - below) / Math.max(1, count - below));
  });
}

function showStatus(stats, {samples, looks}) {
  const {workers = [], models = []} = stats, last = samples.at(-1), ready = workers.filter(({state}) => state === "ready").length;
  const since = name => percentiles(looks.at(-1), looks[0], name).map(value => value === null ? "–" : TEXT.milliseconds(value)).join(" / ");
  const facts = [["throughput", TEXT.speed(last.speed)], ["firstToken", since("time_to_first_token")], ["interToken", since("inter_token_latency")],
    ["requests", `${number(last.running)} / ${number(last.queued)}`], ["pages", `${number(last.pages)} / ${number(sum(workers, each => each.kv_pages_total))}`],
    ["memory", TEXT.bytes(last.memory)], ["workers", `${ready} / ${workers.length}`], ["restarts", number(sum(workers, each => each.restarts))],
    ...(stats.delayed_answers === undefined ? [] : [["delayed", number(stats.delayed_answers)]])];
  $("status-facts").replaceChildren(...facts.map(([name, text]) => element("div", {}, element("dt", {textContent: TEXT.status[name]}), element("dd", {textContent: text}))));
  const scored = models.some(each => typeof each.bits_per_byte === "number");
  fillTable("status-models", ["model", "state", "bytes", ...(scored ? ["bits"] : [])], models.map(({id, state: loaded, reason, bits_per_byte: bits, ...sizes}) =>
    [id, reason ? `${loaded}: ${reason}` : loaded, loaded !== "unloaded" ? TEXT.sizesOf(sizes) : "", ...(scored ? [bits?.toFixed(3) ?? ""] : [])]));
  const several = new Set(workers.map(({model}) => model)).size > 1;
  fillTable("status-workers", [...(several ? ["model"] : []), "worker", "device", "state", "running", "restarts"], workers.map(each => [...(several ? [each.model] : []),
    each.gpu_id, each.node ? `${each.node} ${each.device}` : each.device, each.state, number(each.running ?? 0), number(each.restarts ?? 0)]));
  if (typeof uPlot === "function") { drawCharts(samples); drawRuns(models); }
}

// Training runs: how well their checkpoints predict a text, by step.
function drawRuns(models) {
  const steps = models.filter(({run, bits_per_byte: bits}) => run && typeof bits === "number").sort((a, b) => a.step - b.step);
  for (const run of new Set(steps.map(each => each.run))) {
    const points = steps.filter((each, i) => each.run === run && steps.findIndex(other => other.run === run && other.step === each.step) === i);
    if (points.length < 2) continue;
    const chart = glanced.runs[run] ??= makeChart([TEXT.bitsOf(run), value => value.toFixed(3)], 1, step => number(step));
    const bits = points.map(each => each.bits_per_byte);
    chart.plot.setData([points.map(({step}) => step), bits]);
    chart.figure.setAttribute("aria-label", points.map(({step, bits_per_byte: each}) => `${number(step)}: ${each.toFixed(3)}`).join(", "));
  }
}

function fillTable(id, names, rows) {
  $(id).parentElement.hidden = !rows.length;
  $(id).replaceChildren(element("thead", {}, element("tr", {}, ...names.map(name => element("th", {textContent: TEXT.columns[name], scope: "col"})))),
    element("tbody", {}, ...rows.map(row => element("tr", {}, ...row.map(text => element("td", {textContent: text}))))));
}

function drawCharts(samples) {
  glanced.charts ??= CHARTS.map(chart => makeChart(chart, chart[2](samples[0]).length));
  const times = samples.map(({at}) => at);
  for (const {values, plot, figure, name, write} of glanced.charts) {
    const lines = samples.map(values), data = [times, ...lines[0].map((_, line) => lines.map(each => each[line]))];
    const now = lines.at(-1).map(value => value === null ? "–" : write(value)).join(" / ");
    figure.setAttribute("aria-label", `${TEXT.status[name]}: ${now}`);
    plot.setData(data);
    const width = figure.clientWidth;
    if (width && plot.width !== width) plot.setSize({width, height: plot.height});
  }
}

function redrawCharts() {
  for (const {plot} of [...glanced?.charts ?? [], ...Object.values(glanced?.runs ?? {})]) plot.redraw();
}

function makeChart([name, write, values], lines, shownAt = at => new Date(1000 * at).toLocaleTimeString()) {
  const figure = element("div", {className: "chart"});
  figure.setAttribute("role", "img");
  $("status-charts").append(element("figure", {}, element("figcaption", {textContent: TEXT.status[name] ?? name}), figure));
  const font = "11px system-ui, sans-serif", grid = {stroke: () => resolved("--line"), width: 1}, line = stroke => ({stroke: () => resolved(stroke), width: 1.5, points: {show: !values, size: 5, fill: () => resolved(stroke)}});
  const axis = {stroke: () => resolved("--soft"), font, grid, ticks: {show: false}};
  const plot = new uPlot({width: figure.clientWidth || 300, height: 120, legend: {show: false}, cursor: {show: false}, padding: [8, 12, 0, 0],
    scales: {x: {time: Boolean(values)}, y: {range: (_, low, high) => !values ? [low - (high - low) / 10, high + (high - low) / 10] : [0, high > 0 ? high * 1.1 : 1]}},
    axes: [{...axis, size: 24, space: 90, values: (_, ticks) => ticks.map(shownAt)}, {...axis, size: (_, texts) => 12 + 6.5 * Math.max(8, ...(texts ?? []).map(text => text.length)), space: 34, values: (_, ticks) => ticks.map(write)}],
    series: [{}, line("--accent"), line("--amber")].slice(0, 1 + lines)}, [[], [], []].slice(0, 1 + lines), figure);
  return {name, write, values, plot, figure};
}

// One of the page's colours in a form that canvas accepts: an element's computed style resolves light-dark().
function resolved(variable) {
  $("status").style.setProperty("outline-color", `var(${variable})`);
  return getComputedStyle($("status")).outlineColor;
}

register({
  strings: {
    serverStatus: "Server status", backToChat: "Back to the chat", noStatus: "Server status is unavailable.", milliseconds: ms => ms < 999.5 ? `${ms < 9.95 ? ms.toFixed(1) : Math.round(ms)} ms` : TEXT.seconds(ms / 1000),
    status: {throughput: "Tokens per second", firstToken: "First token (median / 95 %)", interToken: "Between tokens (median / 95 %)", requests: "Running / waiting",
      pages: "KV pages in use", memory: "Memory", workers: "Workers ready", restarts: "Worker restarts", delayed: "Answers delayed by a worker's end"}, bitsOf: run => `Bits per byte of ${run}, by step`,
    statusAbout: ({model, uptime_s: seconds = 0, workers = []}) => [model, [...new Set(workers.map(({device}) => TEXT.device(device)))].join(", "),
      seconds ? `up for ${seconds < 5400 ? plural(Math.round(seconds / 60), "minute", "minutes") : plural(Math.round(seconds / 3600), "hour", "hours")}` : ""].filter(Boolean).join(" · "),
    columns: {model: "Model", state: "State", bytes: "In memory", bits: "Bits per byte", worker: "Worker", device: "Device", running: "Running", restarts: "Restarts"},
  },
  bind() {
    $("leave-status").onclick = () => openChat(state.chat.id).then(focusAfterClick);
  },
  menu: () => state.model.ours ? [[TEXT.serverStatus, "chart", openStatus]] : [],
  view: {hash: "#server", open: openStatus, isOpen: () => Boolean(glanced), close: closeStatus},
  render() { $("status").hidden = !glanced; },
  recoloured: redrawCharts,
});

share({openStatus, closeStatus, lookAtServer, addSample, showStatus});
}
