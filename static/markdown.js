// Draws Markdown while it streams in, in time proportional to the new text, not to all of it.
//
// Blocks are found line by line, as CommonMark describes: a stack of open containers (quotes, lists, items)
// and one open leaf (paragraph, code, table ...). A line is classified once, as soon as its first characters
// decide what it is; after that only its text grows. The part of an open paragraph that no later text can
// change is settled, and so is highlighted code up to a point where the highlighter is in its initial state.
// Settled nodes are never touched again; only the short unsettled rest of the open leaf is redrawn, so a
// reader's selection stays. Within lines, marked's tokenizer decides; elements are made from its tokens, never
// from HTML text. Only KaTeX's output is HTML, and it goes through DOMPurify.
//
// Nobody knows what a model writes, so no text costs more than its length: what takes the square of it sees a bounded
// part at once (WINDOW, MOST_CODE, MOST_TEX, MOST_FILLED).
"use strict";

const Markdown = (() => {

const {TEXT, element, changeChildren} = Parts;

// characters parsed, nodes made or replaced: the tests read them
const markdownWork = {characters: 0, nodes: 0};

const SETTLE = 200;               // unsettled characters of a paragraph before part of them is settled
// characters that marked reads at once. If more of a paragraph are unsettled, some are settled anyway, and it is redrawn when it ends
const WINDOW = 2000;
const CODE_STEP = 150;            // characters of code highlighted together
const MOST_CODE = 6000;           // most characters highlighted together; a longer line is plain
const MOST_NESTED = 60;           // nesting depth; thousands crash the tab, and again whenever the chat is opened
const MOST_TEX = 5000;            // characters of a formula
const MOST_FILLED = 10000;        // empty cells that a table gets where its rows lack some

// The signs of callouts: drawings of 24 by 24.
const SIGNS = {
  note: "M12 3.5a8.5 8.5 0 1 0 0 17a8.5 8.5 0 0 0 0-17M12 11v5.5M12 7.6v.1",
  tip: "M9.5 17.5h5M10.5 20.5h3M9.5 17.5c0-2.5-3-3.5-3-7.5a5.5 5.5 0 0 1 11 0c0 4-3 5-3 7.5",
  important: "M4 4.5h16v11.5h-8.5L7.5 20v-4H4zM12 7.5v3.5M12 13.3v.1",
  warning: "M12 4L2.8 20h18.4zM12 10v4.5M12 17.2v.1",
  caution: "M8.4 3.5h7.2l4.9 4.9v7.2l-4.9 4.9H8.4l-4.9-4.9V8.4zM12 7.5v5.5M12 16.2v.1",
};
const signUrl = path => `url("data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24' fill='none' stroke='black' ` +
  `stroke-width='1.9' stroke-linecap='round' stroke-linejoin='round'%3E%3Cpath d='${path}'/%3E%3C/svg%3E")`;

// Styles of code, formulas, callouts and table cells, here and in an exported page, which gets none of chat.css.
// For the lines of a table, KaTeX swaps left and right with top and bottom.
const DRAWN_STYLE = `
.hljs-keyword, .hljs-literal, .hljs-selector-tag, .hljs-type, .hljs-tag .hljs-name { color: var(--keyword); }
.hljs-string, .hljs-regexp, .hljs-addition, .hljs-template-tag { color: var(--string); }
.hljs-number, .hljs-symbol, .hljs-bullet, .hljs-attr, .hljs-meta { color: var(--number); }
.hljs-comment, .hljs-quote { color: var(--comment); font-style: italic; }
.hljs-title, .hljs-section, .hljs-built_in, .hljs-variable.language_ { color: var(--title); }
.hljs-deletion { color: var(--danger); }
.part { display: block; }
.code, math, :not(pre) > code { direction: ltr; unicode-bidi: isolate; }
:is(ul, ol):has(> li:first-child > p:first-child:dir(rtl)), blockquote:has(> :first-child:dir(rtl)), table:has(th:first-child:dir(rtl)) { direction: rtl; }
summary > p { display: inline; }
.calculation { margin-inline: .1em .3em; padding: .1em .45em; border: 1px solid var(--line); border-radius: .5em; background: var(--sunken); font-size: .9em; overflow-wrap: anywhere; user-select: none; -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.calculation code { padding: 0; background: none; font-size: 1em; }
.footnote { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0 .5em; margin: .3em 0; font-size: .9em; }
.footnote > :not(:first-child) { grid-column: 2; margin-block: 0; }
:is(th, td).right { text-align: right; }
:is(th, td).center { text-align: center; }
.callout, .markdown .callout { --tone: var(--title); margin-inline: 0; padding: .6em 1em; border-inline-start: 4px solid var(--tone); border-radius: .4rem; --paper: color-mix(in srgb, var(--tone) 8%, var(--page)); background: var(--paper); color: inherit; }
.callout.callout-tip { --tone: var(--string); }
.callout.callout-important { --tone: var(--keyword); }
.callout.callout-warning { --tone: light-dark(#8a5a10, #e0a83e); }
.callout.callout-caution { --tone: var(--danger); }
.callout > :last-child, .markdown .callout > :last-child { margin-bottom: 0; }
.callout > .callout-title { display: flex; align-items: center; gap: .45em; margin: 0 0 .35em; color: var(--tone); }
.callout:has(> :nth-child(2):dir(rtl)) { direction: rtl; }
.callout-title::before { content: ""; flex: none; width: 1.15em; height: 1.15em; background: currentColor; mask: var(--sign) center / contain no-repeat; }
${Object.entries(SIGNS).map(([kind, path]) => `.callout-${kind} { --sign: ${signUrl(path)}; }`).join("\n")}
@media (forced-colors: active) { .callout-title::before { forced-color-adjust: none; background: CanvasText; } }
mtd.left { text-align: -webkit-left; }
mtd.right { text-align: -webkit-right; }
mtd.joined { padding-right: 0; }
mtd.joined + mtd { padding-left: 0; }
mtd.ruled { border-right: 1px solid; }
mtr.ruled > mtd { border-bottom: 1px solid; }
.mtr-glue, .mml-eqn-num, mtd[width="50%"] { display: none; }
mtable[width="100%"] > mtr > mtd:last-child { padding-left: 2em; }
.integral > :last-child { padding-left: .25em; }
:is([display="block"], [displaystyle="true"]) .integral > :last-child { padding-left: .55em; }
:is(mfrac, [displaystyle="false"]) .integral > :last-child { padding-left: .25em; }
menclose[notation~="box"] { padding: .15em .3em; }
menclose:is([notation~="box"], [notation~="left"]) { border-top: 1px solid; }
menclose:is([notation~="box"], [notation~="right"]) { border-bottom: 1px solid; }
menclose:is([notation~="box"], [notation~="top"]) { border-left: 1px solid; }
menclose:is([notation~="box"], [notation~="bottom"]) { border-right: 1px solid; }
menclose[notation~="updiagonalstrike"] { background: linear-gradient(to top left, #0000 48%, currentColor 48% 52%, #0000 52%); }
menclose[notation~="downdiagonalstrike"] { background: linear-gradient(to top right, #0000 48%, currentColor 48% 52%, #0000 52%); }
`;
const drawnStyle = new CSSStyleSheet();
drawnStyle.replaceSync(DRAWN_STYLE);
document.adoptedStyleSheets.push(drawnStyle);

// text within lines ---------------------------------------------------------------------------------------------------

// TeX in $$..$$, \[..\], \(..\) and $..$ (no space inside, no letter or digit before or after it, so that prices and variables stay text), and environments on their own.
const ENVIRONMENT = "(?:align(?:ed|at|edat)?|equation|gather(?:ed)?|split|[dr]?cases|array|(?:[pbBvV]|small)?matrix)\\*?";
const MATH = new RegExp(String.raw`^(?:\$\$([^]+?)\$\$|\\\[([^]+?)\\\]|\\\(([^]+?)\\\)|\$(?![\s$])((?:\\.|[^$\\\n])*?[^\s$\\])\$(?![\dA-Za-z])|(\\begin\{(${ENVIRONMENT})\}[^]+?\\end\{\6\}))`);
const ENVIRONMENT_BEGINS = new RegExp(String.raw`^ {0,3}\\begin\{(${ENVIRONMENT})\}`);
const mathToken = {name: "math", level: "inline",
  start: source => { const at = source.search(/\$|\\(?:[[(]|begin\{)/); return at < 0 ? undefined : at; },
  tokenizer(source, before) {
    const found = MATH.exec(source);
    if (found?.[4] && /[\p{L}\p{N}]$/u.test(before?.at(-1)?.raw ?? "")) return undefined;
    return found ? {type: "math", raw: found[0], tex: found.slice(1).find(Boolean), display: !found[3] && !found[4]} : undefined;
  }};

// [^1] refers to a footnote. A number looks like one even before, or without, its definition.
const noteToken = {name: "note", level: "inline",
  start: source => { const at = source.indexOf("[^"); return at < 0 ? undefined : at; },
  tokenizer(source) {
    const found = /^\[\^([^\][\s^]{1,40})\]/.exec(source);
    if (!found || !/^\d+$/.test(found[1]) && !this.lexer.tokens.links[noteKey(found[1])]) return undefined;
    return {type: "note", raw: found[0], label: found[1]};
  }};

const noteKey = label => `^${label.toLowerCase()}`;

// Bold, italics and struck words. marked gives a text in which code, links and escapes are masked, the whole of it each time; what is bold is
// read as a text of its own, whose pairs of marks are known.
const pairsIn = new Map();        // masked text -> its pairs of marks, while a text is being read
let within = null;                // what is read inside of marks: {length, pairs: those of the text around, offset: where it begins there, depth}

function emphasisToken(source, masked) {
  const mark = source[0], at = masked.length - source.length;
  if (!"*_~".includes(mark) || within?.depth >= MOST_NESTED) return undefined;
  const outer = within, isInside = outer?.length === masked.length;
  if (!isInside && !pairsIn.has(masked)) pairsIn.set(masked, Emphasis.pairsOf(masked));
  const pairs = isInside ? outer.pairs : pairsIn.get(masked), offset = isInside ? outer.offset : 0, pair = pairs.get(offset + at);
  if (!pair) return undefined;
  const raw = source.slice(0, pair.end - offset - at), text = raw.slice(pair.size, -pair.size);
  within = {length: text.length, pairs, offset: offset + at + pair.size, depth: (outer?.depth ?? 0) + 1};
  const tokens = this.lexer.inlineTokens(text);
  within = outer;
  return {type: mark === "~" ? "del" : pair.size === 2 ? "strong" : "em", raw, text, tokens};
}

const markdown = new marked.Marked({gfm: true, breaks: true, extensions: [mathToken, noteToken, Calculator.token],
  tokenizer: {emStrong: emphasisToken, del: emphasisToken}});

// Reads a text window by window. No mark is open where one ends, unless a pair of marks is longer than a window.
function inlineTokens(text, links) {
  const tokens = [];
  let at = 0;
  while (text.length - at > WINDOW) {
    const found = tokensOf(text.slice(at, at + WINDOW), links);
    at += moveTokens(found, settledLength(found) || WINDOW * 3 / 4, tokens);
  }
  return [...tokens, ...tokensOf(text.slice(at), links)];
}

function tokensOf(text, links) {
  markdownWork.characters += text.length;
  pairsIn.clear();
  within = null;
  const lexer = new marked.Lexer(markdown.defaults);
  lexer.tokens.links = links;
  return lexer.inlineTokens(text);
}

// Moves the tokens of a text's first `most` characters to others, and returns how many characters they have. Words are cut there at a space,
// if there is one; any other token stays whole.
function moveTokens(from, most, to) {
  let length = 0;
  for (const token of from) {
    if (length >= most) break;
    const moved = token.type === "text" ? firstWords(token, most - length) : token;
    to.push(moved);
    length += moved.raw.length;
  }
  return length;
}

function firstWords(token, most) {
  if (token.raw.length <= most) return token;
  const words = token.raw.slice(0, token.raw.lastIndexOf(" ", most - 1) + 1 || most).replace(/[\ud800-\udbff]$/, "");
  return {...token, raw: words, text: words};
}

const CLEAN = {USE_PROFILES: {html: true, mathMl: true}, ADD_TAGS: ["semantics", "annotation"], FORBID_TAGS: ["style", "img"],
  FORBID_ATTR: ["style", "id", "name"], RETURN_DOM_FRAGMENT: true};
const cleanFragment = html => DOMPurify.sanitize(html, CLEAN);

const entities = text => /&[#\w]+;/.test(text) ? cleanFragment(text.replace(/</g, "&lt;")).textContent : text;

// How each kind of token is drawn. HTML in the text is shown as text, except a few harmless tags without
// attributes.
const DRAWN = {
  text: token => token.tokens ? inlineNodes(token.tokens) : [entities(token.text)],
  escape: token => [token.text],
  strong: token => [element("strong", {}, ...inlineNodes(token.tokens))],
  em: token => [element("em", {}, ...inlineNodes(token.tokens))],
  del: token => [element("del", {}, ...inlineNodes(token.tokens))],
  codespan: token => [element("code", {textContent: Calculator.plainCards(token.text)})],
  br: () => [element("br")],
  link: token => [linkNode(token.href, inlineNodes(token.tokens))],
  // nothing is fetched without a click
  image: token => [linkNode(token.href, [token.text || token.href])],
  math: token => [mathNode(Calculator.plainCards(token.tex), token.display)],
  note: token => [noteMark(token.label)],
  calculation: token => [Calculator.card(token)],
};

// A footnote's mark, which leads to the footnote of the same answer.
function noteMark(label) {
  const mark = element("a", {textContent: label, tabIndex: 0}), key = noteKey(label);
  mark.setAttribute("role", "link");
  mark.onclick = () => [...mark.closest(".markdown")?.querySelectorAll(".footnote") ?? []].find(each => each.dataset.note === key)?.scrollIntoView({block: "center"});
  mark.onkeydown = event => { if (event.key === "Enter") mark.onclick(); };
  return element("sup", {className: "note"}, mark);
}

function linkNode(href, children) {
  const link = element("a", {}, ...children);
  if (/^(https?|mailto):/i.test(href)) Object.assign(link, {href, target: "_blank", rel: "noopener noreferrer"});
  return link;
}

function inlineNodes(tokens) {
  const levels = [{tag: "", nodes: []}];           // the last one belongs to the innermost open tag
  for (const token of tokens) {
    const [, close, tag] = token.type === "html" ? /^<(\/?)(br|sub|sup|kbd)\s*\/?>$/i.exec(token.raw) ?? [] : [];
    if (tag?.toLowerCase() === "br") levels.at(-1).nodes.push(element("br"));
    else if (tag && !close && levels.length < MOST_NESTED) levels.push({tag: tag.toLowerCase(), nodes: []});
    else if (tag && close && levels.at(-1).tag === tag.toLowerCase()) closeTag(levels);
    else levels.at(-1).nodes.push(...(DRAWN[token.type]?.(token) ?? [token.raw]));
  }
  while (levels.length > 1) closeTag(levels);
  return levels[0].nodes;
}

function closeTag(levels) {
  const {tag, nodes} = levels.pop();
  levels.at(-1).nodes.push(element(tag, {}, ...nodes));
}

// Cached formulas, the latest last: the unsettled rest of a growing line is redrawn in each frame.
const formulas = new Map();
const MOST_FORMULAS = 100;

// Formulas show their source until KaTeX is loaded; those that are too large always do.
function mathNode(tex, display) {
  const key = `${display} ${tex}`, made = formulas.get(key) ?? newFormula(tex, display);
  if (made) {
    formulas.delete(key);
    formulas.set(key, made);
    if (formulas.size > MOST_FORMULAS) formulas.delete(formulas.keys().next().value);
    return made.cloneNode(true);
  }
  const node = element("code", {className: "tex", textContent: tex});
  if (display) node.dataset.display = "";
  return node;
}

function newFormula(tex, display) {
  if (tex.length > MOST_TEX) return null;
  if (typeof katex === "undefined") { Parts.need("katex", drawFormulas); return null; }
  const html = mathOf(tex, display);
  return html && deepest(html) <= MOST_NESTED ? withClasses(cleanFragment(html)) : null;
}

const LINED = ["solid", "dashed"];

// Browsers ignore most attributes of MathML tables, so classes align, join and rule the cells.
function withClasses(formula) {
  for (const table of formula.querySelectorAll("mtable")) {
    const [aligns, spaces, lines, rowLines] = ["columnalign", "columnspacing", "columnlines", "rowlines"]
      .map(name => table.getAttribute(name)?.split(" ") ?? []);
    if (table.getAttribute("width") === "100%") table.setAttribute("displaystyle", "true");            // of a formula with a \tag
    for (const [i, row] of [...table.children].entries()) {
      row.classList.toggle("ruled", LINED.includes(rowLines[i]));
      [...row.children].filter(cell => !cell.className).forEach((cell, i) => {                           // the others hold KaTeX's equation numbers
        cell.classList.add(aligns[i] ?? "center");
        cell.classList.toggle("joined", parseFloat(spaces[i] ?? spaces.at(-1)) === 0);
        cell.classList.toggle("ruled", LINED.includes(lines[i]));
      });
    }
  }
  // a sign: Chromium takes the minus of x = -1 for one between two numbers, and spaces it so
  for (const sign of formula.querySelectorAll("mo + mo")) {
    if (/^[-−+±∓]$/.test(sign.textContent) && !/^[)\]}!|′⌉⌋⟩]$/.test(sign.previousElementSibling.textContent)) sign.setAttribute("form", "prefix");
  }
  for (const integral of formula.querySelectorAll(":is(msup, msubsup) > mo:first-child")) {
    if (/[∫∬∭∮∯∰]/.test(integral.textContent)) integral.parentElement.classList.add("integral");
  }
  return formula;
}

// What KaTeX leaves out of its MathML: tags of single lines.
const LINES = /\\begin\{(?:align|alignat|gather|equation)\*?\}/;
const TAGS = /\\tag(\*?)\s*\{((?:[^{}]|\{[^{}]*\})*)\}/g;
const tagged = tex => LINES.test(tex) ? tex.replace(TAGS, (_, star, text) => `\\qquad\\text{${star ? text : `(${text})`}}`) : tex;

// Chromium sets n \log n as nlogn: this adds the thin spaces around a function's name.
const NAMED = "(?:<m(?:sub|sup|subsup|under|underover)><mrow>)?<mi[^>]*>[^<]{2,}</mi><mo>\u2061";
const BEFORE_NAME = new RegExp(`</m(?:i|n|sup|sub|frac|row)>(?=${NAMED})`, "g");
const AFTER_NAME = new RegExp("<mo>\u2061</mo>(?:</mrow>(?:(?!</?m(?:sub|sup|under)).)*</m(?:sub|sup|subsup|under|underover)>)?" +
  "(?=<m(?:i|n|sup|sub|frac|sqrt|row)>)", "g");
const spaced = html => html.replace(BEFORE_NAME, "$&<mspace width='0.17em'></mspace>").replace(AFTER_NAME, "$&<mspace width='0.17em'></mspace>");

function mathOf(tex, displayMode) {
  markdownWork.characters += tex.length;
  try {
    const html = katex.renderToString(tagged(tex), {displayMode, output: "mathml", throwOnError: false, trust: false, strict: false,
      maxExpand: 200, maxSize: 20});
    return html.includes('class="katex-error"') ? "" : spaced(html);          // it has a style, which the page's policy forbids: the source is shown
  } catch (error) {
    return "";                    // nested too deeply for KaTeX itself
  }
}

// The deepest nesting of elements in KaTeX's HTML.
function deepest(html) {
  let depth = 0, most = 0;
  for (const [, close, empty] of html.matchAll(/<(\/?)[a-z][^>]*?(\/?)>/g)) {
    if (!empty) depth += close ? -1 : 1;
    most = Math.max(most, depth);
  }
  return most;
}

function drawFormulas() {
  for (const node of document.querySelectorAll("code.tex")) node.replaceWith(mathNode(node.textContent, "display" in node.dataset));
}

// The text with open marks closed, so that half a **bold or `code` looks like what it will become.
function withClosers(text, links) {
  const closer = (text.match(/`/g)?.length ?? 0) % 2 ? "`" : (text.match(/\*\*(?=\S)|(?<=\S)\*\*/g)?.length ?? 0) % 2 ? "**" : "";
  if (!closer || text.endsWith(closer[0])) return inlineTokens(text, links);
  const tokens = inlineTokens(text + closer, links);
  const last = tokens.at(-1);
  return last?.type === {"`": "codespan", "**": "strong"}[closer] ? tokens : inlineTokens(text, links);
}

// The length of the longest beginning that no later text can change, up to a space outside of all marks.
function settledLength(tokens) {
  let at = 0, settled = 0;
  for (const token of tokens) {
    const raw = token.raw;
    if (token.type === "html" || token.type === "escape" && /[[(]/.test(raw)) break;
    if (token.type === "text") {
      const mark = raw.search(/[*~`[\]$\\<]|(?:^|\W)_|_(?:\W|$)/), words = mark < 0 ? raw : `${raw.slice(0, mark)}x`;
      const space = words.search(/(?<=\S) (?=\S+\s*$)/);
      if (space > 0) settled = at + space + 1;
      if (mark >= 0) break;
    }
    at += raw.length;
  }
  return settled;
}

// leaves --------------------------------------------------------------------------------------------------------------
// Each has set(content, whole) for the text of its current line, draw() for the next frame, and end() for when it closes.

class Leaf {
  constructor(view) { Object.assign(this, {view, parent: view.stack.at(-1).element, drawn: null}); }
  add(node) { markdownWork.nodes++; this.parent.append(node); return node; }
  end() { this.draw(true); }
}

class Paragraph extends Leaf {
  constructor(view) {
    super(view);
    this.begins = this.parent.localName === "li" && !this.parent.firstElementChild;      // may be a task: "[x] done"
    Object.assign(this, {element: this.add(element("p", {dir: "auto"})), lines: "", line: "", settled: 0, rest: [], forced: false});
  }

  get text() { return this.lines + this.line; }

  set(content, whole) {
    const line = content.trimStart();
    this.line = this.begins && !this.lines ? line.replace(/^\[([ xX])\] /, (_, mark) => mark === " " ? "☐ " : "☑ ") : line;
    if (whole) Object.assign(this, {lines: `${this.text}\n`, line: ""});
  }

  draw(final = false) {
    const text = this.text.trimEnd(), {links} = this.view;
    if (text === this.drawn && !final) return;
    this.drawn = text;
    if (!final && text.length - this.settled > SETTLE) this.settle(text);
    if (final && (this.forced || text.length - this.settled > WINDOW)) {
      this.settled = 0;
      this.element.replaceChildren();
    }
    const rest = text.slice(this.settled);
    this.replaceRest(inlineNodes(final ? inlineTokens(rest, links) : withClosers(rest, links)));
  }

  settle(text) {
    const rest = text.slice(this.settled);
    let length = settledLength(inlineTokens(rest, this.view.links));
    if (!length && rest.length > WINDOW) {
      length = rest.lastIndexOf(" ", rest.length - SETTLE) + 1 || rest.length - SETTLE;
      this.forced = true;
    }
    if (!length) return;
    this.replaceRest(inlineNodes(inlineTokens(rest.slice(0, length), this.view.links)));
    this.rest = [];
    this.settled += length;
  }

  replaceRest(nodes) {
    const fragment = new DocumentFragment();
    fragment.append(...nodes);
    const rest = [...fragment.childNodes];
    changeChildren(this.element, () => {
      this.rest.forEach(node => node.remove());
      this.element.append(fragment);
    });
    this.rest = rest;
    markdownWork.nodes += rest.length;
  }

  end() {
    Object.assign(this, {lines: takeDefinitions(this.text, this.view), line: ""});
    if (this.lines.trim()) this.draw(true);
    else this.element.remove();
  }

  become(tag) {
    this.end();
    const heading = element(tag, {dir: "auto"}, ...this.element.childNodes);
    this.element.replaceWith(heading);
  }
}

// Removes the definitions `[name]: address "title"` from the head of a paragraph.
function takeDefinitions(text, view) {
  for (let found; (found = /^\[(?!\^)([^\]\n]+)\]:[ \t]*\n?[ \t]*<?([^\s<>]+)>?(?:[ \t]*\n?[ \t]+["'(](.*)["')])?[ \t]*(?:\n|$)/.exec(text));) {
    const name = found[1].trim().replace(/\s+/g, " ").toLowerCase();
    view.links[name] ??= {href: found[2], title: found[3] ?? null};
    view.defined = true;
    text = text.slice(found[0].length);
  }
  return text;
}

class Heading extends Leaf {
  constructor(view, level) {
    super(view);
    Object.assign(this, {element: this.add(element(`h${level}`, {dir: "auto"})), text: ""});
  }
  set(content) { this.text = content; }
  draw(final = false) {
    const text = final ? this.text.replace(/(^|[ \t])#+[ \t]*$/, "").trim() : this.text.trim();
    if (text === this.drawn && !final) return;
    this.drawn = text;
    const links = this.view.links;
    const nodes = inlineNodes(final ? inlineTokens(text, links) : withClosers(text, links));
    changeChildren(this.element, () => this.element.replaceChildren(...nodes));
    markdownWork.nodes++;
  }
}

class Rule extends Leaf {
  constructor(view) { super(view); this.add(element("hr")); }
  set() {}
  draw() {}
}

class Code extends Leaf {
  constructor(view, language, fence = null) {
    super(view);
    Object.assign(this, {language, fence, row: view.rows, text: "", line: null, blanks: 0, code: new CodeText(language)});
    this.box = this.add(codeBox(language, this.code.element));
  }
  set(content, whole) {
    if (!this.fence && !content.trim()) { if (whole) this.blanks++; return; }
    this.line = "\n".repeat(this.blanks) + content;
    if (!whole) return;
    this.text += this.line + "\n";
    Object.assign(this, {line: null, blanks: 0});
  }
  draw(final = false) { this.code.update(Calculator.plainCards(this.text + (this.line ?? "")), final); }
  end() {
    if (this.line !== null) this.set(this.line, true);
    if (this.fence?.isMistaken) this.view.mistakenFrom = Math.min(this.view.mistakenFrom, this.row);
    this.draw(true);
    this.box.querySelector(".preview-code").hidden = !isDrawable(this.language, this.code.element.textContent);
  }
}

class Table extends Leaf {
  constructor(view, header, aligns) {
    super(view);
    this.body = element("tbody");
    Object.assign(this, {aligns, row: null, line: "", filled: 0});
    const table = element("table", {}, element("thead", {}, this.newRow(header, "th")), this.body);
    this.add(element("div", {className: "table"}, table));
  }
  newRow(line, tag) {
    const cells = tableCells(line), lacking = Math.max(0, this.aligns.length - cells.length);
    this.filled += lacking;
    return element("tr", {}, ...this.aligns.slice(0, this.filled > MOST_FILLED ? cells.length : Infinity).map((align, i) => {
      const cell = element(tag, {dir: "auto"}, ...inlineNodes(inlineTokens(cells[i] ?? "", this.view.links)));
      if (align) cell.className = align;
      markdownWork.nodes++;
      return cell;
    }));
  }
  set(content, whole) {
    this.line = content;
    if (!whole) return;
    this.draw();
    Object.assign(this, {row: null, line: "", drawn: null});
  }
  draw() {
    if (!this.line || this.line === this.drawn) return;
    this.drawn = this.line;
    const row = this.newRow(this.line, "td");
    if (this.row) this.row.replaceWith(row);
    else this.body.append(row);
    this.row = row;
  }
}

const tableCells = line => line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/)
  .map(cell => cell.trim().replaceAll("\\|", "|"));

// A formula on lines of its own; it becomes ordinary text if it never ends.
class MathBlock extends Leaf {
  constructor(view) {
    super(view);
    Object.assign(this, {element: this.add(element("p", {className: "tex"})), lines: "", line: "", done: false});
  }
  get text() { return this.lines + this.line; }
  set(content, whole) {
    this.line = content;
    if (!whole) return;
    this.lines = this.text + "\n";
    this.line = "";
    if (this.lines.length > MOST_TEX) return this.end();
    const text = this.lines.trim(), found = MATH.exec(text), tex = found?.[0].length === text.length && (found[1] ?? found[2] ?? found[5]);
    if (tex) {
      this.element.replaceWith(mathNode(tex, true));
      markdownWork.nodes++;
      this.done = true;
      this.view.leaf = null;
    // text follows the formula, so it is inline
    } else if (found || !text.startsWith("\\begin") && /\$\$|\\\]/.test(text.slice(2))) this.end();
  }
  draw() { if (!this.done) this.element.textContent = this.text; }
  end() {
    if (this.done) return;
    this.done = true;
    this.view.leaf = null;
    const paragraph = new Paragraph(this.view);
    this.element.replaceWith(paragraph.element);
    paragraph.lines = this.text;
    this.view.leaf = paragraph;
  }
}

// code ----------------------------------------------------------------------------------------------------------------

// The box around a code block, with its language and a button.
function codeBox(language, code) {
  const copy = element("button", {type: "button", className: "icon plain i-copy", textContent: TEXT.copyCode,
    onclick: event => Turns.copyText(code.textContent.replace(/\n$/, ""), event.currentTarget)});
  const act = (label, icon, onclick) => {
    const made = element("button", {type: "button", className: `icon plain i-${icon}`, title: label, onclick});
    made.setAttribute("aria-label", label);
    return made;
  };
  const wrap = act(TEXT.wrap, "wrap", () => wrap.setAttribute("aria-pressed", pre.classList.toggle("wrapped")));
  wrap.setAttribute("aria-pressed", "false");
  const save = act(TEXT.downloadCode, "export", () => Chats.download(code.textContent, `code.${EXTENSIONS[language] ?? (/^[a-z0-9]{1,8}$/.exec(language) ?? "txt")}`, "text/plain"));
  const preview = element("button", {type: "button", className: "preview-code icon plain i-play", textContent: TEXT.preview,
    hidden: !isDrawable(language, code.textContent), onclick: ({currentTarget}) => togglePreview(currentTarget)});
  preview.setAttribute("aria-pressed", "false");
  const pre = element("pre", {tabIndex: 0}, code);          // so that wide code scrolls by keyboard
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", TEXT.codeIn(language));
  return element("div", {className: "code"},
    element("div", {className: "code-bar"}, element("span", {textContent: language || "text"}), preview, wrap, save, copy), pre);
}

// Whether code is a page or a drawing; some models call a drawing XML.
const isDrawable = (language, text) => /^(x?html?|svg)$/i.test(language) || /^xml$/i.test(language) && /^\s*(<\?xml[^>]*>\s*)?<svg[\s>]/.test(text);

const togglePreview = Parts.late("preview", () => Preview, "toggle");

// File extensions that differ from the language's name.
const EXTENSIONS = {python: "py", javascript: "js", typescript: "ts", bash: "sh", shell: "sh", ruby: "rb", rust: "rs", markdown: "md", perl: "pl",
  haskell: "hs", kotlin: "kt", csharp: "cs", "c++": "cpp", text: "txt", plaintext: "txt"};

// The text of a growing code block: highlighted and settled in steps that end where the highlighter is in its
// initial state, then an unsettled rest. (highlight.js keeps the state in `_top`; without it, code is
// highlighted when it ends.)
class CodeText {
  constructor(language) {
    Object.assign(this, {language, element: element("code"), settled: 0, tried: 0, stuck: false, rest: [], drawn: null});
  }

  update(text, final) {
    if (this.drawn === text && !final) return;
    this.drawn = text;
    const known = typeof hljs !== "undefined" && Boolean(hljs.getLanguage(this.language));
    if (typeof hljs !== "undefined") this.settle(text, known);
    else Parts.need("highlight", drawCode);
    const rest = text.slice(this.settled);
    const lit = known && !this.stuck && rest && rest.length < (final ? MOST_CODE : 2 * CODE_STEP);
    this.setRest(lit ? this.highlighted(rest).fragment : rest);
    if (final && typeof hljs === "undefined") plainCode.push(this);
  }

  // Whole lines become parts, which are blocks: later text does not lay them out again.
  settle(text, known) {
    for (let end; ; ) {
      end = text.indexOf("\n", Math.max(this.settled + CODE_STEP, this.tried)) + 1;
      if (!end) return;
      const part = text.slice(this.settled, end);
      const {fragment, initial} = known && !this.stuck && part.length <= MOST_CODE ? this.highlighted(part) : {fragment: part, initial: true};
      this.tried = end + CODE_STEP;
      if (initial) {
        this.setRest("");
        this.element.append(element("span", {className: "part"}, fragment));
        Object.assign(this, {settled: end, tried: 0});
      } else if (end - this.settled > MOST_CODE) Object.assign(this, {stuck: true, tried: 0});
    }
  }

  highlighted(text) {
    markdownWork.characters += text.length;
    const {value, _top} = hljs.highlight(text, {language: this.language, ignoreIllegals: true});
    return {fragment: spansOf(value), initial: _top && !_top.parent};
  }

  // Text that only grows goes into the existing text node.
  setRest(rest) {
    const old = this.rest.length === 1 && this.rest[0].nodeType === Node.TEXT_NODE ? this.rest[0].data : null;
    if (typeof rest === "string" && old !== null && rest.startsWith(old)) {
      if (rest !== old) this.rest[0].appendData(rest.slice(old.length));
      return;
    }
    this.rest.forEach(node => node.remove());
    const fragment = new DocumentFragment();
    if (rest !== "") fragment.append(rest);
    this.rest = [...fragment.childNodes];
    markdownWork.nodes += this.rest.length;
    this.element.append(fragment);
  }
}

const ESCAPES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#x27;": "'"};

// Converts highlight.js's HTML to nodes: spans with classes and escaped text, nothing else.
function spansOf(html) {
  const levels = [new DocumentFragment()];
  for (const part of html.split(/(<span class="[^"]*">|<\/span>)/)) {
    if (part === "</span>") levels.pop();
    else if (part.startsWith("<span") && levels.length > MOST_NESTED) levels.push(levels.at(-1));
    else if (part.startsWith("<span")) {
      const span = element("span", {className: part.slice(13, -2)});
      levels.at(-1).append(span);
      levels.push(span);
      markdownWork.nodes++;
    } else if (part) levels.at(-1).append(part.replace(/&(?:amp|lt|gt|quot|#x27);/g, escape => ESCAPES[escape]));
  }
  return levels[0];
}

const plainCode = [];             // drawn before highlight.js was loaded

function drawCode() {
  for (const code of plainCode.splice(0)) code.update(code.drawn, true);
}

// blocks --------------------------------------------------------------------------------------------------------------

const indentOf = text => /^ */.exec(text)[0].length;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +|\t|$)/;
const DELIMITER = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*(?:\|[ \t]*)?$/;

// An incomplete line can still become something else if it consists only of marks, or opens a fence.
const UNDECIDED = /^[\s>*+\-_=#|~`:$\\.\d)([]*$/;
const OPENS_FENCE = /^[\s>]*(?:(?:[-*+]|\d{1,9}[.)])\s+)*(?:`{3,}[^`]*|~{3,}.*)$/;

// So it does if it may become the begin of an environment, of a footnote or a callout, or a tag of <details>, which is taken as a whole line.
const OPENS_OTHER = new RegExp(String.raw`^[\s>]*(?:(?:[-*+]|\d{1,9}[.)])\s+)*(?:${[
  String.raw`\\(?:b|be|beg|begi|begin(?:\{[a-z]*\*?)?)`,
  String.raw`\[(?:\^(?:[^\][\s^]{0,40}\]?)?)`,
  String.raw`\[![a-z]{0,9}(?:\][ \t]*)?`,
  String.raw`<\/?(?:[a-z]{0,7}|(?:details|summary)\b.*)`].join("|")})$`, "i");

const DETAILS = /^ {0,3}<(details|summary)(\s[^<>]*)?>[ \t]*/i;
const DETAILS_END = /^ {0,3}<\/(details|summary)\s*>[ \t]*/i;
const SUMMARY_LINE = /^([^]*?)<\/summary\s*>[ \t]*/i;
const NOTE = /^ {0,3}\[\^([^\][\s^]{1,40})\]:[ \t]*/;
// The first line of a quote that is a callout, a box as on GitHub; and a line that can be nothing but words, which goes on below it without ">".
const CALLOUT = /^ {0,3}\[!(note|tip|important|warning|caution)\][ \t]*$/i;
const WORDS = /^ {0,3}[\p{L}\p{N}](?!\d{0,8}[.)](?:\s|$))/u;

class MarkdownView {
  constructor(root) { this.root = root; this.restart(); }

  // plainFrom: from this line on, no block of code holds others. mistakenFrom: where one began that seemed to hold some.
  restart(links = Object.create(null), plainFrom = Infinity) {
    Object.assign(this, {at: 0, length: 0, rows: 0, begun: false, contentAt: 0, leaf: null, finished: false, links, defined: false,
      plainFrom, mistakenFrom: Infinity, stack: [{kind: "root", element: this.root}]});
    this.root.replaceChildren();
  }

  // Draws text that extends what was drawn before. `finished`: nothing follows, so open blocks end here. calls: the calculator's,
  // of a text that has some.
  update(content, finished = false, calls = []) {
    const text = Calculator.withCards(content, calls);
    if (text.length < this.length || this.finished || calls.length && !text.startsWith(this.source ?? "")) this.restart();
    this.source = calls.length ? text : "";
    this.length = text.length;
    for (let end; (end = text.indexOf("\n", this.at)) >= 0; this.at = end + 1) this.takeLine(text.slice(this.at, end), true);
    if (this.at < text.length) this.takeLine(text.slice(this.at), finished);
    if (finished) this.finish(text);
    else this.leaf?.draw();
  }

  finish(text) {
    this.closeTo(1);
    if (this.mistakenFrom < Infinity) this.drawAgain(text, Object.create(null), this.mistakenFrom);
    // a definition can follow its use
    if (this.defined && /\]:/.test(text)) this.drawAgain(text, Object.assign(Object.create(null), this.links), this.plainFrom);
    this.finished = true;
  }

  drawAgain(text, links, plainFrom) {
    this.restart(links, plainFrom);
    for (const line of text.split("\n")) this.takeLine(line, true);
    this.closeTo(1);
  }

  takeLine(line, whole) {
    line = line.replace(/\r$/, "");
    const inFence = this.leaf instanceof Code && this.leaf.fence;
    if (!inFence) line = line.replace(/^[ \t]+/, space => expandTabs(space));
    if (!this.begun) {
      if (!whole && (UNDECIDED.test(line) || OPENS_FENCE.test(line) || OPENS_OTHER.test(line))) return;
      this.contentAt = this.beginLine(line);
    }
    this.begun = !whole;
    const ending = this.contentAt !== null && this.leaf instanceof Paragraph ? this.endingTag(line.slice(this.contentAt), whole) : null;
    if (ending) line = line.slice(0, this.contentAt + ending.index);
    if (this.contentAt !== null) this.leaf?.set(line.slice(this.contentAt), whole);
    if (ending && whole) this.closeDetails(ending[1]);
    if (whole) this.rows++;
  }

  // "</details>" behind the last words of a paragraph, or its beginning if the line is not whole.
  endingTag(text, whole) {
    if (!this.stack.some(({kind}) => kind === "details")) return null;
    return (whole ? /<\/(details|summary)\s*>\s*$/i : /<(?:\/[a-z]*>?)?$/i).exec(text);
  }

  // Closes the innermost open <details> or <summary>; false if there is none.
  closeDetails(name) {
    const at = this.stack.findLastIndex(({kind}) => kind === name.toLowerCase());
    if (at < 0) return false;
    const {element: closed, shown} = this.stack[at];
    this.closeTo(at);
    if (closed.localName === "details") closed.open = shown;
    return true;
  }

  // Classifies a line, and opens and closes blocks. Returns where the leaf's text begins; null if it has
  // none.
  beginLine(line) {
    let [depth, at] = this.matchContainers(line);
    const rest = () => line.slice(at);
    const matched = depth === this.stack.length;
    if (matched && this.leaf instanceof Code && this.leaf.fence) return this.inFence(line, at);
    if (matched && this.leaf instanceof MathBlock && rest().trim()) return at;
    for (let opened; (opened = this.openContainer(rest(), depth)); depth = this.stack.length) at += opened;
    if (!rest().trim()) return this.blankLine(depth, line.length);
    const paragraph = this.leaf instanceof Paragraph ? this.leaf : null;
    const same = depth === this.stack.length;
    const opened = this.openLeaf(rest(), depth, same ? paragraph : null);
    if (opened !== undefined) return opened === null ? null : at + opened;
    if (paragraph) return at;                                   // its next line, or a lazy one
    if (same && this.leaf instanceof Code && indentOf(rest()) >= 4) return at + 4;
    if (same && this.leaf instanceof Table) return at;
    this.closeTo(depth);
    if (indentOf(rest()) >= 4) { this.leaf = new Code(this, ""); return at + 4; }
    this.leaf = new Paragraph(this);
    return at;
  }

  // [how many open containers a line continues, how many of its characters they consume].
  matchContainers(line) {
    let depth = 1, at = 0;
    for (; depth < this.stack.length; depth++) {
      const container = this.stack[depth], rest = line.slice(at);
      if (container.kind === "quote") {
        const found = /^ {0,3}> ?/.exec(rest);
        if (found) at += found[0].length;
        else if (container.begun !== this.rows - 1 || !WORDS.test(rest)) break;
      } else if (container.kind === "note") {
        const indent = indentOf(rest);
        if (rest.trim() && indent < 2) break;
        at += Math.min(indent, 4);
      } else if (container.kind === "item") {
        // its list continues only with another item
        if (rest.trim() && indentOf(rest) < container.indent) return [depth - 1, at];
        at += Math.min(indentOf(rest), container.indent);
      }
    }
    return [depth, at];
  }

  inFence(line, at) {
    const {fence} = this.leaf, rest = line.slice(at);
    if (fence.isClosedBy(rest)) { this.closeLeaf(); return null; }
    return at + Math.min(indentOf(rest), fence.indent);
  }

  blankLine(depth, end) {
    if (this.leaf instanceof Code) {
      if (depth === this.stack.length) return end;
      this.closeTo(depth);
    }
    const quote = this.stack.findIndex(({kind}, i) => i >= depth && kind === "quote");
    if (quote > 0) this.closeTo(quote);
    this.closeLeaf();
    return null;
  }

  // Opens a quote or an item that begins here, closing whatever it ends. Returns its length, or 0.
  openContainer(rest, depth) {
    if (depth > MOST_NESTED) return 0;          // the rest is text
    const indented = indentOf(rest) >= 4, other = indented ? 0 : this.openDetails(rest, depth) || this.openNote(rest, depth);
    if (other) return other;
    const quote = indented ? null : /^ {0,3}> ?/.exec(rest);
    if (quote) {
      const callout = CALLOUT.exec(rest.slice(quote[0].length));
      this.closeTo(depth);
      if (!callout) this.push("quote", element("blockquote"));
      else this.push("quote", calloutBox(callout[1].toLowerCase())).begun = this.rows;
      return callout ? rest.length : quote[0].length;
    }
    const item = indented ? null : ITEM.exec(rest);
    if (!item || RULE.test(rest)) return 0;
    const [marker, space, mark, gap] = item, empty = marker.length === rest.length || !rest.slice(marker.length).trim();
    const interrupts = this.leaf instanceof Paragraph && depth === this.stack.length;
    if (interrupts && (empty || /^\d/.test(mark) && parseInt(mark) !== 1)) return 0;
    this.openItem(depth, mark);
    const wide = gap.length > 4 || empty ? 1 : gap.length;
    this.stack.at(-1).indent = space.length + mark.length + wide;
    return Math.min(rest.length, space.length + mark.length + wide);
  }

  // Tags of <details> at the begin of a line; their attributes are dropped, but for `open`. It is open while it grows, and stays so if it never ends.
  openDetails(rest, depth) {
    const end = DETAILS_END.exec(rest), begin = DETAILS.exec(rest), parent = this.stack[depth - 1];
    if (end) return this.closeDetails(end[1]) ? end[0].length : 0;
    if (!begin) return 0;
    if (/details/i.test(begin[1])) {
      this.closeTo(depth);
      const shown = /(?:^|\s)open(?:\s|=|$)/i.test(begin[2] ?? "");
      this.push("details", element("details", {open: true})).shown = shown;
      return begin[0].length;
    }
    if (parent.kind !== "details" || parent.element.querySelector(":scope > summary")) return 0;
    this.closeTo(depth);
    const line = SUMMARY_LINE.exec(rest.slice(begin[0].length)), summary = element("summary", {dir: "auto"}, ...(line ? inlineNodes(inlineTokens(line[1].trim(), this.links)) : []));
    this.push("summary", summary);
    if (line) this.closeTo(depth);
    return begin[0].length + (line ? line[0].length : 0);
  }

  // A footnote, "[^1]: text"; lines that follow belong to it if they are indented.
  openNote(rest, depth) {
    const found = NOTE.exec(rest);
    if (!found) return 0;
    this.closeTo(depth);
    const key = noteKey(found[1]);
    this.links[key] ??= {href: "", title: null};
    this.defined = true;
    const node = element("div", {className: "footnote"}, element("sup", {textContent: found[1]}));
    node.dataset.note = key;
    this.push("note", node);
    return found[0].length;
  }

  openItem(depth, mark) {
    const kind = mark.at(-1), list = this.stack[depth];
    if (list?.kind === "list" && list.mark === kind) this.closeTo(depth + 1);
    else {
      this.closeTo(depth);
      const ordered = /\d/.test(mark), node = element(ordered ? "ol" : "ul");
      if (ordered && parseInt(mark) !== 1) node.start = parseInt(mark);
      this.push("list", node).mark = kind;
    }
    this.push("item", element("li"));
  }

  push(kind, node) {
    this.closeLeaf();
    this.stack.at(-1).element.append(node);
    markdownWork.nodes++;
    this.stack.push({kind, element: node});
    return this.stack.at(-1);
  }

  // Opens a leaf other than a paragraph if one begins here. Returns where its text begins, null if it has none,
  // undefined if no leaf begins.
  openLeaf(rest, depth, paragraph) {
    if (indentOf(rest) >= 4) return undefined;
    const heading = /^ {0,3}(#{1,6})(?:[ \t]+|$)/.exec(rest);
    const setext = paragraph ? /^ {0,3}(=+|-+)[ \t]*$/.exec(rest) : null;
    const fence = Fences.opened(rest, this.rows < this.plainFrom);
    if (heading) return this.open(depth, () => new Heading(this, heading[1].length), heading[0].length);
    if (fence) return this.open(depth, () => new Code(this, fence.language, fence), null);
    if (paragraph && DELIMITER.test(rest) && this.openTable(rest, paragraph)) return null;
    if (setext && takeDefinitions(paragraph.text, this).trim()) return this.underline(paragraph, setext[1][0] === "=" ? "h1" : "h2");
    if (RULE.test(rest)) return this.open(depth, () => new Rule(this), null);
    if (/^ {0,3}(?:\$\$|\\\[)/.test(rest) || ENVIRONMENT_BEGINS.test(rest)) return this.open(depth, () => new MathBlock(this), 0);
    return undefined;
  }

  open(depth, make, contentAt) {
    this.closeTo(depth);
    this.leaf = make();
    return contentAt;
  }

  underline(paragraph, tag) {
    this.leaf = null;
    paragraph.become(tag);
    return null;
  }

  // The paragraph's last line is the table's header if it has as many cells as the delimiter.
  openTable(delimiter, paragraph) {
    const aligns = tableCells(delimiter).map(cell => cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "");
    const lines = paragraph.text.trimEnd().split("\n"), header = lines.at(-1);
    if (!header.includes("|") && !delimiter.includes("|") || tableCells(header).length !== aligns.length) return false;
    paragraph.lines = lines.slice(0, -1).map(line => line + "\n").join("");
    Object.assign(paragraph, {line: "", settled: 0, forced: true});
    this.closeLeaf();
    this.leaf = new Table(this, header, aligns);
    return true;
  }

  closeLeaf() {
    for (let leaf; (leaf = this.leaf);) {             // an unclosed formula becomes a paragraph, which then ends
      this.leaf = null;
      leaf.end();
    }
  }

  closeTo(depth) {
    this.closeLeaf();
    this.stack.length = depth;
  }
}

// The box says what it is, so that nobody needs to see its colour.
function calloutBox(kind) {
  const title = element("p", {className: "callout-title", dir: "auto"}, element("strong", {textContent: TEXT.callouts[kind]}));
  const box = element("blockquote", {className: `callout callout-${kind}`}, title);
  box.setAttribute("role", "note");
  return box;
}

const expandTabs = space => {
  let width = 0;
  for (const char of space) width = char === "\t" ? width + 4 - width % 4 : width + 1;
  return " ".repeat(width);
};

return Object.freeze({DRAWN_STYLE, mathNode, codeBox, CodeText, View: MarkdownView, get work() { return {...markdownWork}; }});
})();
