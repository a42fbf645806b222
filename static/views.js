// The views that have an address of their own: the server's status, training runs. They are loaded when they are opened.
"use strict";

const Views = (() => {

const {TEXT} = Parts;

// All stages of a tag are one lineage; a run without stages is its own.
const lineageOf = model => model?.lineage || model?.run;

// The lineages of the server's training runs, that of the chat's model first.
function runsOf() {
  const own = lineageOf(Server.chatModel()), runs = new Set(Server.models.map(lineageOf).filter(Boolean));
  return [...runs].sort((a, b) => (b === own) - (a === own));
}

// Part of an address; one that somebody has mistyped stays as it is.
function decoded(text) {
  try { return decodeURIComponent(text); } catch (error) { return text; }
}

const openStatus = Parts.late("status", () => Status, "open");
const openRun = Parts.late("run", () => Run, "open");
const openGet = Parts.late("get", () => Get, "open");

Parts.register({
  strings: {
    serverStatus: "Server status", usageOfServer: "Usage by day, key and model", backToChat: "Back to the chat", trainingRun: "Training run", getModel: "Get a model", searchModels: "Search the hub, or a name such as owner/name", searchHub: "Search",
  },
  bind() {
    for (const leave of document.querySelectorAll("button.leave")) leave.onclick = () => Chat.open(Chat.current.id).then(Composer.focusAfterClick);
  },
  menu: () => runsOf().slice(0, 1).map(run => [TEXT.trainingRun, "chart", () => openRun(run), run]),
  view: {hash: "#run", open: hash => openRun(...hash.slice("#run/".length).split("?with=").map(decoded))},
});

Parts.register({
  menu: () => Server.model.ours ? [[TEXT.serverStatus, "gauge", () => openStatus()]] : [],
  view: {hash: "#server", open: () => openStatus()},
});

Parts.register({
  menu: () => Server.model.ours ? [[TEXT.getModel, "get", () => openGet()]] : [],
  view: {hash: "#get", open: () => openGet()},
});

// A link of another device: its chats are to be here too.
const joinDevice = Parts.late("sync", () => Sync, "join");
Parts.register({view: {hash: "#join", open: hash => joinDevice(hash)}});

return Object.freeze({runsOf, lineageOf, openStatus, openRun, openGet});
})();
