// Saved prompts: their dialog, their use, and those that a file brings.
"use strict";

const Prompts = (() => {

const {TEXT, $, element, iconButton, setText} = Parts;

// A prompt is {name, text, starter}: a starter begins a message, any other is a system prompt.
const isPrompt = value => Fields.isObject(value) && Fields.isText(value.name) && Fields.isText(value.text) && Boolean(value.name.trim() && value.text.trim());
const all = new Map();            // id -> {id, name, text, starter, created}
const ownPrompts = () => [...all.values()].filter(isPrompt).sort((a, b) => a.created - b.created || (a.id < b.id ? -1 : 1));

async function readStored() {
  for (const prompt of await Store.read("prompts")) all.set(prompt.id, prompt);
  Settings.load();                        // earlier versions of the page kept them there; perhaps another tab has taken them over
  const earlier = Settings.preferences.prompts.filter(isPrompt);
  if (!earlier.length) return;
  Settings.change({prompts: []});
  keepAll([...ownPrompts(), ...earlier]);
}

// Another tab or device has changed one; null: it is deleted.
function hear(id, record) {
  if (record) all.set(id, record);
  else all.delete(id);
}

// Makes these all prompts that there are; new ones have no id.
function keepAll(prompts) {
  const ids = new Set(prompts.map(({id}) => id));
  for (const id of all.keys()) if (!ids.has(id)) { all.delete(id); Store.change("prompts", id, null); }
  prompts.forEach((prompt, i) => {
    const record = {id: Tree.newId(), created: Date.now() + i, ...prompt}, known = all.get(record.id);
    if (known && ["name", "text", "starter"].every(name => known[name] === record[name])) return;
    all.set(record.id, record);
    Store.change("prompts", record.id, record);
  });
}

let editedPrompt = null;          // the name of the saved prompt that the fields below the list change

function openPrompts() {
  editPrompt(null);
  showPrompts();
  $("prompts-dialog").showModal();
}

// Fills the fields with a saved prompt, which Save then replaces; null: with nothing, for a new one.
function editPrompt(prompt) {
  editedPrompt = prompt?.name ?? null;
  $("prompt-name").value = prompt?.name ?? "";
  $("prompt-words").value = prompt?.text ?? "";
  if (prompt) $("prompt-use").value = prompt.starter ? "starter" : "system";
  setText($("prompt-problem"), "");
}

function showPrompts() {
  const prompts = ownPrompts();
  $("prompts").replaceChildren(...prompts.map(prompt => {
    const use = element("button", {type: "button", className: "plain", textContent: TEXT.usePrompt, onclick: () => usePrompt(prompt)});
    use.setAttribute("aria-label", `${TEXT.usePrompt}: ${prompt.name}`);
    return element("li", {}, element("b", {textContent: prompt.name}), element("span", {textContent: prompt.text}),
      element("small", {textContent: prompt.starter ? TEXT.starter : TEXT.systemPrompt}), use,
      iconButton(`${TEXT.edit}: ${prompt.name}`, "edit", () => { editPrompt(prompt); $("prompt-words").focus(); }),
      iconButton(`${TEXT.delete}: ${prompt.name}`, "delete", () => {
        keepPrompts(ownPrompts().filter(({name}) => name !== prompt.name));
        if (editedPrompt === prompt.name) editedPrompt = null;
        $("prompt-name").focus();
      }));
  }), ...(prompts.length ? [] : [element("li", {className: "hint", textContent: TEXT.noPrompts})]));
}

function keepPrompts(prompts) {
  keepAll(prompts);
  showPrompts();
  Page.render();
}

// `more`: what the reader has written behind the name of a starter.
function usePrompt({text, starter}, more = "") {
  $("prompts-dialog").close();
  if (starter) Composer.setDraft(more ? `${text.replace(/\s*$/, "")} ${more}` : text);
  else { Chat.change(Chat.current, {system: text}); Chat.say(TEXT.systemIs(text)); }
  Composer.focusAfterClick();
}

function savePrompt() {
  const prompt = {name: $("prompt-name").value.trim(), text: $("prompt-words").value, starter: $("prompt-use").value === "starter"};
  if (!isPrompt(prompt)) return $(prompt.name ? "prompt-words" : "prompt-name").focus();
  const prompts = ownPrompts(), place = name => prompts.findIndex(each => each.name === name), at = place(editedPrompt ?? prompt.name);
  if (editedPrompt !== null && prompt.name !== editedPrompt && place(prompt.name) >= 0) {
    setText($("prompt-problem"), TEXT.promptTaken(prompt.name));
    return $("prompt-name").focus();
  }
  if (at < 0) prompts.push(prompt);
  else prompts[at] = {...prompts[at], ...prompt};
  keepPrompts(prompts);
  editPrompt(null);
  return Page.announce(TEXT.presetSaved(prompt.name));
}

// Imports the prompts that are new; one whose name is taken gets another.
function takePrompts(text) {
  const here = ownPrompts(), brought = [Settings.readJson(text).value?.prompts ?? []].flat().filter(isPrompt).filter(each => !here.some(own => own.text === each.text));
  const names = new Set(here.map(({name}) => name));
  for (const {name, text: words, starter} of brought) {
    const free = [name, ...Array.from({length: 1000}, (_, i) => `${name} (${i + 2})`)].find(each => !names.has(each));
    names.add(free);
    here.push({name: free, text: words, starter: Boolean(starter)});
  }
  if (brought.length) keepPrompts(here);
}

Parts.register({
  strings: {
    prompts: "Prompts", promptName: "Name of the prompt", promptUse: "What it is", promptText: "Text of the prompt", starter: "Starter", usePrompt: "Use",
    savePrompt: "Save prompt", promptTaken: name => `Another prompt is called “${name}”.`, noPrompts: "None yet.", promptsHint: "A system prompt is sent to the model first. A starter begins a message and is offered on the empty page. A slash and its name in the message box use either.",
  },
  bind() {
    $("save-prompt").onclick = savePrompt;
  },
});

return Object.freeze({open: openPrompts, own: ownPrompts, keep: keepPrompts, use: usePrompt, take: takePrompts, readStored, hear});
})();
