// What all scripts stand on: the registry of the page's parts, its texts, the scripts that load late, and small tools.
//
// Each script owns one object, named as its file, and one part of the page (README.md). Nothing else lists the scripts: a new one is a tag in
// index.html. A translation is a final script that replaces texts in Parts.TEXT.
"use strict";

const Parts = (() => {

// texts ----------------------------------------------------------------------------------------------------------------

const number = value => new Intl.NumberFormat(undefined, {maximumFractionDigits: 1}).format(value);
// A measured figure: its decimals say nothing from 10 on.
const roughly = value => value < 9.95 ? value.toFixed(1) : number(Math.round(value));
const plural = (count, one, many) => `${number(count)} ${count === 1 ? one : many}`;

// Those that several scripts or other programs need. Each script registers the rest of its texts itself.
const TEXT = {
  // accessible names: other programs use them to drive the page
  message: "Message", send: "Send", stop: "Stop", newChat: "New chat", settings: "Settings", regenerate: "Regenerate", edit: "Edit",
  copy: "Copy", copyCode: "Copy code", export: "Export", import: "Import", server: "Server", conversation: "Conversation",
  you: "You", assistant: "Assistant", chats: "Chats", searchChats: "Search chats", rename: "Rename", delete: "Delete",
  goOn: "Continue", answerNow: "Answer now", previousAnswer: "Previous answer", nextAnswer: "Next answer", thinking: "Thinking", theme: "Theme",
  thisChat: "This chat (JSON)", allChats: "All chats (JSON)", asMarkdown: "Markdown", asPage: "HTML page",
  previousVersion: "Previous version", nextVersion: "Next version",
  undo: "Undo", dismiss: "Dismiss", deletedElsewhere: "This chat was deleted in another tab.",
  notLoaded: "This part of the page could not be loaded: is the server running?",
};

// Texts are in TEXT: data-text names a node's text, data-label its accessible name, data-hint its placeholder.
function fillStrings(names) {
  const named = attribute => [...document.querySelectorAll(`[data-${attribute}]`)].filter(({dataset}) => names.includes(dataset[attribute]));
  for (const node of named("text")) node.textContent = TEXT[node.dataset.text];
  for (const node of named("label")) node.setAttribute("aria-label", TEXT[node.dataset.label]);
  for (const node of named("label").filter(({localName}) => localName === "button")) node.title = TEXT[node.dataset.label];
  for (const node of named("hint")) node.placeholder = TEXT[node.dataset.hint];
}

// A text as searches compare it, with as many characters as its form NFC has: the server folds alike (chatlm/front/annexes/chats/records.py).
const folded = text => text.normalize("NFC").replaceAll("İ", "i").toLowerCase().replaceAll("ς", "σ");

// registration ----------------------------------------------------------------------------------------------------------

// `strings`: texts added to TEXT. `bind`: runs once, when the page starts. `menu`: returns entries for the header's
// menu, [label, icon, act, value, apart]; `menuEnd`: such as stand at its end. `render`: draws its part of the page. `answer`: {buttons(view), update(view,
// growing), looks(view)}, additions to each answer; `looks`, like `menu`, are what "Look inside" offers now. `view`: {hash, open, isOpen, close}, shown instead of the chat, with an address of
// its own: `hash`, or below it; `open` gets the whole. `run`: {nodes(steps)}, what else the view of a training run shows. `recoloured`: called when the page's
// colours have changed. All are optional; scripts register in the order of their tags, those of the template when they are loaded.
const all = [];
let bound = false;                // whether `bind` has been called

function register(part) {
  const taken = Object.keys(part.strings ?? {}).filter(name => Object.hasOwn(TEXT, name));
  if (taken.length) throw new Error(`two scripts register ${taken.join(", ")}`);
  Object.assign(TEXT, part.strings);
  all.push(part);
  if (!bound) return;
  fillStrings(Object.keys(part.strings ?? {}));
  part.bind?.();
}

// When the page starts: fills in the texts and binds the parts that have registered.
function bindAll() {
  bound = true;
  fillStrings(Object.keys(TEXT));
  for (const part of all) part.bind?.();
}

// Does something for one part of the page. If that fails, the other parts go on, and `instead` is done.
function alone(act, instead = () => {}) {
  try {
    return act();
  } catch (error) {
    console.error(error);
    return instead(error);
  }
}

// scripts that load late ------------------------------------------------------------------------------------------------

const libraries = new Map();      // name -> promise, resolved once it is loaded or has failed to load

// Loads a script of the template in index.html when it is first needed, then calls `use`. After a failure it is tried again, at the earliest 5 s later.
function need(library, use) {
  if (libraries.has(library)) return libraries.get(library);
  const script = $("libraries").content.querySelector(`[src*="${library}."]`).cloneNode();
  const loading = new Promise(end => {
    script.onload = () => { use?.(); end(); };
    script.onerror = () => { setTimeout(() => libraries.delete(library), 5000); end(); };
  });
  libraries.set(library, loading);
  document.head.append(script);
  return loading;
}

// A function of an object whose script loads late: its first call loads that. `owner` returns the object; while that is not there, its name is unknown.
function late(script, owner, name) {
  const found = () => { try { return owner(); } catch (error) { return null; } };
  return async (...given) => {
    if (!found()) await need(script);
    return found() ? found()[name](...given) : Chat.say(TEXT.notLoaded);
  };
}

// tools ------------------------------------------------------------------------------------------------------------------

const $ = id => document.getElementById(id);
const touch = matchMedia("(pointer: coarse)");
const mouse = matchMedia("(hover: hover) and (pointer: fine)");
const narrow = matchMedia("(max-width: 860px)");
// while true, Enter confirms a word of an input method
const composing = event => event.isComposing || event.keyCode === 229;

const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  node.append(...children);
  return Object.assign(node, properties);
}

// Changes the children of an element. With dir="auto" the browser looks at the whole text for each child that comes or goes, so it has
// another direction meanwhile.
function changeChildren(parent, change) {
  const {dir} = parent;
  if (dir === "auto") parent.dir = "ltr";
  change();
  parent.dir = dir;
}

function button(label, icon, onclick, properties = {}) {
  return element("button", {type: "button", className: `icon plain i-${icon}`, textContent: label,
    onclick: event => onclick(event.currentTarget), ...properties});
}

// A button with only an icon.
function iconButton(label, icon, onclick) {
  const made = button("", icon, onclick, {title: label});
  made.setAttribute("aria-label", label);
  return made;
}

// Calls `act` on Enter, except while composing, with Shift, and on touch keyboards, where Enter is a new line.
function onEnter(field, act) {
  field.enterKeyHint = touch.matches ? "enter" : "send";
  field.addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.shiftKey || composing(event) || touch.matches) return;
    event.preventDefault();
    act();
  });
}

function fitHeight(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
}

const wait = ms => new Promise(resolve => setTimeout(resolve, ms));

// Guards the page against late responses. `const isMine = begin()` before a request; its response counts
// only if `isMine()`, which holds until the next one begins.
function newest() {
  let count = 0;
  return () => { const mine = ++count; return () => mine === count; };
}

// The same for polling: a response counts unless a later one has already arrived.
function inOrder() {
  let begun = 0, come = 0;
  return () => {
    const mine = ++begun;
    return () => { const counts = mine > come; come = Math.max(come, mine); return counts; };
  };
}

return Object.freeze({
  all, register, bindAll, alone, libraries, need, late,
  TEXT, number, roughly, plural, folded, $, element, changeChildren, button, iconButton, onEnter, fitHeight, setText, wait, newest, inOrder, composing, touch, mouse, narrow,
});
})();
