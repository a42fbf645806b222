// Prompts that are kept in this browser, and the words of a search in the chats.
"use strict";

// prompts ---------------------------------------------------------------------------------------------------------------

// A prompt is {name, text, starter}: a text to begin a message with, or else a system prompt.
const isPrompt = value => isObject(value) && isText(value.name) && isText(value.text) && Boolean(value.name.trim() && value.text.trim());
const ownPrompts = () => state.preferences.prompts.filter(isPrompt);

function openPrompts() {
  showPrompts();
  $("prompts-dialog").showModal();
}

function showPrompts() {
  const prompts = ownPrompts();
  $("prompts").replaceChildren(...prompts.map(prompt => {
    const use = element("button", {type: "button", className: "plain", textContent: TEXT.usePrompt, onclick: () => usePrompt(prompt)});
    use.setAttribute("aria-label", `${TEXT.usePrompt}: ${prompt.name}`);
    return element("li", {}, element("b", {textContent: prompt.name}), element("span", {textContent: prompt.text}),
      element("small", {textContent: prompt.starter ? TEXT.starter : TEXT.systemPrompt}), use,
      iconButton(`${TEXT.delete}: ${prompt.name}`, "delete", () => { keepPrompts(ownPrompts().filter(({name}) => name !== prompt.name)); $("prompt-name").focus(); }));
  }), ...(prompts.length ? [] : [element("li", {className: "hint", textContent: TEXT.noPrompts})]));
}

function keepPrompts(prompts) {
  changePreferences({prompts});
  showPrompts();
  empty.key = "";                                        // the starters are on it
  render();
}

function usePrompt({text, starter}) {
  $("prompts-dialog").close();
  if (starter) setDraft(text);
  else { changeChat(state.chat, {system: text}); say(TEXT.systemIs(text)); }
  focusAfterClick();
}

function savePrompt() {
  const prompt = {name: $("prompt-name").value.trim(), text: $("prompt-words").value, starter: $("prompt-use").value === "starter"};
  if (!isPrompt(prompt)) return $(prompt.name ? "prompt-words" : "prompt-name").focus();
  keepPrompts([...ownPrompts().filter(({name}) => name !== prompt.name), prompt]);
  $("prompt-name").value = $("prompt-words").value = "";
  return announce(TEXT.presetSaved(prompt.name));
}

// Those of a file that are not here yet; one with a name that is taken gets another.
function takePrompts(text) {
  const here = ownPrompts(), brought = [readJson(text).value?.prompts ?? []].flat().filter(isPrompt).filter(({text: its}) => !here.some(own => own.text === its));
  const names = new Set(here.map(({name}) => name));
  for (const {name, text: its, starter} of brought) {
    const free = [name, ...Array.from({length: 1000}, (_, i) => `${name} (${i + 2})`)].find(each => !names.has(each));
    names.add(free);
    here.push({name: free, text: its, starter: Boolean(starter)});
  }
  if (brought.length) keepPrompts(here);
}

// the words of a search ---------------------------------------------------------------------------------------------------

let words = [];                   // that were searched for, in lower case
let marking = 0;

function markWords() {
  if (typeof Highlight !== "function" || !words.length && !CSS.highlights.size) return;
  cancelAnimationFrame(marking);
  marking = requestAnimationFrame(() => {
    const ranges = words.length ? [...$("chats").querySelectorAll("a"), ...$("log").querySelectorAll(".turn > .body")].flatMap(rangesOf) : [];
    CSS.highlights.set("found", new Highlight(...ranges));
  });
}

function rangesOf(place) {
  const found = [], walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const text = node.data.toLowerCase();
    for (const word of words) {
      for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) found.push(new StaticRange({startContainer: node, startOffset: at, endContainer: node, endOffset: at + word.length}));
    }
  }
  return found;
}

// Shows the first message of a found chat that has a word of the search, on whichever branch it is.
function showFound() {
  const has = ({content}) => words.some(word => content.toLowerCase().includes(word));
  if (!words.length) return;
  if (!state.path.some(has)) {
    const elsewhere = [...state.nodes.values()].find(has);
    if (!elsewhere) return;
    showLeaf(leafBelow(state.children, elsewhere.id));
  }
  state.following = false;
  complete(views.get(state.path.find(has).id));
  views.get(state.path.find(has).id).article.scrollIntoView({block: "center"});
  markWords();
}
