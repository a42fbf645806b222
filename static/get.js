// Models to download, at /#get: those with short names, what the hub finds, the files of each, what is in the cache, downloads under way.
"use strict";

const Get = (() => {

const {TEXT, $, element, iconButton, setText, number, wait, inOrder} = Parts;

let getting = null;               // {info: the last answer of models/hub, words: what was searched, foundFor: what `info` answers, asking: how many questions run, looked: name -> its files, downloads: name -> state, following, dismissed} while the view is open

const MOST_SHOWN = 200;
const RETRY_MS = 3000;            // after the connection that follows downloads broke

function openGet() {
  if (location.hash !== "#get") history.pushState(null, "", `${location.pathname}${location.search}#get`);
  if (getting) return;
  getting = {info: null, words: "", foundFor: "", asking: 0, looked: new Map(), downloads: new Map(), dismissed: new Set(), isNews: inOrder(), following: null, problem: "", drawn: ""};
  Page.render();
  $("get").focus({preventScroll: true});
  lookAtHub();
}

function closeGet() {
  getting?.following?.abort();
  getting = null;
}

// The server's answer as JSON; what it refuses is shown, and the result is null.
async function answerOf(response) {
  const mine = getting;
  try {
    const found = await response;
    if (!found.ok) throw await Server.errorOf(found);
    if (mine && mine === getting) mine.problem = "";
    return await found.json();
  } catch (error) {
    if (error.name !== "AbortError" && mine && mine === getting) {
      mine.problem = error.message.replace(/ \(HTTP \d+\)/, "");
      Page.render();
    }
    return null;
  }
}

async function lookAtHub() {
  const mine = getting, isNews = mine.isNews(), {words} = mine;
  mine.asking++;
  Page.render();
  const found = await answerOf(Server.request(`models/hub${words ? `?search=${encodeURIComponent(words)}` : ""}`));
  mine.asking--;
  if (mine !== getting) return;
  if (!found || !isNews()) return Page.render();
  Object.assign(mine, {info: found, foundFor: words});
  mine.downloads = new Map(found.downloads.map(each => [each.model, each]));
  Page.render();
  follow();
}

const isRunning = ({state}) => !["done", "failed", "cancelled"].includes(state);

// Follows all downloads until none is running.
async function follow() {
  const mine = getting;
  if (!mine || mine.following || ![...mine.downloads.values()].some(isRunning)) return;
  const {signal} = mine.following = new AbortController();
  try {
    const response = await Server.request("models/downloads", {signal});
    if (!response.ok) throw await Server.errorOf(response);
    for await (const {event} of Server.events(response.body, Server.SILENCE_MS)) {
      const before = mine.downloads.get(event.model);
      mine.downloads.set(event.model, event);
      if (!isRunning(event) && (!before || isRunning(before))) ended(event);
      Page.render();
    }
  } catch (error) {
    if (mine !== getting) return;
    mine.problem = error.message.replace(/ \(HTTP \d+\)/, "");
    Page.render();
    await wait(RETRY_MS);
  }
  mine.following = null;
  if (mine === getting) lookAtHub();
}

function ended({model, state: how, error, note}) {
  Page.announce({done: note || TEXT.gotModel(model), failed: error, cancelled: TEXT.cancelledModel(model)}[how] ?? "");
  Server.lookAtModels(true);
}

async function get(name) {
  const found = await answerOf(Server.post("models/download", {model: name}));
  if (!found || !getting) return;
  getting.downloads.set(found.model, found);
  getting.dismissed.delete(found.model);
  Page.render();
  $("get").querySelector(`[data-act="${CSS.escape(`close ${found.model}`)}"]`)?.focus();
  if (isRunning(found)) follow();
  else lookAtHub();
}

async function cancel(name) {
  await answerOf(Server.post("models/cancel", {model: name}));
  if (getting) lookAtHub();
}

async function remove(name, bytes) {
  const sure = await Page.confirmed(TEXT.deleteModel(name), [element("p", {textContent: TEXT.deleteModelHint(TEXT.bytes(bytes))})], TEXT.keepModel, TEXT.delete, true);
  if (!sure || !getting) return;
  await answerOf(Server.post("models/delete", {model: name}));
  getting?.looked.clear();
  Server.lookAtModels(true);
  if (getting) lookAtHub();
}

// Shows the files of a model, or hides them.
async function look(name) {
  const mine = getting;
  if (mine.looked.delete(name)) return Page.render();
  mine.looked.set(name, {models: null});
  Page.render();
  const found = await answerOf(Server.request(`models/hub/${name.split("/").map(encodeURIComponent).join("/")}`));
  if (mine !== getting || !mine.looked.has(name)) return;
  if (found) mine.looked.set(name, found);
  else mine.looked.delete(name);
  Page.render();
}

// what is drawn ---------------------------------------------------------------------------------------------------------

// Only the files of a model say its size; what a search finds and a short name stands for is estimated.
const sizeOf = ({bytes, model, kind, problem}, exact) => !bytes ? problem && !kind ? "–" : TEXT.seeFiles : exact || model.includes(":") ? TEXT.bytes(bytes) : TEXT.aboutBytes(TEXT.bytes(bytes));

const isQuantized = ({model, kind}) => kind === "gguf" && !/(?:^|[-._:])(?:bf16|f16|f32|fp16|fp32)(?=[-._]|$)/i.test(model.split(":").at(-1));

const QUICK_BYTES = 2e9;          // up to this size a more exact file is still quick
const USUAL = /Q4_K_M|Q4_K_S|Q4_0|MXFP4/i;

// Of a model's files the one to get: the largest quantized one that is still quick, else one of about four bits.
function bestOf(files) {
  const fitting = files.filter(each => each.fits && !each.problem && isQuantized(each)).sort((a, b) => b.bytes - a.bytes);
  return fitting.find(({bytes}) => bytes <= QUICK_BYTES) ?? fitting.find(({model}) => USUAL.test(model)) ?? fitting.at(-1);
}

// A model's files: the best, other quantized ones, the rest, what does not fit, what cannot run.
function sortedFiles(files) {
  const best = bestOf(files), rank = each => each === best ? 0 : each.problem ? 4 : each.fits === false ? 3 : isQuantized(each) ? 1 : 2;
  return files.map(each => ({...each, best: each === best})).sort((a, b) => a.best !== b.best ? b.best - a.best : rank(a) - rank(b));
}

// What speaks for or against a model, and whether that is bad.
function verdictOf({problem, fits, best, bytes, here, gated, served, complete, tokens_per_second: speed}, info) {
  if (served) return [TEXT.servedAs, false];
  if (problem) return [problem.replace(/; it runs: .*/s, ""), true];      // not all families
  if (complete) return [TEXT.inCache, false];
  if (fits === false) return [TEXT.tooLarge, true];
  const free = info.models_disk === null ? info.disk : Math.min(info.disk, info.models_disk);
  if (bytes - here > free) return [TEXT.noDisk, true];
  return [[gated ? TEXT.isGated : "", best ? TEXT.fitsBest : fits ? TEXT.fits : "", fits && speed ? TEXT.expected(speed) : "", here ? TEXT.partHere(TEXT.bytes(here)) : ""].filter(Boolean).join(" · "), false];
}

function act(name, icon, label, onclick, disabled = false) {
  const made = iconButton(label, icon, onclick);
  Object.assign(made, {disabled});
  made.dataset.act = `${icon} ${name}`;
  return made;
}

function rowsOf(offer, info) {
  const {model, problem, kind} = offer, looked = getting.looked.get(model), running = getting.downloads.get(model);
  const row = (each, acts, className = "", exact = false) => {
    const [text, wrong] = verdictOf(each, info);
    return element("tr", {className}, element("td", {textContent: each.model}), element("td", {textContent: sizeOf(each, exact)}),
      element("td", {textContent: text, className: wrong ? "wrong" : ""}), element("td", {className: "acts"}, ...acts));
  };
  const getIt = each => act(each.model, "export", TEXT.getNamed(each.model), () => get(each.model), Boolean(each.problem || each.served || isRunning(getting.downloads.get(each.model) ?? {state: "done"})));
  const listIt = act(model, "list", TEXT.filesOf(model), () => look(model));
  listIt.setAttribute("aria-expanded", Boolean(looked));
  const files = !looked ? [] : looked.models ? sortedFiles(looked.models).map(each => row(each, [getIt(each)], "of-model", true)) :
    [element("tr", {className: "of-model"}, element("td", {textContent: TEXT.lookingNow, colSpan: 4}))];
  return [row(offer, problem && !kind ? [listIt] : [listIt, getIt(offer)], running && isRunning(running) ? "running" : ""), ...files];
}

function tableOf(title, rows) {
  return [element("h3", {textContent: title}), element("div", {className: "table", tabIndex: 0}, element("table", {}, element("thead", {}, element("tr", {}, ...["model", "size", "state", "acts"].map(name =>
    element("th", {textContent: TEXT.getColumns[name], scope: "col"})))), element("tbody", {}, ...rows)))];
}

function downloadRow({model, state: how, done, bytes, error, note}) {
  const running = isRunning({state: how}), text = how === "failed" ? error : how === "done" ? note || TEXT.gotModel(model) : TEXT.downloadStates[how] ?? how;
  const row = element("li", {}, element("span", {textContent: how === "done" ? text : `${model}: ${text}`, className: how === "failed" ? "wrong" : ""}));
  if (running) {
    const bar = element("progress", bytes ? {max: bytes, value: done} : {});
    bar.setAttribute("aria-label", TEXT.progressOf(model));
    row.append(bar, element("span", {textContent: bytes ? TEXT.bytesOf(TEXT.bytes(done), TEXT.bytes(bytes)) : ""}), act(model, "close", TEXT.cancelNamed(model), () => cancel(model)));
  } else if (how !== "done") {
    row.append(act(model, "again", how === "failed" ? TEXT.tryDownload(model) : TEXT.resumeNamed(model), () => get(model)),
      act(model, "close", TEXT.dismissNamed(model), () => { getting.dismissed.add(model); Page.render(); }));
  } else if (!note) {
    row.append(act(model, "new", TEXT.chatWithModel(model), () => chatWithModel(model)));
  }
  return row;
}

async function chatWithModel(name) {
  await Server.lookAtModels(true);
  Chat.openNew();
  Settings.chooseModel(name);
  Composer.focusAfterClick();
}

function hereRow(each, info) {
  const {model, repository, here, complete, served} = each, [text, wrong] = verdictOf(each, info);
  const comes = !complete && [...getting.downloads.values()].some(download => isRunning(download) && download.model.split(":")[0] === repository);
  const acts = comes ? [] : [...(served ? [act(served, "new", TEXT.chatWithModel(served), () => chatWithModel(served))] : [act(model, complete ? "play" : "again", complete ? TEXT.serveNamed(model) : TEXT.resumeNamed(model), () => get(model))]),
    act(model, "delete", TEXT.deleteNamed(model), () => remove(model, here))];
  return element("tr", {}, element("td", {textContent: model}), element("td", {textContent: TEXT.bytes(here)}),
    element("td", {textContent: complete ? text : comes ? TEXT.downloadStates.downloading : TEXT.partOnly, className: wrong && complete ? "wrong" : ""}), element("td", {className: "acts"}, ...acts));
}

function renderGet() {
  $("get").hidden = !getting;
  if (!getting) return;
  const {info, words, foundFor, asking, looked, downloads, dismissed, problem} = getting;
  const isSearching = asking > 0 && words !== foundFor, isFound = words && words === foundFor;
  setText($("get-problem").firstElementChild, problem);
  const isNew = $("get-problem").hidden && problem;
  $("get-problem").hidden = !problem;
  if (isNew) $("get-problem").scrollIntoView({block: "nearest"});
  $("get-now").hidden = !(isSearching || asking && !info);
  const key = JSON.stringify([info, words, isSearching, isFound, [...looked], [...downloads], [...dismissed], Server.models.map(({id}) => id)]);
  if (getting.drawn === key) return;
  getting.drawn = key;
  const focused = document.activeElement?.dataset?.act;
  setText($("get-about"), info ? TEXT.getAbout(info) : "");
  $("get-search").hidden = !info;
  $("get-downloads").replaceChildren(...[...downloads.values()].filter(({model}) => !dismissed.has(model)).map(downloadRow));
  if (info) {
    const here = info.cached;
    $("get-here").replaceChildren(...(here.length ? tableOf(TEXT.onThisMachine, here.map(each => hereRow(each, info))) : []));
    const best = info.best ?? [], offers = isFound ? info.found : isSearching ? [] : info.short_names;
    $("get-best").replaceChildren(...(best.length ? tableOf(TEXT.fitBestHere, best.flatMap((each, i) => rowsOf({...each, best: i === 0}, info))) : []));
    $("get-found").replaceChildren(...(offers.length ? tableOf(isFound ? TEXT.foundFor(words) : TEXT.shortNames, offers.slice(0, MOST_SHOWN).flatMap(each => rowsOf(each, info))) : isFound ? [element("p", {textContent: TEXT.hubHasNothing(words)})] : []));
  }
  if (focused) $("get").querySelector(`[data-act="${CSS.escape(focused)}"]`)?.focus();
}

Parts.register({
  strings: {
    lookingNow: "Looking…", aboutBytes: size => `about ${size}`, seeFiles: "see its files", fitsBest: "fits best here", fitBestHere: "Fits best here", expected: speed => `about ${Parts.roughly(speed)} tok/s`,
    dismissNamed: name => `Dismiss ${name}`, servedAs: "served", inCache: "here, not served", tooLarge: "does not fit in memory", noDisk: "does not fit on the disk", fits: "fits",
    isGated: "its makers ask for an agreement", partHere: size => `${size} of it are here`, partOnly: "a part of it is here",
    getAbout: ({memory, disk, models_disk: most}) => [`A model may take ${TEXT.bytes(memory)} of memory`, `${TEXT.bytes(disk)} are free on the disk`, most === null ? "" : `downloaded models may take ${TEXT.bytes(most)} (--models-disk)`].filter(Boolean).join(" · "),
    getColumns: {model: "Model", size: "Size", state: "State", acts: "Actions"}, onThisMachine: "On this machine", shortNames: "Models with short names", foundFor: words => `The hub has for “${words}”`,
    hubHasNothing: words => `The hub has nothing for “${words}”.`, filesOf: name => `Files of ${name}`, getNamed: name => `Get ${name}`, serveNamed: name => `Serve ${name}`, deleteNamed: name => `Delete ${name}`,
    cancelNamed: name => `Cancel ${name}`, resumeNamed: name => `Continue ${name}`, tryDownload: name => `Try ${name} again`, chatWithModel: name => `Chat with ${name}`, progressOf: name => `Download of ${name}`,
    gotModel: name => `${name} is here and served.`, cancelledModel: name => `The download of ${name} was cancelled; what is here stays.`,
    downloadStates: {waiting: "waiting", looking: "looking", downloading: "downloading", checking: "checking", opening: "reading its header", cancelled: "cancelled; what is here stays"},
    bytesOf: (done, all) => `${done} of ${all}`, deleteModel: name => `Delete ${name}?`, deleteModelHint: size => `${size} are removed from the cache of huggingface_hub, which other programs may use too.`, keepModel: "Keep it",
  },
  bind() {
    $("get-problem").lastElementChild.onclick = () => {
      if (getting) getting.problem = "";
      Page.render();
      $("get-words").focus();
    };
    $("get-search").onsubmit = event => {
      event.preventDefault();
      if (!getting) return;
      getting.words = $("get-words").value.trim();
      getting.problem = "";
      lookAtHub();
    };
  },
  view: {isOpen: () => Boolean(getting), close: closeGet},
  render: renderGet,
});

return Object.freeze({open: openGet});
})();
