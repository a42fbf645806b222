// The server at a glance, at /#server: /stats and /metrics, drawn since the server started.
"use strict";

const Status = (() => {

const {TEXT, $, element, button, setText, number, plural, inOrder} = Parts;

let glanced = null;                // {samples, looks: histograms of the first and the latest polls, charts, timer} while the view is open

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
  glanced = {isNews: inOrder(), samples: [], looks: [], charts: null, timer: setInterval(lookAtServer, STATUS_MS)};
  Page.render();
  $("status").focus({preventScroll: true});
  Promise.all([Parts.need("charts"), Parts.need("uplot"), lookBack(glanced)]).then(lookAtServer);
}

// What the server sampled before the view was opened. One that keeps no history, or does not show it to this key, is drawn from now on.
async function lookBack(mine) {
  const past = await Server.jsonOf(Server.request("stats/history", {signal: AbortSignal.timeout(Server.HEALTH_MS)}));
  if (mine !== glanced || !Array.isArray(past?.samples) || !Array.isArray(past.fields)) return;
  const at = Object.fromEntries(past.fields.map((name, i) => [name, i]));
  mine.samples.unshift(...past.samples.filter(Array.isArray).map(values => {
    const of = name => values[at[name]] ?? null;
    return {at: of("at"), queued: of("queued"), running: of("running"), speed: of("tokens_per_second"), pages: of("kv_pages_used"), memory: of("memory_used"),
      firstToken: [of("ttft_ms"), of("ttft_ms_p95")], interToken: [of("itl_ms"), of("itl_ms_p95")]};
  }));
}

function closeStatus() {
  if (!glanced) return;
  clearInterval(glanced.timer);
  glanced.charts?.forEach(({plot}) => plot.destroy());
  glanced = null;
  $("status-charts").replaceChildren();
}

async function lookAtServer() {
  if (document.hidden && glanced?.samples.length) return;
  const mine = glanced, isNews = mine?.isNews(), options = {signal: AbortSignal.timeout(Server.HEALTH_MS)};
  const [stats, metrics] = await Promise.all([Server.jsonOf(Server.request("stats", options)),
    Server.request("metrics", options).then(response => response.ok ? response.text() : "").catch(() => "")]);
  if (!mine || mine !== glanced || !isNews()) return;
  if (stats) addSample(glanced, stats, readMetrics(metrics));
  setText($("status-about"), stats ? TEXT.statusAbout(stats) : Server.trouble() || TEXT.noStatus);
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
  const since = name => percentiles(looks.at(-1), new Map(), name).map(value => value === null ? "–" : TEXT.milliseconds(value)).join(" / ");
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
    each.gpu_id, each.node ? `${each.node} ${each.device}` : each.device, TEXT.workerState(each), number(each.running ?? 0), number(each.restarts ?? 0)]));
  $("status-runs").replaceChildren(...Views.runsOf().map(run => button(`${TEXT.trainingRun} ${run}`, "chart", () => Views.openRun(run))));
  if (typeof uPlot === "function" && typeof Charts !== "undefined") drawCharts(samples);
}

function fillTable(id, names, rows) {
  $(id).parentElement.hidden = !rows.length;
  $(id).replaceChildren(element("thead", {}, element("tr", {}, ...names.map(name => element("th", {textContent: TEXT.columns[name], scope: "col"})))),
    element("tbody", {}, ...rows.map(row => element("tr", {}, ...row.map(text => element("td", {textContent: text}))))));
}

function drawCharts(samples) {
  glanced.charts ??= CHARTS.map(([name, write, values]) => {
    const box = element("div", {className: "chart", role: "img"});
    $("status-charts").append(element("figure", {}, element("figcaption", {textContent: TEXT.status[name]}), box));
    return {name, write, values, box, plot: Charts.make(box, {write, lines: values(samples[0]).length})};
  });
  for (const {values, plot, box, name, write} of glanced.charts) {
    const lines = samples.map(values), now = lines.at(-1).map(value => value === null ? "–" : write(value)).join(" / ");
    box.setAttribute("aria-label", `${TEXT.status[name]}: ${now}`);
    Charts.draw(plot, box, [samples.map(({at}) => at), ...lines[0].map((_, line) => lines.map(each => each[line]))]);
  }
}

Parts.register({
  strings: {
    noStatus: "Server status is unavailable.", milliseconds: ms => ms < 999.5 ? `${ms < 9.95 ? ms.toFixed(1) : Math.round(ms)} ms` : TEXT.seconds(ms / 1000),
    status: {throughput: "Tokens per second", firstToken: "First token (median / 95 %)", interToken: "Between tokens (median / 95 %)", requests: "Running / waiting",
      pages: "KV pages in use", memory: "Memory", workers: "Workers ready", restarts: "Worker restarts", delayed: "Answers delayed by a worker's end"},
    statusAbout: ({model, uptime_s: seconds = 0, workers = []}) => [model, [...new Set(workers.map(({device}) => TEXT.device(device)))].join(", "),
      seconds ? `up for ${seconds < 5400 ? plural(Math.round(seconds / 60), "minute", "minutes") : plural(Math.round(seconds / 3600), "hour", "hours")}` : ""].filter(Boolean).join(" · "),
    workerState: ({state, problem, without = []}) => [problem ? `${state}: ${problem}` : state, ...without.map(reason => `without ${reason}`)].filter(Boolean).join("; "),
    columns: {model: "Model", state: "State", bytes: "In memory", bits: "Bits per byte", worker: "Worker", device: "Device", running: "Running", restarts: "Restarts"},
  },
  view: {isOpen: () => Boolean(glanced), close: closeStatus},
  render() {
    $("status").hidden = !glanced;
    $("status-usage").firstChild.href = `${Server.home()}usage`;
  },
  recoloured() { glanced?.charts?.forEach(({plot}) => plot.redraw()); },
});

return Object.freeze({open: openStatus, close: closeStatus, look: lookAtServer, addSample, show: showStatus, get shown() { return glanced; }});
})();
