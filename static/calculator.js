// Calls of nanochat's calculator in answers: small cards between the words, which go back to the model with them.
//
// A node has them as the API does, as `calculator`: [{start, expression, result}]. `start` counts the characters of
// the content before a call, in code points. `cut`, a result without an expression, and {start, stray} are what badly
// trained models write. Copied text has the words alone: they repeat the result.
"use strict";

const Calculator = (() => {

const {TEXT, element} = Parts;

const STRAY = {python_end: "<|python_end|>", output_end: "<|output_end|>"};
const isTextOrNothing = value => value === null || value === undefined || Fields.isText(value);

// The code points of a text.
const charactersIn = text => text.length - (text.match(/[\ud800-\udbff][\udc00-\udfff]/g)?.length ?? 0);

function isCalculation(call) {
  if (!Fields.isObject(call) || !Number.isSafeInteger(call.start) || call.start < 0) return false;
  if (call.stray !== undefined) return Object.hasOwn(STRAY, call.stray);
  const {expression, result, cut} = call;
  return isTextOrNothing(expression) && isTextOrNothing(result) && Fields.isText(expression ?? result) && (cut === undefined || cut === true);
}

// The calls of a record, in the order of their places.
const areCalculations = value => Array.isArray(value) && value.every((call, i) => isCalculation(call) && call.start >= (value[i - 1]?.start ?? 0));

// A call without what else an object has.
const plainCall = ({start, expression = null, result = null, cut, stray}) => stray ? {start, stray} : {start, expression, result, ...(cut ? {cut} : {})};

// The calls of a file's node, as far as they can stand in its text.
function checkedCalculations(calls, content) {
  const most = charactersIn(content), checked = [];
  for (const call of Array.isArray(calls) ? calls : []) {
    if (isCalculation(call) && call.start <= most && call.start >= (checked.at(-1)?.start ?? 0)) checked.push(plainCall(call));
  }
  return checked;
}

const movedCalls = (calls, by) => calls.map(call => ({...call, start: call.start + by}));

// The calls in an event of an answer whose text begins `begin` characters behind the content's beginning.
const calculationsOf = (calls, begin = 0) => movedCalls(calls.filter(isCalculation).map(plainCall), begin);

// What remains of a node's calls when its answer goes on: one that was cut off at its end is written again.
function beforeGoingOn({content, calculator = []}) {
  const last = calculator.at(-1), open = last && !last.stray && last.start === charactersIn(content) && (last.cut || last.result === null);
  return open ? calculator.slice(0, -1) : calculator;
}

// Where the calls of a text stand once it has been edited: those beside changed words are gone.
function afterEdit(before, after, calls = []) {
  const [own, others] = [[...before], [...after]], most = Math.min(own.length, others.length);
  let start = 0, end = 0;
  while (start < most && own[start] === others[start]) start++;
  while (end < most - start && own.at(-1 - end) === others.at(-1 - end)) end++;
  return calls.filter(call => call.start <= start || call.start >= own.length - end)
    .map(call => call.start <= start ? call : {...call, start: call.start + others.length - own.length});
}

// A text in pieces, words and calls in turn.
function splitAtCalls(content, calls = []) {
  const pieces = [];
  let begin = 0, at = 0, characters = 0;
  for (const call of calls) {
    for (; characters < call.start && at < content.length; characters++) at += content.codePointAt(at) > 0xffff ? 2 : 1;
    pieces.push(content.slice(begin, at), call);
    begin = at;
  }
  return [...pieces, content.slice(begin)];
}

const joinedPieces = (node, write) => splitAtCalls(node.content, node.calculator).map(piece => Fields.isText(piece) ? piece : write(piece)).join("");

// The text of a message as the prompt of a model without a chat template has it: with the marks by name.
const withNames = node => joinedPieces(node, ({expression, result, cut, stray}) => {
  if (stray) return STRAY[stray];
  const spelled = (expression === null ? "" : `<|python_start|>${expression}<|python_end|>`) + (result === null ? "" : `<|output_start|>${result}<|output_end|>`);
  return cut ? spelled.slice(0, spelled.lastIndexOf("<|")) : spelled;
});

const callText = ({expression, result, stray}) => stray ? "" : [expression ?? "", result === null ? "" : `= ${result}`].filter(Boolean).join(" ");

// The same as Markdown that other programs show.
const withCode = node => joinedPieces(node, call => {
  const text = callText(call).replace(/\s+/g, " ");
  return !text ? "" : text.includes("`") ? ` [${text}] ` : ` \`${text}\` `;
});

// cards ---------------------------------------------------------------------------------------------------------------

// In the Markdown that is drawn, a call is three characters that no text is allowed to have, with hexadecimal digits between
// them: nothing in it looks like a mark of Markdown's.
const FORGED = /[\ufdd0-\ufdd2]/g;
const A_CARD = /\ufdd0([0-9a-f]*)\ufdd1([0-9a-f]*|-)\ufdd2/;
const asHex = text => Array.from({length: text.length}, (_, i) => text.charCodeAt(i).toString(16).padStart(4, "0")).join("");
const fromHex = digits => digits === "-" ? null : String.fromCharCode(...(digits.match(/.{4}/g) ?? []).map(code => parseInt(code, 16)));
const MOST_SHOWN = 400;           // characters of an expression

const cleaned = text => text.replace(FORGED, "\ufffd");
const shortened = text => text.length > MOST_SHOWN ? `${text.slice(0, MOST_SHOWN)}…` : text;

function cardText({expression, result, cut, stray}) {
  if (stray) return "";
  const begun = (expression ?? "") + (cut && result === null ? "…" : "");
  return `\ufdd0${asHex(shortened(begun))}\ufdd1${result === null ? "-" : asHex(shortened(result))}\ufdd2`;
}

const withCards = (content, calls = []) => calls.length
  ? splitAtCalls(content, calls).map(piece => Fields.isText(piece) ? cleaned(piece) : cardText(piece)).join("") : cleaned(content);

const cardToken = {name: "calculation", level: "inline",
  start: source => { const at = source.indexOf("\ufdd0"); return at < 0 ? undefined : at; },
  tokenizer: source => {
    const found = A_CARD.exec(source);
    return found?.index === 0 ? {type: "calculation", raw: found[0], expression: fromHex(found[1]), result: fromHex(found[2])} : undefined;
  }};

// Where there can be no cards, in code and formulas, a call is text.
const plainCards = text => text.includes("\ufdd0") ? text.replace(new RegExp(A_CARD, "g"), (_, expression, result) => callText({expression: fromHex(expression), result: fromHex(result)})) : text;

function calculationCard({expression, result}) {
  const card = element("span", {className: "calculation"}, ...(expression ? [element("code", {textContent: expression})] : []),
    ...(result === null ? [] : [element("span", {textContent: " = "}), element("b", {textContent: result})]));
  card.setAttribute("role", "group");
  card.setAttribute("aria-label", TEXT.calculated);
  return card;
}

// The same for a text that is shown as it is.
const plainWithCards = node => splitAtCalls(node.content, node.calculator)
  .flatMap(piece => Fields.isText(piece) ? [piece] : piece.stray ? [] : [calculationCard(piece)]);

Parts.register({
  strings: {
    calculated: "Calculator",
  },
});

return Object.freeze({charactersIn, areCalculations, checked: checkedCalculations, moved: movedCalls, callsOf: calculationsOf, beforeGoingOn, afterEdit, withNames,
  withCode, withCards, token: cardToken, plainCards, card: calculationCard, plainWithCards});
})();
