// What all scripts use: the words that several of them need or other programs know, and `register`. Other words stand in the script that uses them,
// which registers them. A translation is a last script that gives TEXT other words.
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
};

// what each script brings -----------------------------------------------------------------------------------------------

// Nothing else names a script: a new one is a tag in index.html. Its names are its own, but for those that it shares.
const share = names => Object.assign(globalThis, names);

// `strings`: its words, which join TEXT. `bind`: what it does once, when the page starts. `menu`: makes its entries of the
// header's menu, [label, icon, act, value]. `render`: draws what it shows of `state`. `answer`: {buttons(view), update(view,
// growing)}, what it adds to each answer. `view`: {hash, open, isOpen, close}, what it shows in place of the chat at an address of
// its own. `recoloured`: called when the colours of the page have changed. All may be absent; their order is that of the tags.
const parts = [];

function register(part) {
  const taken = Object.keys(part.strings ?? {}).filter(name => Object.hasOwn(TEXT, name));
  if (taken.length) throw new Error(`two scripts register ${taken.join(", ")}`);
  Object.assign(TEXT, part.strings);
  parts.push(part);
}

// what they all use ---------------------------------------------------------------------------------------------------

const $ = id => document.getElementById(id);
const touch = matchMedia("(pointer: coarse)");
const narrow = matchMedia("(max-width: 860px)");
// then Enter confirms an input method's word
const composing = event => event.isComposing || event.keyCode === 229;

const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };
