// The turns: one view of each node that is shown. `Page.render` calls `render`, a growing answer `paint`.
//
// A long chat opens fast because a turn far from the window is only plain text. It is drawn, with its
// buttons, when it comes near (`complete`). While such a turn is out of sight, drawn or not, the browser
// skips its layout and paint (.far in chat.css): otherwise scrolling past hundreds of them is slow.
"use strict";

const Turns = (() => {

const {TEXT, $, alone, element, changeChildren, button, iconButton, onEnter, fitHeight, setText, number, plural, composing, mouse} = Parts;

const AT_ONCE = 12;               // the last turns, drawn when a chat opens
const views = new Map();          // id of a node -> its view
let viewsOf = null;               // the chat they belong to

const near = new IntersectionObserver(entries => {
  for (const {target: {dataset: {id}}, isIntersecting} of entries) isIntersecting ? came.add(id) : came.delete(id);
  drawing ||= requestAnimationFrame(completeSome);
}, {root: document.getElementById("log"), rootMargin: "1000px 0px"});

// Turns that come near are drawn for a few milliseconds per frame, so that scrolling stays smooth.
const DRAW_MS = 3;
const came = new Set();           // their ids, the nearest first
let drawing = 0;

function completeSome() {
  const end = performance.now() + DRAW_MS;
  for (const id of came) {
    came.delete(id);
    complete(views.get(id));
    if (performance.now() > end) break;
  }
  drawing = came.size ? requestAnimationFrame(completeSome) : 0;
}

function renderTurns() {
  if (viewsOf !== Chat.current.id) { views.clear(); Look.dropLenses(); near.disconnect(); viewsOf = Chat.current.id; }
  const {path} = Chat, articles = path.map((node, i) => viewOf(node, path.length - i <= AT_ONCE).article);
  path.forEach(node => update(views.get(node.id)));
  for (const id of views.keys()) if (!Chat.nodes.has(id)) views.delete(id);
  return articles;
}

function viewOf(node, atOnce) {
  let view = views.get(node.id);
  if (view) { view.node = node; return view; }
  const article = element("article", {className: `turn ${node.role}`}), body = element("div", {className: "body", dir: "auto"});
  article.setAttribute("aria-label", node.role === "user" ? TEXT.you : TEXT.assistant);
  article.dataset.id = node.id;
  article.append(body);
  view = {node, article, body, complete: false};
  views.set(node.id, view);
  if (atOnce || Tree.isGrowing(node)) complete(view);
  else {
    body.textContent = node.content;
    article.classList.add("far");
    near.observe(article);
  }
  return view;
}

function complete(view) {
  if (!view || view.complete) return;
  view.complete = true;
  near.unobserve(view.article);
  view.body.textContent = "";
  alone(() => (view.node.role === "user" ? completeQuestion : completeAnswer)(view), () => showPlain(view));
  update(view);
}

// A turn that cannot be drawn is plain text; the others go on.
function update(view) {
  if (view.failed) setText(view.body, view.node.content);
  else if (view.complete) alone(() => updateView(view), () => showPlain(view));
}

function showPlain(view) {
  view.failed = true;
  view.article.replaceChildren(view.body, element("p", {className: "alert", role: "alert", textContent: TEXT.turnNotDrawn}));
  view.body.replaceChildren(view.node.content);
}

function updateView(view) {
  const {node} = view, editing = Chat.editing === node.id;
  if (editing !== Boolean(view.editor)) editing ? startEditing(view) : stopEditing(view);
  view.actions.hidden = editing;
  updateSiblings(view);
  (node.role === "user" ? updateQuestion : updateAnswer)(view);
}

// Draws a turn, wherever it is, and scrolls to it.
function scrollTo(id) {
  complete(views.get(id));
  views.get(id).article.scrollIntoView({block: "center"});
}

// siblings ------------------------------------------------------------------------------------------------------------

function siblingsBar(view) {
  const step = by => {
    const {siblings, at} = siblingsOf(view.node);
    Chat.showLeaf(Tree.leafBelow(Chat.children, siblings[at + by].id));
    views.get(siblings[at + by].id)?.actions?.querySelector(`.siblings button:${by < 0 ? "first" : "last"}-of-type`)?.focus();
  };
  const question = view.node.role === "user";
  view.previous = iconButton(question ? TEXT.previousVersion : TEXT.previousAnswer, "left", () => step(-1));
  view.next = iconButton(question ? TEXT.nextVersion : TEXT.nextAnswer, "right", () => step(1));
  view.position = element("span");
  return view.siblings = element("div", {className: "siblings"}, view.previous, view.position, view.next);
}

function siblingsOf(node) {
  const siblings = Chat.children.get(Chat.nodes.has(node.parent) ? node.parent : null) ?? [node];
  return {siblings, at: siblings.indexOf(node)};
}

function updateSiblings(view) {
  const {siblings, at} = siblingsOf(view.node);
  view.siblings.hidden = siblings.length < 2;
  view.position.textContent = `${at + 1}/${siblings.length}`;
  view.previous.disabled = at <= 0;
  view.next.disabled = at === siblings.length - 1;
}

// questions -----------------------------------------------------------------------------------------------------------

function completeQuestion(view) {
  view.edit = iconButton(TEXT.edit, "edit", () => startEdit(view.node.id));
  view.actions = element("div", {className: "actions"}, siblingsBar(view), view.edit,
    iconButton(TEXT.copy, "copy", clicked => copyText(view.node.content, clicked)),
    iconButton(TEXT.more, "more", clicked => Page.openMenu(clicked, messageMenu(view))));
  view.article.append(view.actions);
  // in a text that a model continues, the buttons of one's own words are hidden from the mouse
  view.body.onclick = event => clickToAct(event, () => startEdit(view.node.id), Server.model.api === "text");
}

function updateQuestion(view) {
  view.edit.disabled = Tree.isGrowing(Chat.lastNode());
  if (view.drawn === view.node.content || view.editor) return;
  view.drawn = view.node.content;
  const {text, files} = Tree.partsOf(view.node);
  const nodes = [...files.filter(({picture}) => picture).map(pictureNode), ...questionNodes(text), ...files.filter(({picture}) => !picture).map(fileNode)];
  changeChildren(view.body, () => view.body.replaceChildren(...nodes));
}

// A question is shown as typed, except that code looks like code.
function questionNodes(text) {
  return Fences.split(text).flatMap(({text: words, language, code}) => words === undefined ? [codeBlock(language, code)]
    : words.split(/`([^`\n]+)`/).map((part, i) => i % 2 ? element("code", {textContent: part}) : part));
}

function codeBlock(language, text) {
  const code = new Markdown.CodeText(language);
  code.update(text, true);
  return Markdown.codeBox(language, code.element);
}

// A thumbnail, which opens the picture.
function pictureNode({name, picture}) {
  return element("button", {type: "button", className: "thumbnail", title: name, onclick: event => { event.stopPropagation(); showPicture(name, picture); }},
    element("img", {src: picture, alt: name}));
}

function showPicture(name, picture) {
  const dialog = $("picture-dialog");
  dialog.replaceChildren(element("img", {src: picture, alt: name}));
  dialog.onclick = () => dialog.close();
  dialog.showModal();
}

function fileNode({name, text}) {
  const node = element("details", {className: "file"}, element("summary", {}, element("span", {className: "icon i-file", textContent: name}),
    element("small", {textContent: TEXT.characters(text.length)})));
  node.addEventListener("toggle", () => { if (node.open && !node.children[1]) node.append(codeBlock(Tree.languageOf(name), text)); });
  return node;
}

// answers -------------------------------------------------------------------------------------------------------------

function completeAnswer(view) {
  view.body.classList.add("markdown");
  view.markdown = new Markdown.View(view.body);
  view.thinking = element("details", {className: "thinking", hidden: true}, element("summary", {textContent: TEXT.thinking}));
  view.thoughts = element("div", {className: "markdown"});
  view.thinking.append(view.thoughts);
  view.thinking.addEventListener("toggle", () => drawThoughts(view));
  view.doing = element("span");
  view.now = button(TEXT.answerNow, "forward", async clicked => {
    clicked.disabled = true;
    Composer.focusAfterClick();
    clicked.disabled = await Chat.answerNow(view.node);
  }, {hidden: true});
  view.status = element("p", {className: "status"}, element("span", {className: "dots"}, element("i"), element("i"), element("i")),
    view.doing, view.now);
  view.alert = element("div");
  view.retry = iconButton(TEXT.regenerate, "again", () => { Chat.regenerate(view.node); Composer.focusAfterClick(); });
  view.goOn = button(TEXT.goOn, "forward", () => { Chat.goOn(view.node); Composer.focusAfterClick(); });
  view.nothing = element("p", {className: "nothing"});
  figuresLine(view);
  view.copy = iconButton(TEXT.copy, "copy", clicked => copyRich(view, clicked));
  const brought = ofParts(answer => answer.buttons?.(view));
  view.inside = button(TEXT.lookInside, "lens", clicked => Page.openMenu(clicked, looksOf(view)));
  view.actions = element("div", {className: "actions"}, siblingsBar(view), view.copy, view.retry, view.inside, ...brought, view.goOn,
    iconButton(TEXT.more, "more", clicked => Page.openMenu(clicked, answerMenu(view))), view.speed);
  view.article.prepend(view.thinking);
  view.article.append(view.nothing, view.status, view.alert, view.actions);
  view.body.onclick = event => clickToAct(event, () => Chat.regenerate(view.node));
}

// What the parts add to an answer: all lists together. A part that fails adds nothing.
const ofParts = ask => Parts.all.flatMap(({answer}) => answer && alone(() => ask(answer)) || []);

const looksOf = view => ofParts(answer => answer.looks?.(view));

function updateAnswer(view) {
  const {node} = view, growing = Tree.isGrowing(node), run = Chat.runs.get(node.id);
  drawAnswer(view, growing);
  view.thinking.hidden = !node.reasoning || Boolean(Look.lensOf(node.id));
  drawThoughts(view);
  view.status.hidden = !growing || node.content !== "" || Boolean(node.calculator?.length);
  view.doing.textContent = view.status.hidden ? "" : growingText(node, run);
  if (!growing) view.now.disabled = false;
  view.now.hidden = view.status.hidden || !node.reasoning || !Server.model.can.reasoning_budget;
  updateAlert(view, growing);
  view.actions.classList.toggle("growing", growing);
  view.retry.disabled = view.goOn.disabled = !Chat.canAsk();
  view.copy.hidden = !node.content;
  ofParts(answer => { answer.update?.(view, growing); });
  view.inside.hidden = !looksOf(view).length;
  view.inside.classList.toggle("on", Boolean(Look.lensOf(node.id)));
  view.goOn.hidden = growing || !Chat.canGoOn(node) || node !== Chat.lastNode() || !(view.plain || node.error || node.edited ||
    ["stopped", "interrupted"].includes(node.note) || node.timings?.finish_reason === "length" || node.timings?.stop_reason === "repetition");
  setText(view.nothing, nothingText(node));
  view.nothing.hidden = !view.nothing.textContent;
  updateFigures(view, growing);
}

function drawAnswer(view, growing) {
  const {node: {content, calculator = []}} = view, drawn = calculator.length ? Calculator.withCards(content, calculator) : content;
  const plain = Server.model.api === "text";             // a text that grows
  if (view.editor || view.drawn === drawn && view.finished === !growing && view.plain === plain) return;
  view.body.dir = plain ? "auto" : "";                   // blocks of Markdown have their own
  if (plain) changeChildren(view.body, () => view.body.replaceChildren(...Calculator.plainWithCards(view.node)));
  else if (view.plain) { view.body.replaceChildren(); view.markdown = new Markdown.View(view.body); }
  Object.assign(view, {drawn, finished: !growing, plain});
  view.body.classList.toggle("markdown", !plain);
  if (!plain) view.markdown.update(content, !growing, calculator);
}

// Reasoning is drawn when it is opened; while it streams in it is shown until the answer begins.
function drawThoughts(view) {
  const {node} = view, growing = Tree.isGrowing(node);
  if (growing && !node.content && node.reasoning && view.opened === undefined) view.thinking.open = view.opened = true;
  if (view.opened && node.content) view.thinking.open = view.opened = false;
  view.thinking.firstChild.dataset.time = [node.thought > 999 ? TEXT.seconds(node.thought / 1000) : "",
    node.timings?.reasoning_tokens ? TEXT.tokens(node.timings.reasoning_tokens) : ""].filter(Boolean).join(" · ");
  if (!view.thinking.open || view.thoughtsDrawn === node.reasoning) return;
  view.thoughtsDrawn = node.reasoning;
  view.thoughtsView ??= new Markdown.View(view.thoughts);
  view.thoughtsView.update(node.reasoning ?? "", !growing || node.content !== "");
}

const REMEDIES = {key: {label: () => TEXT.enterKey, act: () => Settings.openServer()},
  again: {label: () => TEXT.tryAgain, act: node => Chat.regenerate(node)}};

function updateAlert(view, growing) {
  const {node} = view, text = growing ? "" : node.error ?? "";
  if (view.alerted !== text) {
    view.alerted = text;
    const remedy = REMEDIES[node.remedy] ?? REMEDIES.again;
    const act = element("button", {type: "button", className: "plain", textContent: remedy.label(),
      onclick: () => { remedy.act(view.node); Composer.focusAfterClick(); }});
    view.alert.replaceChildren(...(text ? [element("div", {className: "alert", role: "alert"}, element("p", {textContent: text}), act)] : []));
  }
  const act = view.alert.querySelector("button");
  if (act) act.disabled = !Chat.canAsk() && node.remedy !== "key";
}

// What an answer is doing or waiting for.
function growingText(node, run) {
  if (!run) return TEXT.inOtherTab;
  if (run.waiting) return `${Server.trouble()} ${TEXT.sentThen}`;
  const {progress} = run, doing = run.lost ? TEXT.lost : progress?.loading ? TEXT.loadingModel(progress.loading.model, progress.loading.fraction)
    : progress?.queued ? TEXT.queued(progress.queued)
    : progress?.read !== undefined ? TEXT.reading(progress.read)
    : (node.content || node.calls?.length) && run.chunks ? TEXT.writing : node.reasoning && run.chunks ? TEXT.thinkingNow : TEXT.waitingForFirst;
  return (run.resumed ? `${TEXT.resumed} · ` : "") + doing;
}

const liveSpeedText = run => run.chunks > 1 && !run.lost
  ? ` · ${TEXT.speed(Chat.liveSpeed(run))} · ${TEXT.tokens((run.node.earlier?.completion_tokens ?? 0) + (run.tokens || run.chunks))}` : "";

// The note shown for an answer without text.
function nothingText(node) {
  const {content, error, note, reasoning, timings} = node;
  if (Tree.isGrowing(node) || error || content.trim() || node.calls?.length || node.calculator?.length) return "";
  return note ? TEXT.nothingBefore(TEXT.notes[note] ?? note) : !reasoning ? TEXT.nothing
    : timings?.finish_reason === "length" ? TEXT.onlyThoughts : TEXT.thoughtNothing;
}

// {words, figures, whether a speed is among the words} about an answer that has ended. The line below it shows the words; pointing at it or pressing it also shows the figures.
function speedOf({timings, note, edited, error}) {
  const words = note ? [TEXT.notes[note] ?? note] : edited ? [TEXT.edited] : [], figures = [], facts = timings ?? {};
  const {tokens_per_second: speed = facts.predicted_per_second, ttft_ms: first, completion_tokens: count} = facts;
  if (speed > 0) words.push(TEXT.speed(speed));
  else if (facts.measured) words.push(TEXT.aboutSpeed(facts.measured));
  if (facts.finish_reason === "length" && !note && !error) words.push(TEXT.cut);
  if (facts.stop_reason === "repetition" && !note && !error) words.push(TEXT.repeats);
  if (facts.dropped_messages) words.push(TEXT.dropped(facts.dropped_messages));
  if (first !== undefined) figures.push(TEXT.firstToken(first));
  if (count) figures.push(TEXT.tokens(count));
  if (count > 1 && speed > 0) figures.push(TEXT.seconds(((first ?? 0) + (facts.waited_ms ?? 0)) / 1000 + (count - 1) / speed));
  if (Server.model.workers > 1 && facts.gpu !== undefined) figures.push(TEXT.worker(facts.gpu));
  return {words, figures, timed: speed > 0 || Boolean(facts.measured)};
}

// the line of figures ------------------------------------------------------------------------------------------------

const shownFigures = {view: null, panel: null, pinned: false};        // the answer whose figures are shown; pinned: until they are closed

// One quiet line beside the buttons. Scripts may put more before the figures.
function figuresLine(view) {
  view.short = element("button", {type: "button", className: "short", onclick: () => pinFigures(view)});
  view.short.setAttribute("aria-expanded", "false");
  view.short.onpointerenter = event => { if (event.pointerType === "mouse" && !shownFigures.pinned) showFigures(view); };
  view.short.onpointerleave = event => { if (event.pointerType === "mouse" && !shownFigures.pinned) hideFigures(); };
  view.speed = element("div", {className: "speed"}, view.short);
}

function updateFigures(view, growing) {
  const {words, figures, timed} = growing ? {words: [], figures: []} : speedOf(view.node);
  setText(view.short, (timed ? words : [...words, ...figures.slice(0, 1)]).join(" · "));
  view.speed.hidden = !view.short.textContent;
  view.short.disabled = !figureLines(view.node).length;
  if (shownFigures.view === view && (growing || !view.short.isConnected)) hideFigures();
}

// All that is known of an answer, line by line.
function figureLines(node) {
  const {words, figures} = speedOf(node);
  return [Look.makerOf(node), [...words, ...figures].join(" · "), node.timings?.prompt_tokens ? TEXT.details(node.timings) : ""].filter(Boolean);
}

function showFigures(view) {
  hideFigures();
  const panel = element("div", {className: "figures", popover: "manual"}, ...figureLines(view.node).map(line => element("p", {textContent: line})));
  panel.setAttribute("role", "group");
  panel.setAttribute("aria-label", TEXT.figures);
  view.short.after(panel);
  panel.showPopover();
  Page.placeMenu(panel, view.short.getBoundingClientRect());
  view.short.setAttribute("aria-expanded", "true");
  Object.assign(shownFigures, {view, panel});
}

function hideFigures() {
  shownFigures.view?.short.setAttribute("aria-expanded", "false");
  shownFigures.panel?.remove();
  Object.assign(shownFigures, {view: null, panel: null, pinned: false});
}

// The panel stays beside its line while the chat scrolls, and goes with it.
function keepFiguresBeside() {
  const {view, panel} = shownFigures;
  if (!view) return;
  const line = view.short.getBoundingClientRect(), log = $("log").getBoundingClientRect();
  if (line.bottom < log.top || line.top > log.bottom) hideFigures();
  else Page.placeMenu(panel, line);
}

function pinFigures(view) {
  const again = shownFigures.view === view && shownFigures.pinned;
  if (again) return hideFigures();
  showFigures(view);
  shownFigures.pinned = true;
}

// One frame of a growing answer.
function paint(node) {
  const view = Chat.current.id === node.conversation && views.get(node.id);
  if (!view || !view.article.isConnected) return;
  update(view);
  Composer.renderState();
  Page.followEnd();
}

// acting on a message -------------------------------------------------------------------------------------------------

function messageMenu({node}) {
  return [[TEXT.branch, "branch", () => Chat.branchFrom(node)], [TEXT.deleteMessage, "delete", () => Chat.deleteNode(node)]];
}

function answerMenu(view) {
  return [[TEXT.copyMarkdown, "copy", () => copyText(view.node.content, view.copy)], [TEXT.edit, "edit", () => startEdit(view.node.id)],
    ...messageMenu(view)];
}

// If enabled, a mouse click on a question edits it, and one on an answer regenerates it; but not a click that
// ends a selection or hits an interactive element.
function clickToAct(event, act, always = false) {
  const own = event.target.closest("a, button, summary, pre, input, textarea, details");
  if (!always && !Settings.preferences.actOnClick || !mouse.matches || own || event.detail > 1 || String(getSelection()) || !Chat.canAsk()) return;
  act();
}

function startEdit(id) {
  if (Tree.isGrowing(Chat.lastNode())) return;
  Chat.edit(id);
  Page.render();
}

function startEditing(view) {
  const {node, body} = view, question = node.role === "user";
  const field = element("textarea", {value: question ? Tree.partsOf(node).text : node.content, rows: 1, dir: "auto", autocomplete: "off"});
  field.setAttribute("aria-label", TEXT.editedText);
  const cancel = () => { Chat.edit(null); Page.render(); Composer.focusAfterClick(); };
  const save = () => {
    if (question ? Chat.editQuestion(node, field.value) : field.value.trim() && (Chat.editAnswer(node, field.value), true)) Composer.focusAfterClick();
  };
  if (question) onEnter(field, save);
  field.addEventListener("keydown", event => { if (event.key === "Escape" && !composing(event)) { event.stopPropagation(); cancel(); } });
  field.addEventListener("input", () => fitHeight(field));
  view.editor = field;
  body.replaceChildren(field, element("div", {className: "row"},
    element("button", {type: "button", className: "plain", textContent: TEXT.cancel, onclick: cancel}),
    element("button", {type: "button", className: "primary", textContent: question ? TEXT.update : TEXT.save, onclick: save})));
  view.article.classList.add("editing");
  requestAnimationFrame(() => { fitHeight(field); field.focus(); });
}

function stopEditing(view) {
  Object.assign(view, {editor: null, drawn: null});
  view.article.classList.remove("editing");
  view.body.replaceChildren();
  if (view.markdown) view.markdown = new Markdown.View(view.body);
}

const copyText = (text, clicked) => copyTypes({"text/plain": text}, clicked);

// Copies formatted text for editors that accept it, otherwise Markdown.
function copyRich({node, body}, clicked) {
  const copy = body.cloneNode(true);
  copy.querySelectorAll(".code-bar, .preview, .calculation").forEach(each => each.remove());
  return copyTypes({"text/plain": node.content, "text/html": copy.innerHTML}, clicked);
}

async function copyTypes(texts, clicked) {
  try {
    const blobs = Object.entries(texts).map(([type, text]) => [type, new Blob([text], {type})]);
    await navigator.clipboard.write([new ClipboardItem(Object.fromEntries(blobs))]);
  } catch (error) {                                      // plain http from another machine has no clipboard API
    const field = element("textarea", {value: " ", className: "unseen"});
    (clicked.closest("dialog") ?? document.body).append(field);      // outside of an open dialog nothing can be selected
    field.select();
    document.addEventListener("copy", event => {
      for (const [type, text] of Object.entries(texts)) event.clipboardData.setData(type, text);
      event.preventDefault();
    }, {once: true});
    document.execCommand("copy");
    field.remove();
    clicked.focus();
  }
  copied(clicked);
}

function copied(clicked) {
  Page.announce(TEXT.copied);
  clicked.classList.add("done");
  clicked.addEventListener("animationend", () => clicked.classList.remove("done"), {once: true});
}

Parts.register({
  strings: {
    turnNotDrawn: "This message could not be drawn: this is its plain text.", lookInside: "Look inside", copied: "Copied", copyMarkdown: "Copy as Markdown", branch: "Branch into a new chat", deleteMessage: "Delete from here on",
    editedText: "Edited text", cancel: "Cancel", update: "Update", save: "Save", edited: "edited",
    callouts: {note: "Note", tip: "Tip", important: "Important", warning: "Warning", caution: "Caution"},
    wrap: "Wrap lines", preview: "Preview", downloadCode: "Download code", codeIn: language => `Code${language ? ` in ${language}` : ""}`, enterKey: "Enter the key", tryAgain: "Try again",
    pleaseContinue: "Please continue.", noRoom: context => `The question and this answer fill the context of ${number(context)} tokens, so the answer cannot go on. Ask for the rest in a new chat.`,
    sentThen: "Your message will then be sent.", lost: "The connection is lost; trying again… Enter queues your next question.",
    endedIn: title => `The answer in “${title}” is finished.`, endedBadly: title => `The answer in “${title}” failed.`, show: "Show", endedMark: "✓ ",
    waiting: "Waiting for the answer", answering: "Answering", answerFinished: "Answer finished", answerStopped: "Answer stopped",
    waitingForFirst: "Waiting for the first token…", queued: position => `Number ${position} in the queue`,
    loadingModel: (name, share) => `Loading ${name}${share ? `, ${Math.floor(100 * share)}\u00a0%` : "…"}`,
    reading: share => `Reading the prompt, ${Math.floor(100 * share)}\u00a0%`, thinkingNow: "Thinking", writing: "Writing",
    resumed: "Resumed", inOtherTab: "Another tab is receiving this answer…",
    speed: speed => `${Parts.roughly(speed)} tok/s`, aboutSpeed: speed => `about ${Parts.roughly(speed)} tok/s`,
    firstToken: ms => `first token after ${ms < 999.5 ? `${Math.round(ms)} ms` : TEXT.seconds(ms / 1000)}`, tokens: count => plural(count, "token", "tokens"),
    seconds: seconds => `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`, worker: gpu => `worker ${gpu}`,
    nothing: "The model gave no answer.", thoughtNothing: "The model thought about it but gave no answer.",
    onlyThoughts: "The model was still thinking when it reached the length limit.",
    nothingBefore: note => `The answer was ${note} before its first word.`,
    cut: "cut at the length limit", repeats: "it repeats itself", dropped: count => `without the ${plural(count, "oldest message", "oldest messages")}, which no longer fit`,
    notes: {stopped: "stopped", interrupted: "interrupted"},
    figures: "Figures",
    details: ({prompt_tokens: prompt, cached_tokens: cached, queue_ms: queued}) => [
      `Prompt of ${plural(prompt, "token", "tokens")}${cached === undefined ? "" : `, ${plural(cached, "token", "tokens")} cached`}`,
      ...(queued === undefined ? [] : [`queued for ${Math.round(queued)} ms`])].join("; ") + ".",
  },
  bind() {
    addEventListener("beforeprint", () => views.forEach(complete));
    document.addEventListener("pointerdown", ({target}) => { if (shownFigures.view && !shownFigures.view.speed.contains(target)) hideFigures(); });
    document.addEventListener("keydown", event => {
      if (event.key !== "Escape" || !shownFigures.view) return;
      event.stopPropagation();
      hideFigures();
    }, {capture: true});
    addEventListener("scroll", keepFiguresBeside, {passive: true, capture: true});
  },
});

return Object.freeze({
  viewOf: id => views.get(id), render: renderTurns, update, paint, scrollTo, questionNodes, codeBlock, growingText, liveSpeedText, copyText, copied,
});
})();
