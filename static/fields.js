// The fields that the records of chats have, and what their values are. A record may come from a file, from another device or from an older page, so
// each that is read is checked here (`sound`). What does not fit is left out: everything else may then rely on it. The server has the same
// table (chatlm/front/annexes/chats/records.py); a test compares the two.
"use strict";

const Fields = (() => {

const isText = value => typeof value === "string";
const isObject = value => typeof value === "object" && value !== null && !Array.isArray(value);
const isSwitch = value => typeof value === "boolean";
const isInteger = Number.isSafeInteger;
const isCount = value => isInteger(value) && value >= 0;
const isTime = value => Number.isFinite(value) && value > 0 && value < 8.64e15;
const isFact = value => value === null || isText(value) || isSwitch(value) || Number.isFinite(value);
const listOf = fits => value => Array.isArray(value) && value.every(fits);
const mayLack = fits => value => value === undefined || value === null || fits(value);
const record = fields => value => isObject(value) && Object.entries(fields).every(([name, fits]) => fits(value[name]));

const areFacts = value => isObject(value) && Object.values(value).every(isFact);
// of a server that drafts: how many tokens each source of drafts has proposed, and how many were right
const areDrafts = value => isObject(value) && Object.values(value).every(areFacts);
const isTiming = ([name, value]) => name === "drafts" ? areDrafts(value) : isFact(value);
const areTimings = value => isObject(value) && Object.entries(value).every(isTiming);
const isPicture = value => isText(value) && /^data:image\/[a-z+.-]+;base64,[A-Za-z0-9+/=]+$/.test(value);
const isImage = record({mime_type: isText, data: isText});

const PARAMETERS = {tools: listOf(record({function: isObject})), response_format: isObject, stop: listOf(isText)};
const areParameters = value => isObject(value) && Object.entries(value).every(([name, each]) => each === null || (PARAMETERS[name] ?? isFact)(each));

const isCall = record({id: isText, name: isText, arguments: isText, result: mayLack(isText), server: mayLack(isText), tool: mayLack(isText),
  about: mayLack(isText), digest: mayLack(isText), begun: mayLack(isTime), ms: mayLack(Number.isFinite), cut: mayLack(isCount), images: mayLack(listOf(isImage))});
const isPassage = record({index: isCount, vector_store_id: isText, file_id: isText, filename: isText, page: mayLack(isCount), heading: mayLack(isText), start: isCount});
const isKnowledge = record({read: mayLack(isCount), of: mayLack(isCount), passages: mayLack(listOf(isPassage)), text: mayLack(isText)});
const isSearch = record({max_num_results: mayLack(isCount), score_threshold: mayLack(Number.isFinite)});
const areNamed = listOf(record({id: isText, name: isText}));

// A field is for all, unless it is of one place: `here` stays in this browser, `meanwhile` lasts until an answer has ended. Neither is exported.
const ALL = {
  conversations: {title: isText, created: isTime, updated: isTime, pinned: isSwitch, system: isText, parameters: areParameters, model: isText, inTurns: isSwitch, project: isText, stores: areNamed, search: isSearch, leaf: isText},
  nodes: {role: value => value === "user" || value === "assistant", content: isText, created: isTime, reasoning: isText, thought: Number.isFinite, model: isText, weights: isText, system: isText,
    parameters: areParameters, seed: isInteger, prefix: listOf(isCount), ids: listOf(isCount), continued: isSwitch, edited: isSwitch, calls: listOf(isCall), calculator: value => Calculator.areCalculations(value),
    timings: areTimings, note: isText, error: isText, remedy: isText, attachments: listOf(record({name: isText, at: isCount, length: isCount})), pictures: listOf(record({name: isText, picture: isPicture})),
    knowledge: isKnowledge, tools: listOf(isText)},
  projects: {name: isText, created: isTime, prompt: isText, files: listOf(record({name: isText, text: isText})), stores: areNamed},
  prompts: {name: isText, created: isTime, text: isText, starter: isSwitch},
};
const HERE = {
  conversations: {tools: listOf(isText), allowed: areFacts, running: isText, temporary: isSwitch},
};
const MEANWHILE = {
  nodes: {stream: record({id: isText, next: mayLack(value => typeof value === "number"), begin: mayLack(isCount)}), ended: isText, response: isText, earlier: areTimings},
};
const CHECKED = Object.fromEntries(Object.keys(ALL).map(kind => [kind, {...ALL[kind], ...HERE[kind], ...MEANWHILE[kind]}]));

// What a record has at least.
const LEAST = {
  conversations: {title: "", created: 1, updated: 1, pinned: false, system: "", parameters: {}},
  nodes: {role: "assistant", content: "", created: 1},
  projects: {name: "", created: 1, prompt: "", files: []},
  prompts: {name: "", created: 1, text: ""},
};

const fits = (kind, name, value) => value === null || value === undefined || !Object.hasOwn(CHECKED[kind], name) || CHECKED[kind][name](value);

// Those fields of a record, or of a patch of one, whose values fit. Fields that are not known stay: nothing here reads them.
const fitting = (kind, values) => Object.entries(values).every(([name, value]) => fits(kind, name, value)) ? values
  : Object.fromEntries(Object.entries(values).filter(([name, value]) => fits(kind, name, value)));

// A record as the page can take it.
function sound(kind, values) {
  if (!values || !(kind in CHECKED)) return values;
  const whole = fitting(kind, values), missing = Object.entries(LEAST[kind]).filter(([name]) => whole[name] === undefined || whole[name] === null);
  return missing.length ? {...whole, ...Object.fromEntries(missing)} : whole;
}

// The fields for all that a value from a file, or for one, has.
const shared = (kind, values) => Object.fromEntries(Object.entries(ALL[kind])
  .filter(([name, check]) => values[name] !== undefined && values[name] !== null && check(values[name])).map(([name]) => [name, values[name]]));

// How many of these fields have a value that does not fit. Of timings, parameters and calculations, what fits is taken all the same (tree.js).
const misfits = (kind, values) => Object.entries(ALL[kind]).filter(([name, check]) => !["timings", "parameters", "calculator"].includes(name) &&
  values[name] !== undefined && values[name] !== null && !check(values[name])).length;

return Object.freeze({isText, isObject, isPicture, isTiming, fitting, sound, shared, misfits});
})();
