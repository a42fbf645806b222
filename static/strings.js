// Shared by all scripts: `register`, and the texts that several scripts or other programs need. Each script registers the rest of its texts
// itself. A translation is a final script that replaces the texts in TEXT.
"use strict";

const number = value => new Intl.NumberFormat(undefined, {maximumFractionDigits: 1}).format(value);
const plural = (count, one, many) => `${number(count)} ${count === 1 ? one : many}`;

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

// registration ----------------------------------------------------------------------------------------------------------

// Nothing else lists the scripts: a new one is a tag in index.html. Its names are private unless it shares them.
const share = names => Object.assign(globalThis, names);

// `strings`: texts added to TEXT. `bind`: runs once, when the page starts. `menu`: returns entries for the header's
// menu, [label, icon, act, value, apart]; `menuEnd`: such as stand at its end. `render`: draws its part of `state`. `answer`: {buttons(view), update(view,
// growing), looks(view)}, additions to each answer; `looks`, like `menu`, are what "Look inside" offers now. `view`: {hash, open, isOpen, close}, shown instead of the chat, with an address of
// its own: `hash`, or below it; `open` gets the whole. `run`: {nodes(steps)}, what else the view of a training run shows. `recoloured`: called when the page's
// colours have changed. All are optional; scripts register in the order of their tags, those of the template when they are loaded.
const parts = [];
let bound = false;                // whether `bind` has been called

function register(part) {
  const taken = Object.keys(part.strings ?? {}).filter(name => Object.hasOwn(TEXT, name));
  if (taken.length) throw new Error(`two scripts register ${taken.join(", ")}`);
  Object.assign(TEXT, part.strings);
  parts.push(part);
  if (!bound) return;
  fillStrings(Object.keys(part.strings ?? {}));
  part.bind?.();
}

// libraries -------------------------------------------------------------------------------------------------------------

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

// Functions that a script of the template shares; the first call of one loads it.
function shareLate(script, ...names) {
  for (const name of names) {
    const load = async (...all) => {
      await need(script);
      return globalThis[name] === load ? say(TEXT.notLoaded) : globalThis[name](...all);
    };
    share({[name]: load});
  }
}

// shared helpers ------------------------------------------------------------------------------------------------------

const $ = id => document.getElementById(id);
const touch = matchMedia("(pointer: coarse)");
const narrow = matchMedia("(max-width: 860px)");
// while true, Enter confirms a word of an input method
const composing = event => event.isComposing || event.keyCode === 229;

const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };
