// Looking inside an answer: the probability of each token, replays, and the prompt behind it.
//
// The token lens is a replay that asks for log-probabilities; "Check that it repeats" compares a replay's tokens.
"use strict";

const Lens = (() => {

const {TEXT, $, element, setText, number, plural, newest, mouse} = Parts;

const BESIDE = 5;                 // alternatives listed for each token
const SHADES = [0.8, 0.5, 0.2, 0.05];         // class p1 .. p4: how many of these exceed a token's probability

// replays -------------------------------------------------------------------------------------------------------------

// Generates an answer again with the same inputs: {ids, entries, text, reasoning}. A stopped answer ends where it was stopped.
async function replay(node, {more = {}, signal, onToken = () => {}}) {
  const {continued, prefix, seed, model, note, ids: before} = node, {messages, parameters} = await Chat.requestOf(node), {max_tokens: most, ...others} = parameters;
  const stop = new AbortController(), made = {ids: [...prefix ?? []], entries: [], text: "", reasoning: "", calculator: []};
  const response = await Server.postAnswer({messages, id: Tree.newId(), signal: AbortSignal.any([signal, stop.signal]), model,
    parameters: {...others, ...(most && !continued ? {max_tokens: most} : {}), seed, ...(prefix ? {prefix_token_ids: prefix} : {}),
      resumable: false, progress: false, ...more}});
  for await (const {event} of Server.events(response.body, Server.FOREVER_MS)) {
    const {text, reasoning, ids, logprobs, calculator} = Server.readEvent(event);
    made.calculator.push(...Calculator.callsOf(calculator));
    made.text += text;
    made.reasoning += reasoning;
    made.ids.push(...ids);
    made.entries.push(...logprobs);
    onToken(made.ids.length);
    if ((note || continued) && before?.length && made.ids.length >= before.length) {
      stop.abort();
      made.ids.length = before.length;
      break;
    }
  }
  return made;
}

// The text of each token; a character split across tokens goes to its last one: [{id, text, special}]. Throws what postAnswer does.
async function piecesOf(ids, model) {
  const response = await Server.accepted(await Server.post("tokenize", {content: ids, with_pieces: true, ...Server.modelOfSeveral(model)}));
  return spelled((await response.json()).tokens);
}

function spelled(tokens) {
  const decoder = new TextDecoder(), encoder = new TextEncoder();
  return tokens.map(({id, piece, special = false}) => ({id, special,
    text: decoder.decode(Fields.isText(piece) ? encoder.encode(piece) : new Uint8Array(piece), {stream: true})}));
}

// Replays the answer and reports whether its tokens are the same; a different answer is kept as a sibling.
async function runAgain(view) {
  const {node} = view, {current: chat} = Chat, controller = new AbortController();
  view.checking = true;
  const report = text => { Chat.noteVerdict(node, text); setText(view.verdict, text); };
  try {
    const made = await replay(node, {signal: controller.signal, onToken: count => report(TEXT.runningAgain(count))});
    const at = await firstDifference(node, made), other = node.weights && node.weights !== Look.weightsOf(node.model) ? TEXT.otherWeights : "";
    report([at === null ? TEXT.sameAgain(made.ids.length) : TEXT.differsAt(at), other].filter(Boolean).join(" "));
    if (at !== null && Chat.current.id === chat.id) keepBeside(node, made);
  } catch (error) {
    report(error.message);
  }
  Page.announce(node.verdict);
  view.checking = false;
}

// Where a replay first differs from the answer: {at, was, is}, `at` counted from 1; null if it is the same.
async function firstDifference({ids, content, reasoning = "", model}, made) {
  if (!ids?.length) return content === made.text && reasoning === made.reasoning ? null : {at: 0, was: "", is: ""};
  const at = made.ids.findIndex((id, i) => id !== ids[i]), first = at < 0 ? made.ids.length : at;
  if (at < 0 && made.ids.length === ids.length) return null;
  const [was, is] = await Promise.all([ids, made.ids].map(each => first < each.length ? piecesOf([each[first]], model) : []));
  return {at: first + 1, was: was[0]?.text ?? "", is: is[0]?.text ?? ""};
}

function keepBeside(node, {text, reasoning, ids, calculator}) {
  const {leaf} = Chat, {parameters, seed, prefix} = node, system = Look.systemOf(node);
  Chat.addNode(node.parent, "assistant", text, {...Look.madeBy({system}), ...Look.askedWith(node), ids, parameters, seed, ...(prefix ? {prefix} : {}), ...(reasoning ? {reasoning} : {}), ...(calculator.length ? {calculator} : {})});
  Chat.showLeaf(leaf);
}

// the lens ------------------------------------------------------------------------------------------------------------

function toggleLens(view) {
  const {node} = view, on = Look.lensOf(node.id);
  if (on) {
    on.controller.abort();
    Look.dropLens(node.id);
  } else lookThrough(node);
  Turns.update(view);
}

async function lookThrough(node) {
  const lens = {tokens: [], at: -1, text: TEXT.reading(0), controller: new AbortController(), drawn: null};
  const show = () => { const view = Turns.viewOf(node.id); if (Look.lensOf(node.id) === lens && view?.complete) updateLens(view); };
  Look.keepLens(node.id, lens);
  try {
    const forced = forcedEntries(node), made = await replay(node, {more: Server.model.api === "text" ? {logprobs: BESIDE + 1} : {logprobs: true, top_logprobs: BESIDE + 1}, signal: lens.controller.signal,
      onToken: count => { lens.text = TEXT.looking(count); show(); }});
    const at = node.ids?.length ? await firstDifference(node, made) : null;
    lens.tokens = joined(await piecesOf(made.ids, node.model), [...await forced, ...made.entries]);
    lens.text = at ? TEXT.differsAt(at) : TEXT.lensHint;
  } catch (error) {
    if (error.name === "AbortError") return;
    lens.text = error.message;
  }
  show();
}

// Log-probabilities of an answer's forced first tokens. They were not sampled, so the model reads them as a prompt.
async function forcedEntries(node) {
  const {prefix = [], model} = node, {tokens} = prefix.length ? await promptOf(node) : {};
  if (!tokens) return [];
  const read = await Server.jsonOf(Server.post(Server.ROUTES.text, {prompt: [...tokens.map(({id}) => id), ...prefix], max_tokens: 0, echo: true, logprobs: BESIDE + 1,
    return_token_ids: true, ...Server.modelOfSeveral(model)}));
  return read?.choices?.[0]?.logprobs?.content?.slice(-prefix.length) ?? [];
}

// Tokens with their probabilities and alternatives. The server forces some without asking the model.
function joined(tokens, entries) {
  let next = 0;
  return tokens.map(token => {
    const entry = entries[next]?.id === token.id ? entries[next++] : null;
    if (!entry) return token;
    const beside = entry.top_logprobs.filter(({id}) => id !== token.id).slice(0, BESIDE);
    return {...token, share: Math.exp(entry.logprob), drafted: entry.drafted === true, beside: beside.map(({id, token: text, logprob}) => ({id, text, share: Math.exp(logprob)}))};
  });
}

function updateLens(view) {
  const {node} = view, lens = Look.lensOf(node.id);
  view.article.classList.toggle("looked-through", Boolean(lens));
  if (!lens) { view.lens?.remove(); view.lens = null; return; }
  if (!view.lens) makeLens(view);
  if (lens.drawn !== lens.tokens) drawTokens(view, lens);
  setText(view.lens.hint, lens.text);
}

function makeLens(view) {
  const list = element("div", {className: "tokens", tabIndex: 0, role: "listbox"});
  list.setAttribute("aria-label", TEXT.tokensOf);
  const close = element("button", {type: "button", className: "plain", textContent: TEXT.closeLens, onclick: () => { toggleLens(view); view.inside.focus(); }});
  const legend = element("p", {className: "legend"}, element("b", {textContent: TEXT.lensOn}), TEXT.legend,
    ...[1, ...SHADES].map((most, i) => element("span", {className: i ? `p${i}` : "", textContent: TEXT.shareRange(SHADES[i] ?? 0, most)})),
    element("span", {className: "drafted", textContent: TEXT.drafted}), close);
  if (view.isDialog) close.remove();
  view.lens = element("div", {className: "lens"}, legend, list);
  Object.assign(view.lens, {list, hint: element("p", {className: "hint"}), panel: element("div", {className: "beside"})});
  view.lens.append(view.lens.panel, view.lens.hint);
  const lens = () => Look.lensOf(view.node.id), at = target => target.dataset?.at === undefined ? -1 : Number(target.dataset.at);
  list.onmouseover = ({target}) => { if (mouse.matches && at(target) >= 0) chooseToken(view, lens(), at(target)); };
  list.onclick = ({target}) => { if (at(target) >= 0) chooseToken(view, lens(), at(target)); };
  list.onkeydown = event => {
    const {at: now, tokens} = lens(), to = {ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: tokens.length - 1}[event.key];
    if (to >= 0 && to < tokens.length) chooseToken(view, lens(), to);
    else if (["ArrowDown", "Enter"].includes(event.key)) view.lens.panel.querySelector("button")?.focus();
    else return;
    event.preventDefault();
  };
  view.lens.panel.onkeydown = event => {
    const buttons = [...view.lens.panel.querySelectorAll("button")], by = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1}[event.key];
    if (event.key === "ArrowUp") list.focus();
    else if (by) buttons.at((buttons.indexOf(document.activeElement) + by) % buttons.length).focus();
    else return;
    event.preventDefault();
  };
  view.body.after(view.lens);
}

const shown = text => text.replace(/\n/g, "↵\n");

function drawTokens({lens: {list, panel}, node}, lens) {
  lens.drawn = lens.tokens;
  list.replaceChildren(...lens.tokens.map(({text, special, share, drafted}, i) => {
    const shade = share === undefined ? 0 : SHADES.filter(most => share < most).length;
    const option = element("span", {id: `${node.id}-${i}`, role: "option", textContent: shown(text) || "·",
      className: `${shade ? `p${shade}` : ""}${special ? " special" : ""}${drafted ? " drafted" : ""}`});
    option.dataset.at = i;
    option.setAttribute("aria-selected", "false");
    if (!text.trim()) option.setAttribute("aria-label", quoted(text));
    return option;
  }));
  panel.replaceChildren();
}

const quoted = text => `“${text.replace(/\n/g, "↵")}”`;

// Shows a token's id, its probability and its alternatives; each alternative starts another answer.
function chooseToken(view, lens, at) {
  const {list, panel} = view.lens, {id, text, share, drafted, beside = []} = lens.tokens[at];
  list.children[lens.at]?.setAttribute("aria-selected", "false");
  lens.at = at;
  list.children[at].setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", list.children[at].id);
  const about = [quoted(text), TEXT.tokenId(id), share === undefined ? TEXT.notDrawn : TEXT.share(share), ...drafted ? [TEXT.drafted] : []].join(" · ");
  panel.replaceChildren(element("p", {textContent: about}), ...beside.map(other => {
    if (view.isDialog) return element("span", {className: "plain"}, element("span", {textContent: quoted(other.text)}), element("small", {textContent: TEXT.share(other.share)}));
    const made = element("button", {type: "button", className: "plain", disabled: !Chat.canAsk(), title: TEXT.tokenId(other.id),
      onclick: () => branchAt(view.node, lens, at, other)}, element("span", {textContent: quoted(other.text)}), element("small", {textContent: TEXT.share(other.share)}));
    made.setAttribute("aria-label", TEXT.goOnWith(quoted(other.text), TEXT.share(other.share)));
    return made;
  }));
}

// Starts another answer to the same question, with this token at this position and otherwise the same inputs.
function branchAt(node, {tokens}, at, {id}) {
  const {parameters = {}, seed} = node, prefix = [...tokens.slice(0, at).map(token => token.id), id];
  Chat.answerAgain(Chat.nodes.get(node.parent), {prefix, ids: [...prefix], parameters: {...parameters, seed}, system: Look.systemOf(node), ...Look.askedWith(node)});
}

// The tokens of a text that is no answer of this chat, in a dialog. `ask` is what a model is asked: a question in a chat, or a text whose own
// tokens are looked at, or with `most` its continuation.
const lensAsked = newest();

async function openLens(title, model, {question, text, most = 0}) {
  const isMine = lensAsked(), node = {id: `lens-${Tree.newId()}`}, dialog = $("lens-dialog");
  const view = {node, article: dialog, body: $("lens-text"), isDialog: true}, lens = {tokens: [], at: -1, text: TEXT.connecting, drawn: null};
  dialog.querySelector(".lens")?.remove();
  setText($("lens-title"), title);
  setText($("lens-text"), question ?? (most ? text : ""));
  Look.keepLens(node.id, lens);
  updateLens(view);
  dialog.onclose = () => Look.dropLens(node.id);
  dialog.showModal();
  const more = {...Server.modelOfSeveral(model), temperature: 0, return_token_ids: true};
  try {
    const response = await Server.accepted(await (question === undefined
      ? Server.post(Server.ROUTES.text, {prompt: text, logprobs: BESIDE + 1, max_tokens: most, ...(most ? {} : {echo: true}), ...more})
      : Server.post(Server.ROUTES.v1, {messages: [{role: "user", content: question}], logprobs: true, top_logprobs: BESIDE + 1, max_tokens: 1, ...more})));
    const entries = (await response.json()).choices[0].logprobs.content.filter(({logprob}) => typeof logprob === "number");
    lens.tokens = joined(await piecesOf(entries.map(({id}) => id), model), entries);
    lens.text = TEXT.lensLook;
  } catch (error) {
    lens.text = error.message;
  }
  if (isMine() && Look.lensOf(node.id)) updateLens(view);
}

// the prompt -----------------------------------------------------------------------------------------------------------

// The prompt of an answer: {messages, tokens}; no tokens if the server does not show them.
async function promptOf(node) {
  const {timings = {}, model} = node, {messages: all, parameters} = await Chat.requestOf(node), dropped = Math.max(0, (timings.dropped_messages ?? 0) - all.dropped);
  const fixed = all[0]?.role === "system" ? 1 : 0, messages = [...all.slice(0, fixed), ...all.slice(fixed + dropped)];
  const effort = parameters.reasoning_effort ? {reasoning_effort: parameters.reasoning_effort} : {};
  const wanted = Server.model.api === "text" ? ["tokenize", {content: Server.textToContinue(messages), add_special: true}]
    : ["apply-template", {messages, ...effort, ...(parameters.tools ? {tools: parameters.tools} : {})}];
  const found = await Server.jsonOf(Server.post(wanted[0], {...wanted[1], with_pieces: true, ...Server.modelOfSeveral(model)}));
  return {messages, tokens: found?.tokens && spelled(found.tokens)};
}

const promptAsked = newest();

async function openPrompt(node) {
  const isMine = promptAsked();
  $("prompt-text").replaceChildren(TEXT.connecting);
  $("prompt-counts").replaceChildren();
  setText($("prompt-facts"), "");
  $("prompt-dialog").showModal();
  const {messages, tokens} = await promptOf(node), {timings = {}} = node;
  if (!isMine()) return undefined;
  if (!tokens) return setText($("prompt-text"), TEXT.noPrompt);
  const cached = timings.cached_tokens ?? 0, context = Server.model.context;
  $("prompt-text").replaceChildren(...promptNodes(tokens, cached));
  $("prompt-counts").replaceChildren(...countsNodes(messages, tokens));
  setText($("prompt-facts"), TEXT.promptFacts({tokens: tokens.length, context, cached, dropped: timings.dropped_messages ?? 0}));
  $("prompt-bar").style.setProperty("--used", Math.min(1, tokens.length / (context || tokens.length)));
  return undefined;
}

// Draws runs of tokens as text, special ones separately.
function promptNodes(tokens, cached) {
  const nodes = [];
  let last = null;
  tokens.forEach(({text, special}, i) => {
    const look = [special ? "special" : "", i < cached ? "cached" : ""].filter(Boolean).join(" ");
    if (!last || special || last.className !== look) nodes.push(last = element("span", {className: look}));
    last.append(text);
  });
  return nodes;
}

// Counts the tokens of each message's text; the rest belong to the template.
function countsNodes(messages, tokens) {
  const text = tokens.map(token => token.text).join("");
  let at = 0, token = 0, offset = 0;
  const counts = messages.map(({role, content, calculator}) => {
    const said = Calculator.withNames({content, calculator}).trim(), start = text.indexOf(said, at);
    if (start < 0) return {role, content, count: 0};
    at = start + said.length;
    for (; token < tokens.length && offset + tokens[token].text.length <= start; token++) offset += tokens[token].text.length;
    let count = 0;
    for (; token < tokens.length && offset < at; token++, count++) offset += tokens[token].text.length;
    return {role, content, count};
  });
  const rest = tokens.length - counts.reduce((sum, {count}) => sum + count, 0);
  return [...counts, {role: TEXT.template, content: "", count: rest}].map(({role, content, count}) => element("li", {},
    element("b", {textContent: TEXT.roles[role] ?? role}), element("span", {textContent: content.slice(0, 200)}), element("small", {textContent: TEXT.tokens(count)})));
}

Parts.register({
  strings: {
    lensOn: "Token lens: on.", legend: "Probability of each token:", closeLens: "Close the lens",
    shareRange: (least, most) => most === 1 ? `${100 * least}\u00a0% or more` : least ? `${100 * least} to ${100 * most}\u00a0%` : `under ${100 * most}\u00a0%`,
    tokensOf: "Tokens of the answer", notDrawn: "not sampled by the model", drafted: "drafted this time", goOnWith: (text, share) => `Continue with ${text}, ${share}`,
    looking: count => `Running again to get the probabilities: ${plural(count, "token", "tokens")}`,
    lensHint: "Choose a token to see its alternatives; choosing one of these starts another answer.",
    lensLook: "Choose a token to see its alternatives.",
    runningAgain: count => `Checking: ${plural(count, "token", "tokens")}`, sameAgain: count => `It repeats: the same ${plural(count, "token", "tokens")}.`,
    differsAt: ({at, was, is}) => `It does not repeat: it differs${at ? ` from token ${number(at)} on: ${is ? `“${is}”` : "the end"} instead of ${was ? `“${was}”` : "the end"}` : ""}.`,
    otherWeights: "The model's weights have changed since.", noPrompt: "The server does not show the prompt.", template: "Template",
    roles: {system: "System", user: "You", assistant: "Assistant", tool: "Result"},
    promptFacts: ({tokens, context, cached, dropped}) => [`${plural(tokens, "token", "tokens")}${context ? ` of ${number(context)}` : ""}`,
      ...(cached ? [`the first ${number(cached)} (grey) were cached`] : []),
      ...(dropped ? [`${plural(dropped, "oldest message", "oldest messages")} left out`] : [])].join("; ") + ".",
  },
});

return Object.freeze({open: openLens, toggle: toggleLens, update: updateLens, runAgain, openPrompt});
})();
