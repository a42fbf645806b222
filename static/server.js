// Talking to a server: which one and with which key, its health and model, and the events of an answer.
//
// The page uses /v1/chat/completions, or nanochat's /chat/completions if a server has only that. `readEvent`
// turns an event of either into {text, reasoning, progress, gpu, reason, usage, timings, ...}; nothing else
// knows the difference.
"use strict";

const Server = (() => {

const {TEXT, wait, newest, inOrder} = Parts;

const PAGE_HOME = location.protocol === "file:" ? "http://127.0.0.1:8000/"
  // keeps a path prefix; see <base> in index.html
  : location.origin + location.pathname.replace(/(\/static)?\/[^/]*$/, "/");
const SILENCE_MS = 30000;         // the server pings every 10 s
const FOREVER_MS = 2 ** 31 - 1;
const CONTINUING = ["vllm", "sglang", "llamacpp"];     // can continue a last message, but do not list it as a capability

const NO_MODEL = {name: "", context: 0, devices: [], workers: 0, can: {}, defaults: {}, ours: false, api: "v1"};

const state = {
  phase: "connecting",            // connecting, loading, ready, unreachable, refusing (this page), locked (without a key)
  reached: "",                    // the last server that was ready
  loading: {stage: "", fraction: null},
  models: [],                     // the server's models, from /v1/models
  model: {...NO_MODEL},           // the chat's model
  stats: null,                    // the server's, from /stats
  refusedKey: null,               // the API key that the server last refused, "" if none was sent
};

// address -------------------------------------------------------------------------------------------------------------

const serverHome = () => Settings.preferences.server || PAGE_HOME;
const serverUrl = path => serverHome() + path;
const originOf = url => new URL(url).origin;
const pageOrigin = () => location.protocol === "file:" ? "null" : location.origin;
const isElsewhere = () => originOf(serverHome()) !== location.origin;

// A key is sent only to the origin it was entered for.
const serverKey = () => Settings.preferences.keys[originOf(serverHome())] ?? "";

// "host:8000", "http://host/chat" ... as a base address that ends in a slash; null if it is not an address.
function serverAddress(text) {
  try {
    const url = new URL(/^[a-z]+:\/\//i.test(text) ? text : `http://${text}`);
    if (!/^https?:$/.test(url.protocol) || url.username || url.password || !/^([\w.-]+|\[[\da-f:]+\])$/.test(url.hostname)) return null;
    return url.origin + url.pathname.replace(/\/(v1\/?)?$/, "").replace(/\/*$/, "/");
  } catch (error) {
    return null;
  }
}

class Lost extends Error {}       // the connection, not the answer

// The server answered with an error.
class Refused extends Error {
  constructor(message, {status, retryAfter = 0, code = "", param = ""}) {
    super(message);
    Object.assign(this, {status, retryAfter, code, param});
  }
}

async function request(path, options = {}) {
  const headers = {...options.headers}, key = serverKey(), home = serverHome();
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    const response = await fetch(home + path, {...options, headers});
    if (response.status === 401 && home === serverHome() && key === serverKey()) lock(key);
    return response;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(TEXT.noAnswer(home, originOf(home) !== location.origin && pageOrigin()));
  }
}

// The server wants another key. The Server dialog opens once for each refused key: the reader may close it unchanged.
function lock(key) {
  const isNews = state.refusedKey !== key;
  Object.assign(state, {phase: "locked", refusedKey: key});
  Page.render();
  if (isNews) Settings.openServer();
}

const post = (path, body, options = {}) => request(path, {...options, method: "POST", body: JSON.stringify(ASKING.includes(path) && Chat.current.temporary ? {...body, ...forgotten()} : body),
  headers: {"Content-Type": "application/json", ...options.headers}});

// The body of a response as JSON; null for anything else, also for an error status or no answer.
const jsonOf = answer => answer.then(response => response.ok ? response.json() : null).catch(() => null);

async function errorOf(response) {
  const text = await response.text();
  let body = null;
  try { body = JSON.parse(text); } catch (error) { /* not JSON, perhaps a proxy's page */ }
  const plain = text.startsWith("<") ? "" : text.slice(0, 300);
  const found = (errorText(body) || plain || response.statusText || TEXT.refused).trim().replace(/\.$/, "");
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  return new Refused(sentence(`${found} (HTTP ${response.status}${retryAfter ? TEXT.retryIn(retryAfter) : ""})`),
    {status: response.status, retryAfter, code: body?.error?.code ?? "", param: body?.error?.param ?? ""});
}

// The message in {"error": {"message"}}, {"error": "..."} or {"detail": ...}, else "".
function errorText(body) {
  const found = body?.error?.message ?? body?.error ?? body?.detail ?? "";
  return typeof found === "string" ? found : JSON.stringify(found);
}

// A server's message as a sentence. A first word that is a field's name, such as max_tokens, keeps its case.
const sentence = text => text.replace(/^\p{Ll}[\p{L}-]*(?=[\s,;:]|$)/u, word => word[0].toUpperCase() + word.slice(1)).replace(/[^.!?…]$/, "$&.");

// health and models ---------------------------------------------------------------------------------------------------

const HEALTH_MS = 8000;           // a server that takes longer counts as unreachable
const GLANCE_MS = 15000;          // how often an idle page checks its server

const watching = newest();        // only the newest watcher of /health continues
const healthAsked = inOrder(), listing = inOrder();
const waiting = [];               // resolvers, called when the server is ready

// Forgets the server that was used before, and watches the one whose address is set now.
function startAnew() {
  Object.assign(state, {phase: "connecting", reached: "", models: [], model: {...NO_MODEL}});
  Page.render();
  watchServer();
}

// Polls /health until the server is ready, then reads its models.
async function watchServer() {
  const isMine = watching();
  for (let pause = 400; isMine(); pause = Math.min(pause * 1.4, 5000)) {
    const isNews = healthAsked(), found = await askHealth();
    if (!isMine()) return;
    isNews();
    if (found.phase === "ready") return describeServer(isMine);
    const news = found.phase !== state.phase || JSON.stringify(found.loading) !== JSON.stringify(state.loading);
    Object.assign(state, found);
    if (news) Page.render();
    await wait(pause);
  }
}

// Asks /health once. 503 means "not yet"; any other answer, even 404 from another kind of server, means "ask it".
async function askHealth() {
  const loading = {stage: "", fraction: null}, options = {cache: "no-store", signal: AbortSignal.timeout(HEALTH_MS)};
  try {
    const response = await request("health", options);
    if (response.status !== 503) return {phase: "ready", loading};
    const {loading: stated, status} = await response.json().catch(() => ({}));
    // nothing loads while a watched folder is empty
    return {phase: "loading", loading: {stage: stated?.stage ?? status ?? "", fraction: stated?.fraction ?? null, waits: status === "waiting"}};
  } catch (error) {
    // even a response that this page may not read shows that a server runs
    const runs = isElsewhere() && await fetch(serverUrl("livez"), {...options, mode: "no-cors"}).then(() => true, () => false);
    return {phase: runs ? "refusing" : "unreachable", loading};
  }
}

// Whether the server is not ready. If so, starts watching it.
async function isAway() {
  const home = serverHome(), isNews = healthAsked(), found = await askHealth();
  if (home !== serverHome()) return false;
  if (!isNews()) return state.phase !== "ready";        // a later check has finished
  if (found.phase === "ready") return false;
  Object.assign(state, found);
  Page.render();
  watchServer();
  return true;
}

// Checks the server while the page is idle.
function glance() {
  if (state.phase !== "ready" || document.hidden) return;
  isAway();
  lookAtModels();
}

// Resolves when the server is ready; rejects when the signal aborts.
const untilReady = signal => new Promise((resolve, reject) => {
  if (state.phase === "ready") return resolve();
  waiting.push(resolve);
  return signal.addEventListener("abort", () => reject(signal.reason));
});

// Why the server cannot be used; "" if it can.
function serverText() {
  if (state.phase === "ready" && state.model.api === "none") return (state.model.can.rerank ? TEXT.onlyRanks : TEXT.onlyEmbeds)(state.model.name);
  const home = serverHome();
  switch (state.phase) {
    case "connecting": return TEXT.connecting;
    case "loading": return loadingText(state.loading);
    case "unreachable": return (state.reached === home ? TEXT.serverLost : TEXT.noServer)(home);
    case "refusing": return TEXT.refusesPage(home, pageOrigin());
    case "locked": return state.refusedKey ? TEXT.wrongKey : TEXT.keyWanted;
    default: return "";
  }
}

async function describeServer(isMine) {
  const home = serverHome(), key = serverKey(), options = {signal: AbortSignal.timeout(HEALTH_MS)}, isNews = listing();
  const [models, stats] = await Promise.all([jsonOf(request("v1/models", options)), jsonOf(request("stats", options))]);
  if (!isMine()) return;
  if (models ?? stats) state.refusedKey = null;
  if (isNews()) state.models = listedModels(models);
  useModel(stats, Boolean(models?.data));
  if (keepsChats()) await Parts.need("sync");           // when the page says that it is ready, its menu is whole
  if (!isMine()) return;
  Object.assign(state, {phase: state.refusedKey === key ? "locked" : "ready", loading: {stage: "", fraction: null}, reached: home});
  Page.render();
  if (state.phase === "ready") waiting.splice(0).forEach(resolve => resolve());
}

// Whether the server that this page came from keeps chats.
const keepsChats = () => Boolean(state.stats?.annexes?.includes("chats")) && serverHome() === PAGE_HOME;

// Only our own server's list is a choice of models; of another's list, the first is used.
const listedModels = models => {
  const listed = models?.data ?? [];
  return listed.every(each => each.owned_by === "chat_server") ? listed.flatMap(withLatest) : listed.slice(0, 1);
};

// The newest step of a training run is listed twice: first by the name that follows the run.
const withLatest = model => model.run && model.aliases?.includes(`${model.run}@latest`) ? [{...model, id: `${model.run}@latest`, now: model.id}, model] : [model];

// The list's entry for the chat's model: the one stored in the chat, perhaps by an older name, else the server's default.
const chatModel = () => state.models.find(({id}) => id === Chat.current.model) ?? state.models.find(({aliases}) => aliases?.includes(Chat.current.model)) ?? state.models.find(each => each.default) ?? state.models[0];

// Makes the chat's model `state.model`. `base`: it is for texts and can chat all the same, which the chat may ask for (`inTurns`).
function useModel(stats = state.stats, lists = true) {
  const listed = state.models, entry = chatModel() ?? {};
  const devices = new Set((stats?.workers ?? []).map(worker => worker.device));
  const can = {continue_final_message: CONTINUING.includes(entry.owned_by), ...entry.capabilities};
  const base = entry.type === "text" && can.chat !== false, chats = can.chat !== false && (!base || Boolean(Chat.current.inTurns));
  const api = !lists ? "native" : chats ? "v1" : can.completion !== false ? "text" : "none";
  if (api === "text") can.continue_final_message = true;
  state.stats = stats;
  state.model = {name: entry.id ?? stats?.model ?? "", context: entry.context_length ?? stats?.context_length ?? 0,
    devices: [...devices], workers: listed.length > 1 ? 1 : stats?.workers?.length ?? 0, can,
    defaults: entry.defaults ?? {}, weights: entry.weights_digest ?? "", better: entry.better, betterSpeed: entry.better_tokens_per_second ?? 0, system: entry.system_prompt ?? null, base, ours: entry.owned_by === "chat_server", api};
}

// Asks the server to load the chosen model, if it allows that; a question would load it too.
async function loadModel() {
  if (state.models.find(({id}) => id === state.model.name)?.state !== "unloaded") return;
  await jsonOf(post("models/load", {model: state.model.name}));
  lookAtModels();
}

const LOADING_MS = 1000;          // how often the page polls while a model loads
let looking = 0;

// The states of several models change all the time. `anew`: there may be more, or fewer, than before.
async function lookAtModels(anew = false) {
  clearTimeout(looking);
  if (state.models.length < 2 && !anew || state.phase !== "ready") return;
  const home = serverHome(), isNews = listing(), models = await jsonOf(request("v1/models", {signal: AbortSignal.timeout(HEALTH_MS)}));
  if (!models?.data || home !== serverHome() || !isNews()) return;
  state.models = listedModels(models);
  useModel();
  Page.render();
  if (state.models.some(each => each.state === "loading")) looking = setTimeout(lookAtModels, LOADING_MS);
}

// The number of tokens of a text; null if the server does not count them.
async function countTokens(content) {
  const counted = await jsonOf(post("tokenize", {content, ...modelOfSeveral()}));
  return Array.isArray(counted?.tokens) ? counted.tokens.length : null;
}

// How many tokens the model's template adds around a message, with this system prompt; 0 if unknown.
const around = new Map();
function tokensAround(system) {
  const messages = [...(system.trim() ? [{role: "system", content: system}] : []), {role: "user", content: "a"}];
  const key = JSON.stringify([serverHome(), state.model.name, system]);
  if (!around.has(key)) around.set(key, templateText(messages).then(text => text && countTokens(text)).then(count => Math.max(0, (count ?? 1) - 1)));
  return around.get(key);
}

// Messages as the model's template renders them; null if the server cannot render them.
async function templateText(messages) {
  const applied = await jsonOf(post("apply-template", {messages, ...modelOfSeveral()}));
  return typeof applied?.prompt === "string" ? applied.prompt : null;
}

// answers -------------------------------------------------------------------------------------------------------------

// What a question of a temporary chat has besides.
const forgotten = () => state.model.ours ? {prompt_cache_retention: "in_memory"} : {};
const ROUTES = {v1: "v1/chat/completions", native: "chat/completions", text: "v1/completions"};
const ASKING = [...Object.values(ROUTES), "v1/compare"];

const modelOfSeveral = (name = state.model.name) => state.models.length > 1 ? {model: name || state.model.name} : {};

// Other servers require the model's name.
const modelNamed = name => state.model.ours || !state.model.name ? modelOfSeveral(name) : {model: state.model.name};

// Asks for an answer and returns its response once the server has accepted. Throws Refused, Lost, or what
// fetch throws. `place`: where the server writes the answer itself, {chat, space}.
async function postAnswer({messages, parameters, id, signal, model, goOn = false, place = null}) {
  const body = {messages, resumable: !Chat.current.temporary, ...(state.model.ours ? {stop_on_repetition: true} : {}), truncate: "oldest", progress: true, ...(state.model.can.token_ids && state.model.api !== "native" ? {return_token_ids: true} : {}),
    ...parameters};
  const headers = {Accept: "text/event-stream", "X-Request-Id": id};
  const streamed = {stream: true, stream_options: {include_usage: true, continuous_usage_stats: true}, ...modelNamed(model)};
  if (state.model.api === "text") {
    const {messages: _, truncate, ...others} = body;
    return accepted(await post(ROUTES.text, {prompt: textToContinue(messages), ...others, ...streamed}, {headers, signal}));
  }
  if (state.model.api === "v1") {
    const more = {...streamed, ...(place ? {chat: place.chat} : {}), ...(goOn ? {continue_final_message: true, add_generation_prompt: false} : {})};
    const response = await post(ROUTES.v1, {...body, ...more}, {headers: {...headers, ...(place ? {"X-Chat-Space": place.space} : {})}, signal});
    if (![404, 405].includes(response.status)) return accepted(response);
    const error = await errorOf(response);
    if (error.code === "model_not_found" || place || error.param) throw error;     // the route is there, something else is not
    state.model.api = "native";
  }
  return accepted(await post(ROUTES.native, body, {headers, signal}));
}

// The prompt for a model without a chat template: all of the text, whoever wrote it.
const textToContinue = messages => messages.map(({content}) => content).join("");

async function accepted(response) {
  if (!response.ok) throw await errorOf(response);
  return response;
}

// The rest of an answer whose connection was lost, once the server is reachable again; tries for about two
// minutes.
async function reconnected(stream, signal, onState) {
  const aborted = new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
  aborted.catch(() => {});
  onState(true);
  for (let pause = 200, tries = 0; tries < 30; pause = Math.min(2 * pause, 5000), tries++) {
    const response = await request(`v1/streams/${encodeURIComponent(stream.id)}?from=${stream.next}`, {signal, cache: "no-store"}).catch(error => {
      if (error.name === "AbortError") throw error;
    });
    onState(!response?.ok);
    if (response?.status === 200) return response;
    if (response?.status === 401) throw await errorOf(response);
    if (response && response.status < 500) return null;           // it no longer has the answer
    await Promise.race([wait(pause), aborted]);
  }
  throw new Error(TEXT.connectionLost);
}

// Yields {id, event} of each `data:` frame; the id is "" if it has none. Comments (": ping") carry no data;
// characters may be split across chunks. Throws Lost if the connection breaks, or if not even a ping arrives for
// `patience` ms: after the computer has slept, nothing reports that a connection is dead.
async function* serverEvents(body, patience) {
  const reader = body.getReader(), decoder = new TextDecoder();
  let buffer = "";
  for (let chunk; !(chunk = await readChunk(reader, patience)).done;) {
    buffer += decoder.decode(chunk.value, {stream: true});
    const frames = buffer.split(/\r?\n\r?\n/);
    buffer = frames.pop();
    for (const frame of frames) {
      const lines = frame.split(/\r?\n/);
      const field = name => lines.filter(line => line.startsWith(name)).map(line => line.slice(name.length).trimStart());
      const data = field("data:");
      if (data.length && data[0] !== "[DONE]") yield {id: field("id:").join(""), event: JSON.parse(data.join("\n"))};
    }
  }
}

async function readChunk(reader, patience) {
  let timer = 0;
  const silence = new Promise((_, reject) => { timer = setTimeout(reject, patience, new Error("silence")); });
  try {
    return await Promise.race([reader.read(), silence]);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    reader.cancel().catch(() => {});
    throw new Lost(TEXT.connectionBroke(error.message));
  } finally {
    clearTimeout(timer);
  }
}

// Converts an event of either API to one shape. Throws if it is the server's error.
function readEvent(event) {
  if (event.error || event.detail) throw new Refused(sentence(errorText(event) || TEXT.gaveUp), {status: 0, code: event.error?.code ?? ""});
  const choice = event.choices?.[0], delta = choice?.delta ?? {};
  return {text: event.token ?? delta.content ?? choice?.text ?? "", reasoning: event.reasoning ?? delta.reasoning_content ?? delta.reasoning ?? "",
    progress: readProgress(event), prompt: event.usage?.prompt_tokens ?? event.progress?.prompt_tokens, gpu: event.gpu ?? event.timings?.gpu, model: event.model, seed: event.seed,
    calls: delta.tool_calls ?? [], calculator: [event.calculator ?? delta.calculator ?? choice?.calculator ?? []].flat(), ids: choice?.token_ids ?? [], logprobs: choice?.logprobs?.content ?? [],
    knowledge: event.knowledge ?? null, usage: event.usage ?? null, timings: event.timings ?? null, reason: event.finish_reason ?? choice?.finish_reason ?? (event.done ? "stop" : null),
    cause: event.stop_reason ?? choice?.stop_reason};
}

// {queued: position}, {read: 0..1 of the prompt} or {loading: {model, fraction}}; null if the event has none. Also reads
// llama-server's events.
function readProgress({progress, prompt_progress: theirs}) {
  const {queue_position: queued, prompt_tokens: total, prompt_tokens_done: done, loading} =
    progress ?? (theirs ? {prompt_tokens: theirs.total, prompt_tokens_done: theirs.processed} : {});
  if (loading) return {loading};
  if (total > 0 && Number.isFinite(done)) return {read: Math.min(1, done / total)};
  return Number.isInteger(queued) && queued > 0 ? {queued} : null;
}

const loadingText = ({stage, fraction, waits}) => waits ? sentence(stage) : TEXT.loading(stage || TEXT.starting, fraction);

Parts.register({
  strings: {
    connecting: "Connecting…", noServer: home => `No server answers at ${home}; still trying.`,
    serverLost: home => `The server at ${home} no longer answers; still trying.`,
    refusesPage: (home, origin) => `The server at ${home} does not allow this page. Start it with --cors-origin ${origin}.`,
    noAnswer: (home, origin) => `No answer from ${home}: is the server running` + (origin ? `, and does it allow this page (--cors-origin ${origin})?` : "?"),
    refused: "The server refused", retryIn: seconds => `, try again in ${seconds} s`, gaveUp: "The server gave up",
    connectionLost: "The server stopped in the middle of this answer and did not come back.", connectionBroke: why => `The server stopped in the middle of this answer (${why}).`,
    endedEarly: "The server stopped in the middle of this answer.",
  },
  bind() {
    setInterval(glance, GLANCE_MS);
    document.addEventListener("visibilitychange", glance);
    for (const event of ["online", "offline", "focus"]) addEventListener(event, glance);
  },
});

return Object.freeze({
  get phase() { return state.phase; }, get loading() { return state.loading; }, get models() { return state.models; }, get model() { return state.model; },
  get refusedKey() { return state.refusedKey; }, get exports() { return Boolean(state.stats?.exports); },
  PAGE_HOME, HEALTH_MS, SILENCE_MS, FOREVER_MS, ROUTES, Lost, Refused,
  get keepsChats() { return keepsChats(); }, home: serverHome, key: serverKey, addressOf: serverAddress, originOf, request, post, jsonOf, accepted, errorOf, errorText, sentence,
  watch: watchServer, startAnew, isAway, untilReady, trouble: serverText, chatModel, useModel, loadModel, lookAtModels, modelOfSeveral, modelNamed,
  countTokens, tokensAround, templateText, textToContinue, forgotten, postAnswer, reconnected, events: serverEvents, readEvent,
});
})();
