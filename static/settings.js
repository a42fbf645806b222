// The settings of a chat and of the page: parameters, functions and formats, the server and its models.
"use strict";

const Settings = (() => {

const {TEXT, $, element, iconButton, setText, number, plural, wait, newest, composing} = Parts;

// preferences ----------------------------------------------------------------------------------------------------------

const PREFERENCES = "chat_server preferences";      // theme.js and usage.js read them too

let preferences = Object.freeze({theme: "", actOnClick: false, sidebar: true, server: "", servers: [], keys: {}, presets: {}, prompts: [], defaults: {}, titles: false,
  notify: false, allowed: {}, betterSeen: false});

function loadPreferences() {
  const known = {...preferences};
  try {
    const stored = JSON.parse(localStorage.getItem(PREFERENCES));
    for (const [name, value] of Object.entries(stored ?? {})) {
      if (typeof value === typeof known[name]) known[name] = value;
    }
  } catch (error) { /* storage is off or damaged: use defaults */ }
  preferences = Object.freeze(known);
}

function changePreferences(changes) {
  loadPreferences();                                  // another tab may have changed some
  preferences = Object.freeze({...preferences, ...changes});
  try { localStorage.setItem(PREFERENCES, JSON.stringify(preferences)); } catch (error) { /* for this visit only */ }
}

// the dialog -------------------------------------------------------------------------------------------------------------

const settingsFields = () => [...$("settings-dialog").querySelectorAll("[data-parameter]")];

const templateAsked = newest();
const roomy = matchMedia("(min-width: 1000px)");      // then the settings are a panel beside the chat, else a dialog over it

function openSettings() {
  const dialog = $("settings-dialog");
  showSettings();
  $("template").textContent = "";
  $("more-parameters").open = Parameters.all.some(({name, folded}) => folded && Chat.current.parameters[name] !== undefined);
  document.documentElement.classList.toggle("with-settings", roomy.matches);
  roomy.matches ? dialog.show() : dialog.showModal();
  $("settings").setAttribute("aria-expanded", "true");
  showTemplate(0);
}

// Shows how the model's template renders a message with this chat's system prompt, a moment after that was typed.
async function showTemplate(pause = 300) {
  const isMine = templateAsked();
  await wait(pause);
  const text = isMine() ? await Server.templateText(Tree.messagesOf([{role: "user", content: "…"}], Projects.systemOf(Chat.current))) : null;
  if (!isMine()) return;
  $("template").parentElement.hidden = text === null;
  $("template").textContent = text ?? "";
}

function closeSettings() {
  document.documentElement.classList.remove("with-settings");
  $("settings").setAttribute("aria-expanded", "false");
  Page.render();
}

// What the fields show, as text: the panel follows when the chat, its model or a command changes it.
const settingsShown = () => JSON.stringify([Chat.current.id, Chat.current.system, Chat.current.parameters, Server.model]);
let lastShown = "";

function showSettings() {
  const {system, parameters} = Chat.current, {defaults} = Server.model;
  lastShown = settingsShown();
  if ($("settings-dialog").open && $("system").value !== system) showTemplate();        // a command or a prompt has changed it
  $("system").value = system;
  $("system").placeholder = TEXT.ownSystem(Server.model.system ?? null);
  $("stop-strings").value = (parameters.stop ?? []).join("\n");
  for (const field of settingsFields()) {
    const name = field.dataset.parameter, usual = defaults[name];
    field.value = parameters[name] ?? "";
    if (name === "reasoning_effort") field.closest(".parameter").hidden = Server.model.can.reasoning === false && !field.value;
    field.placeholder = name === "seed" ? TEXT.random : usual !== undefined && usual !== null ? String(usual)
      : name === "max_tokens" && Server.model.api === "v1" ? TEXT.restOfContext : TEXT.default;
    showParameter(field);
  }
  showTools();
  for (const name of SWITCHES) $(name).checked = preferences[name];
  const own = Object.keys(preferences.presets);
  $("preset").replaceChildren(element("option", {value: "", textContent: TEXT.choosePreset}),
    ...Object.keys(TEXT.presets).map(name => element("option", {value: `=${name}`, textContent: TEXT.presets[name]})),
    ...own.map(name => element("option", {value: name, textContent: name})));
  $("delete-preset").hidden = true;
}

// One row: the name with its field, a slider that sets the field, and a sentence. Without a value the slider stands at the default.
function parameterRow(parameter) {
  const {name, min, max, step, slider, choices} = parameter;
  const field = choices ? element("select", {}, ...["", ...choices].map(value => element("option", {value, textContent: value || TEXT.default})))
    : element("input", {type: "number", min, max, step: slider?.[2] ?? step, inputMode: step === 1 ? "numeric" : "decimal"});
  field.dataset.parameter = name;
  field.setAttribute("aria-describedby", `about-${name}`);
  const reset = iconButton(TEXT.resetParameter(TEXT.parameters[name]), "close", () => { field.value = ""; field.dispatchEvent(new Event("input", {bubbles: true})); field.focus(); });
  const row = element("div", {className: "parameter"}, element("label", {}, element("span", {textContent: TEXT.parameters[name]}), field), reset);
  if (slider) {
    const [low, high, by] = slider, range = element("input", {type: "range", min: low, max: high, step: by, tabIndex: -1, ariaHidden: "true"});       // the field does the same with the keyboard
    range.oninput = event => { event.stopPropagation(); field.value = range.value; field.dispatchEvent(new Event("input", {bubbles: true})); };
    row.append(range);
  }
  row.append(element("p", {className: "hint", id: `about-${name}`}));
  return row;
}

// Makes the slider and the sentence of a row follow its field.
function showParameter(field) {
  const name = field.dataset.parameter, row = field.closest(".parameter"), range = row.querySelector("[type=range]"), hint = row.querySelector(".hint");
  const parameter = Parameters.all.find(each => each.name === name), value = Tree.parameterValue(parameter, field.value);
  const wrong = Boolean(field.validity?.badInput || field.value && value === undefined);
  field.setAttribute("aria-invalid", wrong);
  hint.classList.toggle("wrong", wrong);
  setText(hint, wrong ? TEXT.badField(parameter) : Server.sentence(TEXT.parameterHints[name]));
  row.querySelector("button").hidden = !field.value && !wrong;
  if (!range) return;
  if (name === "max_tokens") range.max = Server.model.context || parameter.slider[1];
  range.classList.toggle("unset", value === undefined);
  range.value = value ?? Server.model.defaults[name] ?? (name === "max_tokens" ? range.max : NEUTRAL[name] ?? range.min);
}

// Where a slider stands without a value, if the server names no default: where the parameter has no effect.
const NEUTRAL = {temperature: 1, top_p: 1, typical_p: 1, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0};

function takeSettings() {
  const parameters = {};
  for (const parameter of Parameters.all.filter(({apart}) => !apart)) {
    const field = settingsFields().find(each => each.dataset.parameter === parameter.name);
    const value = Tree.parameterValue(parameter, field.value);
    if (value !== undefined) parameters[parameter.name] = value;
    showParameter(field);
  }
  const stop = $("stop-strings").value.split("\n").filter(Boolean).slice(0, 4);
  if (stop.length) parameters.stop = stop;
  Object.assign(parameters, takeTools());
  Chat.change(Chat.current, {system: $("system").value, parameters});
  lastShown = settingsShown();
  Page.render();
}

// What differs from a model's defaults, in words: "temperature 0.2", "system prompt".
function changesOf({parameters = {}, system = ""}, defaults = {}) {
  const set = Parameters.all.filter(({name}) => parameters[name] !== undefined && parameters[name] !== defaults[name]);
  const others = {system: system.trim(), tools: parameters.tools?.length, response_format: parameters.response_format, stop: parameters.stop?.length};
  return [...set.map(({name}) => TEXT.isSet(TEXT.parameters[name], parameters[name])), ...Object.keys(others).filter(name => others[name]).map(name => TEXT.others[name])];
}

// The chip beside the model: what this chat has changed; in a narrow window, how much.
function renderChanged() {
  const changed = changesOf(Chat.current, Server.model.defaults);
  const [all, count] = $("changed").children;
  setText(all, changed.join(" · "));
  setText(count, TEXT.changes(changed.length));
  $("changed").title = all.textContent;
  $("changed").hidden = !changed.length;
}

const PRESETS = {precise: {temperature: 0.2, top_p: 0.9}, creative: {temperature: 1.1, min_p: 0.05}, repeatable: {temperature: 0}};

function choosePreset(name) {
  const {presets} = preferences;
  const preset = name.startsWith("=") ? {parameters: PRESETS[name.slice(1)], system: Chat.current.system} : presets[name];
  if (!preset) return;
  Chat.change(Chat.current, {parameters: Tree.checkedParameters(preset.parameters ?? {}), system: preset.system ?? ""});
  showSettings();
  $("preset").value = name;
  $("delete-preset").hidden = name.startsWith("=");
  Page.render();
}

function savePreset() {
  const name = $("preset-name").value.trim().replace(/^=+/, "");
  if (!name) return $("preset-name").focus();
  const {system, parameters} = Chat.current;
  changePreferences({presets: {...preferences.presets, [name]: {system, parameters}}});
  $("preset-name").value = "";
  showSettings();
  $("preset").value = name;
  Page.announce(TEXT.presetSaved(name));
}

function deletePreset() {
  const {[$("preset").value]: gone, ...presets} = preferences.presets;
  changePreferences({presets});
  showSettings();
}

const SWITCHES = ["actOnClick", "titles", "notify"];      // preferences that are on or off

async function changeSwitch(box) {
  if (box.id === "notify" && box.checked && await Notification.requestPermission() !== "granted") {
    box.checked = false;
    setText($("notify-refused"), TEXT.notifyRefused);
  }
  changePreferences({[box.id]: box.checked});
}

// servers -------------------------------------------------------------------------------------------------------------

function openServer() {
  if ($("server-dialog").open) return;
  $("server-url").value = preferences.server;
  $("server-url").placeholder = Server.PAGE_HOME;
  $("server-key").value = Server.key();
  const locked = Server.phase === "locked";                    // a guest needs one field
  setText($("server-title"), locked ? TEXT.keyTitle : TEXT.server);
  $("another-server").open = !locked;
  $("server-reset").hidden = locked;
  $("server-key").placeholder = locked ? "" : TEXT.none;
  $("server-dialog").showModal();
  showProblems("", locked && Server.refusedKey ? TEXT.wrongKey : "");
}

// Shows the problems with the address and the key, each below its field.
function showProblems(address, key) {
  for (const [name, text] of [["url", address], ["key", key]]) {
    setText($(`${name}-problem`), text);
    $(`server-${name}`).setAttribute("aria-invalid", Boolean(text));
  }
  if (address) $("another-server").open = true;
  $(address ? "server-url" : "server-key").focus();
}

// Applies the dialog's fields. A key typed for another server does not count for this one.
function takeServer(event) {
  const typed = $("server-url").value.trim(), home = typed ? Server.addressOf(typed) : "";
  if (home === null) {
    event.preventDefault();
    return showProblems(TEXT.noAddress(typed), "");
  }
  const key = $("server-key").value, origin = Server.originOf(home || Server.PAGE_HOME), {[origin]: old, ...keys} = preferences.keys;
  changePreferences({keys: key ? {...keys, [origin]: key} : keys});
  useServer(home);
  return undefined;
}

function useServer(home) {
  const {servers} = preferences, server = home === Server.PAGE_HOME ? "" : home;
  changePreferences({server, servers: server && !servers.includes(server) ? [...servers, server] : servers});
  Server.startAnew();
}

// ?server= names a server for this page to use. Nothing is sent to an unknown one until the reader agrees.
function wantedServer() {
  const given = new URLSearchParams(location.search).get("server");
  const home = given ? Server.addressOf(given) : null;
  if (!home || home === Server.home()) return false;
  if (home === Server.PAGE_HOME || preferences.servers.includes(home)) { changePreferences({server: home === Server.PAGE_HOME ? "" : home}); return false; }
  Page.confirmed(TEXT.askTitle, [element("p", {textContent: TEXT.askServer(home)})], TEXT.dontUseIt, TEXT.useIt)
    .then(yes => yes ? useServer(home) : Server.watch());
  return true;
}

// models --------------------------------------------------------------------------------------------------------------

// The list of the server's models; if there are several, with each one's state and size.
function renderModels() {
  const {model} = Server, models = Server.models.length || !model.name ? Server.models : [{id: model.name}], select = $("models");
  setText($("model"), models.length ? "" : TEXT.chat);
  select.hidden = !models.length;
  const ids = models.map(({id}) => id).join("\n");
  if (select.ids !== ids) select.replaceChildren(...models.map(({id}) => element("option", {value: id})));
  select.ids = ids;
  const loading = models.find(({id}) => id === model.name)?.loading;
  $("model-loading").hidden = loading === undefined;
  $("model-loading").value = loading ?? 0;
  models.forEach((each, i) => {
    const {id, state: loaded, reason} = each, option = select.options[i];
    setText(option, models.length > 1 ? TEXT.modelIs(each, Look.baseOf(each).id) : id);
    Object.assign(option, {disabled: loaded === "failed", title: reason ?? ""});
  });
  select.value = model.name;
}

function chooseModel(name) {
  Chat.change(Chat.current, {model: name});
  Server.useModel();
  Page.render();
  Server.loadModel();
}

// Makes what is typed in this chat messages to a base checkpoint, or a text again.
function talkInTurns(inTurns) {
  Chat.change(Chat.current, {inTurns});
  Server.useModel();
  Page.render();
}

Parts.register({
  strings: {
    inTurns: "Chat with it all the same", inTexts: "Write with it",
    settingsInstructions: "Instructions", settingsPresets: "Presets", settingsParameters: "Parameters", settingsChat: "Keep or reset", settingsPage: "This page",
    settingsHint: "For this chat, from the next question on. An empty field leaves the choice to the server.",
    ownSystem: text => text === null ? "" : text ? `If empty: “${text}”` : "If empty, the model gets none, not even its template’s",
    defaultsHint: "Defaults empties the system prompt and all parameters of this chat.",
    newChatsHint: "Use for new chats: they begin with what is set here; other chats keep theirs.",
    resetParameter: name => `${name}: back to the default`, badField: ({min, max, step, choices}) => choices ? choices.join(", ") : `This must be a ${step === 1 ? "whole number" : "number"} from ${number(min)} to ${number(max)}.`,
    systemPrompt: "System prompt", systemHint: "none", templateAdds: "How the model's template renders a message “…”", preset: "Preset",
    choosePreset: "Choose…", presets: {precise: "Precise", creative: "Creative", repeatable: "Repeatable"}, presetName: "Name of the preset",
    savePreset: "Save as preset", deletePreset: "Delete preset", presetSaved: name => `Saved as “${name}”`,
    moreParameters: "More parameters", default: "default", random: "random", restOfContext: "rest of context", stopStrings: "Stop strings, one per line", none: "none",
    changes: count => plural(count, "change", "changes"), isSet: (name, value) => `${/^\p{Lu}\p{Ll}/u.test(name) ? name[0].toLowerCase() + name.slice(1) : name} ${value}`,
    others: {system: "system prompt", tools: "functions", response_format: "answer format", stop: "stop strings"},
    clicks: "Click a message to edit it, an answer to regenerate it", titles: "Let the model name new chats",
    titleRequest: (question, answer) => `Question: ${question}\n\nAnswer: ${answer}\n\nWrite a title of two to six words for this conversation. Write nothing else.`,
    notify: "Notify me when an answer ends in the background", notifyRefused: "The browser does not allow notifications from this page.",
    defaults: "Defaults", forNewChats: "Use for new chats",
    usedForNew: "New chats use these settings", done: "Done",
    serverHint: "For a page opened from a file, or to talk to another machine. That server must allow this page (--cors-origin; null for a file).",
    url: "URL", apiKey: "API key", keyTitle: "This server needs a key", anotherServer: "Another server", keyWanted: "This server needs an API key.", wrongKey: "The server does not accept this API key.",
    noAddress: text => `“${text}” is not an address such as http://gpu-box:8000.`, askTitle: "Use another server?",
    askServer: home => `The address of this page names the server ${home}. Your messages would be sent there.`,
    useIt: "Use this server", dontUseIt: "Stay here",

    model: "Model", modelStates: {unloaded: "", loading: "loading", ready: "loaded", failed: "failed"},
    modelIs: ({id, state, loading, now, reason, ...sizes}, base) => [id, now ? `now ${now}` : id === base ? "" : `adapter of ${base}`,
      `${TEXT.modelStates[state] ?? state}${loading ? ` ${Math.floor(100 * loading)}\u00a0%` : reason ? `: ${reason}` : ""}`, TEXT.sizesOf(sizes)].filter(Boolean).join(" · "),
    // weights, and apart from them what the model needs besides, most of it the KV cache
    sizesOf: ({bytes, weights_bytes: weights = bytes}) => [weights ? TEXT.bytes(weights) : "", bytes - weights >= 5e5 ? `${TEXT.bytes(bytes - weights)} KV` : ""].filter(Boolean).join(" + "),
    bytes: count => count < 1e9 ? `${number(Math.round(count / 1e6))} MB` : `${number(count / 1e9)} GB`,
  },
  bind() {
    const dialog = $("settings-dialog"), rows = folded => Parameters.all.filter(each => !each.apart && Boolean(each.folded) === folded).map(parameterRow);
    $("settings").onclick = () => dialog.open ? dialog.close() : openSettings();
    $("changed").onclick = () => { if (!dialog.open) openSettings(); };
    $("settings").setAttribute("aria-expanded", "false");
    $("parameters").append(...rows(false));
    $("more-parameters").lastElementChild.append(...rows(true));
    dialog.addEventListener("keydown", event => {
      if (event.key === "Escape" && !composing(event)) { event.stopPropagation(); dialog.close(); }
    });
    roomy.addEventListener("change", () => { if (dialog.open) { dialog.close(); openSettings(); } });
    dialog.addEventListener("input", ({target}) => {
      if (SWITCHES.includes(target.id)) changeSwitch(target);
      else if (!["preset", "preset-name"].includes(target.id)) takeSettings();
      if (target === $("system")) showTemplate();
    });
    dialog.addEventListener("close", closeSettings);
    $("notify").parentElement.hidden = typeof Notification === "undefined" || !isSecureContext;
    $("preset").onchange = ({target}) => choosePreset(target.value);
    $("save-preset").onclick = savePreset;
    $("delete-preset").onclick = deletePreset;
    $("settings-reset").onclick = () => { Chat.change(Chat.current, {system: "", parameters: {}}); showSettings(); Page.render(); };
    $("for-new-chats").onclick = () => {
      const {system, parameters} = Chat.current;
      changePreferences({defaults: {system, parameters}});
      Page.announce(TEXT.usedForNew);
      Turns.copied($("for-new-chats"));
    };
    $("server-dialog").querySelector("form").onsubmit = takeServer;
    $("server-reset").onclick = () => { $("server-url").value = $("server-key").value = ""; };
    $("models").onchange = () => chooseModel($("models").value);
    addEventListener("storage", event => {
      if (event.key !== PREFERENCES) return;
      loadPreferences();
      document.documentElement.dataset.theme = preferences.theme;
      Page.render();
    });
    for (const event of ["pointerdown", "focus"]) $("models").addEventListener(event, Server.lookAtModels);
  },
  menu: () => [...(Server.model.base ? [Chat.current.inTurns ? [TEXT.inTexts, "edit", () => talkInTurns(false)] : [TEXT.inTurns, "list", () => talkInTurns(true)]] : []),
    [TEXT.prompts, "prompt", () => Prompts.open()], [TEXT.server, "server", () => openServer()]],
  render() {
    renderModels();
    renderChanged();
    if ($("settings-dialog").open && lastShown !== settingsShown()) showSettings();
  },
});

// functions and formats ------------------------------------------------------------------------------------------------

const CALCULATOR = {type: "function", function: {name: "calculator", description: "Works out + - * / and parentheses.",
  parameters: {type: "object", properties: {expression: {type: "string"}}, required: ["expression"]}}};
const BUDGETS = [0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, null];   // positions of the slider; null: no limit

const budgetIndex = budget => BUDGETS.findIndex(each => each === null || each >= (budget ?? Infinity));

// Parses functions: {tools} or {problem}. In OpenAI's format, or without its wrapper.
function readFunctions(text) {
  if (!text.trim()) return {tools: []};
  const found = readJson(text), listed = found.value === undefined ? [] : [found.value].flat();
  const tools = listed.map(each => Fields.isObject(each?.function) ? {...each, type: "function"} : {type: "function", function: each});
  const wrong = tools.findIndex(({function: each}) => !Fields.isObject(each) || !/^[\w.-]{1,64}$/.test(each.name ?? "") || !Fields.isObject(each.parameters ?? {}));
  return found.problem ? found : wrong >= 0 ? {problem: TEXT.badFunction(wrong + 1)} : {tools};
}

// Parses an answer format: {format}, undefined for none, or {problem}.
function readSchema(text) {
  if (!text.trim()) return {};
  const {value, problem} = readJson(text);
  return problem ? {problem} : !Fields.isObject(value) ? {problem: TEXT.badSchema}
    : {format: value.type === "json_object" || value.type === "json_schema" ? value : {type: "json_schema", json_schema: {name: "answer", schema: value}}};
}

function readJson(text) {
  try {
    return {value: JSON.parse(text)};
  } catch (error) {
    return {problem: TEXT.notValidJson(error.message)};
  }
}

const schemaText = format => format ? JSON.stringify(format.json_schema?.schema ?? format, null, 2) : "";
const functionsText = tools => tools?.length ? JSON.stringify(tools.map(tool => tool.function), null, 2) : "";

const checking = newest();

// The parameters from these fields. The server then checks what the page cannot: whether a schema can be enforced.
function takeTools() {
  const {tools, problem: first} = readFunctions($("functions").value), {format, problem: second} = readSchema($("schema").value), {parameters} = Chat.current;
  setText($("functions-problem"), first ?? "");
  setText($("schema-problem"), second ?? "");
  const index = Number($("budget").value);
  // a budget between two positions, which /budget may set, stays until the slider is moved
  const budget = index === budgetIndex(parameters.thinking_budget) ? parameters.thinking_budget ?? null : BUDGETS[index], kept = {tools: first ? parameters.tools : tools, response_format: second ? parameters.response_format : format};
  showBudget(budget);
  checking();                                            // a pending check is about older text
  if (!first && !second && (tools.length || format)) checkTools({...(tools.length ? {tools} : {}), ...(format ? {response_format: format} : {})});
  return {...(kept.tools?.length ? {tools: kept.tools} : {}), ...(kept.response_format ? {response_format: kept.response_format} : {}),
    ...(budget === null ? {} : {thinking_budget: budget})};
}

async function checkTools(wanted) {
  const isMine = checking();
  await wait(500);
  if (!isMine() || Server.phase !== "ready") return;
  const asked = await Server.post(Server.ROUTES.v1, {messages: [{role: "user", content: "a"}], max_tokens: 1, priority: "low", ...wanted, ...Server.modelOfSeveral()}).catch(() => null);
  const problem = asked?.status === 400 ? (await Server.errorOf(asked)).message : "";
  if (isMine() && problem) setText($(wanted.response_format ? "schema-problem" : "functions-problem"), problem);
}

function showTools() {
  checking();
  const {parameters} = Chat.current, {can, api} = Server.model;
  $("functions").value = functionsText(parameters.tools);
  $("schema").value = schemaText(parameters.response_format);
  setText($("functions-problem"), "");
  setText($("schema-problem"), "");
  $("tools-section").hidden = api !== "v1" || !can.tools && !can.json_schema;
  $("functions").closest("label").hidden = $("add-calculator").hidden = !can.tools;
  $("schema").closest("label").hidden = !can.json_schema;
  $("tools-settings").open = Boolean(parameters.tools || parameters.response_format);
  $("budget").closest("label").hidden = !can.reasoning_budget;
  $("budget").value = budgetIndex(parameters.thinking_budget);
  showBudget(parameters.thinking_budget ?? null);
}

function showBudget(budget) {
  const text = budget === null ? TEXT.noLimit : TEXT.tokens(budget);
  setText($("budget-text"), text);
  $("budget").setAttribute("aria-valuetext", text);
}

function addCalculator() {
  const {tools = []} = readFunctions($("functions").value);
  $("functions").value = functionsText([...tools.filter(each => each.function.name !== "calculator"), CALCULATOR]);
  $("functions").dispatchEvent(new Event("input", {bubbles: true}));
}

Parts.register({
  strings: {
    toolsAndFormat: "Functions and answer format", functions: "Functions that the model may call (JSON)", addCalculator: "Add a calculator",
    schema: "JSON schema of answers", budget: "Thinking budget", noLimit: "no limit", notValidJson: why => `This is not valid JSON: ${why}.`,
    badFunction: count => `Function ${count} needs a name of letters, digits, _, - and ., and parameters that are a JSON schema.`,
    badSchema: "A JSON schema is an object, such as {\"type\": \"object\", \"properties\": {...}}.",
  },
  bind() {
    $("add-calculator").onclick = addCalculator;
  },
});

return Object.freeze({
  get preferences() { return preferences; }, load: loadPreferences, change: changePreferences,
  changesOf, openServer, useServer, wantedServer, chooseModel, talkInTurns, readJson,
});
})();
