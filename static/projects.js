// Projects: chats with a common prompt, files and collections. Their groups in the list of chats, their menu and dialog; and what is done with several
// chats at once.
"use strict";

const Projects = (() => {

const {TEXT, $, element, iconButton, button, plural} = Parts;

const MOST_CHARACTERS = 1e6;      // of a project's files
const DRAGGED = "application/x-chats";
const all = new Map();            // id -> {id, name, prompt, files: [{name, text}], stores: [{id, name}], created}
const chosen = new Set();         // ids of the selected chats
let choosing = false;             // whether chats are being selected

async function readStored() {
  for (const project of await Store.read("projects")) all.set(project.id, project);
}

// Another tab or device has changed one; null: it is deleted.
function hear(id, record) {
  if (record) all.set(id, record);
  else all.delete(id);
}

const of = chat => all.get(chat.project);
const sorted = () => [...all.values()].sort((a, b) => a.name.localeCompare(b.name) || a.created - b.created);
const chatsIn = ({id}) => [...Chat.chats.values()].filter(({project}) => project === id);
const found = ids => ids.map(id => Chat.chats.get(id)).filter(Boolean);

function keep(project) {
  all.set(project.id, project);
  Store.change("projects", project.id, project);
}

// What a model is told first: the project's prompt and whole files, in their order, then the chat's own prompt.
function systemOf(chat) {
  const {prompt = "", files = []} = of(chat) ?? {};
  return [Tree.composeMessage(prompt, files).content, chat.system].filter(text => text.trim()).join("\n\n");
}

// The collections that a chat asks: those of its project too.
const storesOf = chat => [...new Map([...of(chat)?.stores ?? [], ...chat.stores ?? []].map(store => [store.id, store])).values()];

// Collections that are gone leave a chat, and its project.
function forget(chat, gone) {
  const left = (stores = []) => stores.filter(({id}) => !gone.some(each => each.id === id)), project = of(chat);
  if (project && left(project.stores).length < (project.stores ?? []).length) keep({...project, stores: left(project.stores)});
  Chat.change(chat, {stores: left(chat.stores)});
}

function move(chats, id) {
  for (const chat of chats) if (!chat.temporary) Chat.change(chat, {project: id});
  Page.render();
}

// the dialog ------------------------------------------------------------------------------------------------------------

const labelled = (text, field) => element("label", {}, element("span", {textContent: text}), field);

// Asks for what a project has; resolves to it, or null. `project`: null for a new one.
async function edit(project = null) {
  const {name = "", prompt = "", stores = []} = project ?? {}, files = [...project?.files ?? []];
  const nameField = element("input", {type: "text", value: name, maxLength: 200, dir: "auto", autocomplete: "off"});
  const promptField = element("textarea", {value: prompt, rows: 4, dir: "auto", autocomplete: "off"});
  const list = element("ul", {className: "imports"}), problem = element("p", {className: "alert", role: "alert"});
  const draw = () => list.replaceChildren(...files.map((file, i) => element("li", {}, element("span", {textContent: file.name, dir: "auto"}),
    element("small", {textContent: TEXT.characters(file.text.length)}), iconButton(TEXT.removeFile(file.name), "delete", () => { files.splice(i, 1); draw(); }))));
  const add = async given => {
    const problems = [];
    for (const file of given) {
      try {
        const read = await Composer.readFile(file);
        if (read.picture) throw new Error(TEXT.notText(file.name));
        if (files.reduce((sum, {text}) => sum + text.length, read.text.length) > MOST_CHARACTERS) throw new Error(TEXT.projectFull(file.name));
        files.push({name: file.name, text: read.text});
      } catch (error) { problems.push(error.message); }
    }
    problem.textContent = problems.join("\n");
    draw();
  };
  draw();
  const pick = button(TEXT.addDocuments, "attach", () => element("input", {type: "file", multiple: true, onchange: ({target}) => add(target.files)}).click());
  const known = [...new Map([...stores, ...await Knowledge.listed()].map(store => [store.id, store])).values()], boxes = known.map(store =>
    [store, element("input", {type: "checkbox", checked: stores.some(({id}) => id === store.id)})]);
  const body = [labelled(TEXT.projectName, nameField), labelled(TEXT.projectPrompt, promptField), element("div", {}, element("span", {textContent: TEXT.projectFiles}), list, pick, problem),
    ...boxes.map(([store, box]) => element("label", {className: "check"}, box, element("span", {textContent: `# ${store.name}`})))];
  if (!await Page.confirmed(project ? TEXT.editProject : TEXT.newProject, body, TEXT.cancel, TEXT.saveProject)) return null;
  const made = {id: project?.id ?? Tree.newId(), created: project?.created ?? Date.now(), name: nameField.value.trim() || TEXT.untitledProject, prompt: promptField.value, files,
    stores: boxes.filter(([, box]) => box.checked).map(([{id, name}]) => ({id, name}))};
  keep(made);
  Page.render();
  return made;
}

// Deletes a project; its chats stay, unless the reader wants them deleted too. Both can be undone.
async function remove(project) {
  const inside = chatsIn(project), box = element("input", {type: "checkbox"});
  const body = inside.length ? [element("label", {className: "check"}, box, element("span", {textContent: TEXT.deleteItsChats(inside.length)}))] : [];
  if (!await Page.confirmed(TEXT.deleteProject(project.name), body, TEXT.cancel, TEXT.delete, true)) return;
  const gone = box.checked ? await Chat.removeChats(inside) : [], isGone = gone.some(({chat}) => chat.id === Chat.current.id);
  if (!box.checked) move(inside, null);
  all.delete(project.id);
  Store.change("projects", project.id, null);
  Chat.offerUndo(TEXT.deleted(project.name), () => {
    keep(project);
    if (box.checked && gone.length) Chat.bringBack(gone);
    else move(inside, project.id);
  });
  if (isGone) Chat.openNew();
  else Page.render();
}

function newChat(project) {
  Chat.openNew();
  Chat.change(Chat.current, {project: project.id});
  Page.render();
  Composer.focusAfterClick();
}

// the list of chats -------------------------------------------------------------------------------------------------------

// A project's heading in the list.
function headingOf(project) {
  const more = iconButton(`${TEXT.more}: ${project.name}`, "more", anchor => Page.openMenu(anchor, [
    [TEXT.newChatIn, "new", () => newChat(project)], [TEXT.editProject, "edit", () => edit(project)],
    [TEXT.exportProject, "export", () => Chats.exportChats(chatsIn(project), [], [project], project.name)], [TEXT.deleteProjectEntry, "delete", () => remove(project)]]));
  return element("h2", {className: "project icon i-folder"}, element("span", {textContent: project.name, dir: "auto"}), more);
}

const targets = (chats, act) => [...sorted().filter(({id}) => chats.some(({project}) => project !== id)).map(({id, name}) => [name, "folder", () => act(id)]),
  ...(chats.some(of) ? [[TEXT.noProject, "close", () => act(null)]] : []), [TEXT.newProject, "new", async () => { const made = await edit(); if (made) act(made.id); }]];

// The menu of a chat in the list: where it may be moved, and the begin of a selection.
function openRowMenu(anchor, chat, rename) {
  Page.openMenu(anchor, [[TEXT.rename, "edit", rename], ...(chat.temporary ? [] : targets([chat], id => move([chat], id))), [TEXT.selectChats, "list", () => choose(chat.id), "", true]]);
}

function choose(id) {
  choosing = true;
  if (!chosen.delete(id)) chosen.add(id);
  Page.render();
}

function endChoice() {
  choosing = false;
  chosen.clear();
  Page.render();
}

function render() {
  const bar = $("chosen"), chats = found([...chosen]);
  bar.hidden = !choosing;
  if (!choosing || bar.dataset.key === `${[...chosen]} ${all.size}`) return;
  bar.dataset.key = `${[...chosen]} ${all.size}`;
  const made = (text, icon, act) => Object.assign(iconButton(text, icon, act), {disabled: !chats.length});
  bar.replaceChildren(element("span", {textContent: TEXT.chosen(chats.length), role: "status"}),
    iconButton(TEXT.selectAll, "list", () => { for (const id of Chats.shown()) chosen.add(id); Page.render(); }),
    made(TEXT.moveChosen, "folder", anchor => Page.openMenu(anchor, targets(chats, id => { move(chats, id); endChoice(); }))),
    made(TEXT.exportChosen, "export", () => { Chats.exportChats(chats, [], sorted().filter(({id}) => chats.some(({project}) => project === id))); endChoice(); }),
    made(TEXT.deleteChosen, "delete", () => { endChoice(); Chat.deleteChats(chats, TEXT.deletedChats(chats.length)); }),
    iconButton(TEXT.endChoice, "close", endChoice));
}

// Chats are dragged into a project, or out of it to any other group.
function drag(event, id) {
  event.dataTransfer.setData(DRAGGED, JSON.stringify(chosen.has(id) ? [...chosen] : [id]));
  event.dataTransfer.effectAllowed = "move";
}

const groupAt = event => event.dataTransfer.types.includes(DRAGGED) ? event.target.closest?.("[data-project]") : null;

function markGroup(list, group) {
  for (const each of list.children) each.classList.toggle("target", each === group);
}

function takesChats(list) {
  list.addEventListener("dragover", event => { const group = groupAt(event); markGroup(list, group); if (group) event.preventDefault(); });
  list.addEventListener("dragleave", event => { if (!list.contains(event.relatedTarget)) markGroup(list, null); });
  list.addEventListener("drop", event => onDrop(event, list));
}

function onDrop(event, list) {
  const group = groupAt(event);
  markGroup(list, null);
  if (!group) return;
  event.preventDefault();
  move(found(JSON.parse(event.dataTransfer.getData(DRAGGED))), group.dataset.project || null);
  if (choosing) endChoice();
}

// files -------------------------------------------------------------------------------------------------------------------

// Projects of a file of chats that are not here get new ids: one that was deleted never returns. The chats follow them.
function take(text, chats) {
  const taken = new Map();
  for (const project of [Settings.readJson(text).value?.projects ?? []].flat()) {
    if (!Fields.isObject(project) || !Fields.isText(project.name) || !Fields.isText(project.id)) continue;
    const files = [project.files ?? []].flat().filter(file => Fields.isObject(file) && Fields.isText(file.name) && Fields.isText(file.text)).map(({name, text}) => ({name, text}));
    const here = all.has(project.id) ? project.id : Tree.newId();
    if (!all.has(here)) keep({id: here, created: Date.now(), name: project.name.slice(0, 200), prompt: Fields.isText(project.prompt) ? project.prompt : "", files, stores: []});
    taken.set(project.id, here);
  }
  for (const {conversation} of chats) {
    if (taken.has(conversation.project)) conversation.project = taken.get(conversation.project);
    else if (!all.has(conversation.project)) delete conversation.project;
  }
}

Parts.register({
  strings: {
    newProject: "New project", editProject: "Edit the project", saveProject: "Save", untitledProject: "Untitled project", projectName: "Name of the project", projectPrompt: "What every chat of it tells the model first",
    projectFiles: "Files that every chat of it has read", projectFull: name => `${name} has no room: the files of a project may have a million characters.`,
    newChatIn: "New chat in this project", exportProject: "Export its chats", deleteProjectEntry: "Delete the project", deleteProject: name => `Delete the project “${name}”?`,
    deleteItsChats: count => `Delete its ${plural(count, "chat", "chats")} too`, moveChat: "Move or select", noProject: "Out of the project", leaveProject: name => `Take this chat out of ${name}`,
    selectChats: "Select several", selectAll: "Select all that are listed", chosen: count => `${count} selected`, moveChosen: "Move", exportChosen: "Export the selected", deleteChosen: "Delete the selected", endChoice: "End the selection",
  },
  menu: () => [[TEXT.newProject, "folder", async () => { const made = await edit(); if (made) newChat(made); }]],
  render,
});

return Object.freeze({
  get choosing() { return choosing; }, isChosen: id => chosen.has(id), readStored, hear, of, sorted, systemOf, storesOf, forget, move, headingOf, openRowMenu, choose, drag, takesChats, take,
});
})();
