// Fences of code blocks: which line opens a block, and which one closes it.
//
// A block may hold blocks. By CommonMark, the outer fence must then be longer. Models often forget that, above all in documents that they write as
// ```markdown. So a fence with an info string (```python) inside of a block opens another level, and a bare one closes the innermost. This is a guess:
// where it leaves a block open up to the end, a fence was forgotten instead, and the block ends at the first bare fence, as CommonMark says. Only
// a document in Markdown remains one block then: it was probably cut off.
"use strict";

const Fences = (() => {

const OPENING = /^( {0,3})(?:(`{3,})([^`]*)|(~{3,})(.*))$/;
const CLOSING = /^ {0,3}(`{3,}|~{3,})[ \t\r]*$/;
// inside of a block: also behind the marks of quotes and items
const INNER_OPENING = /^[\s>]*(?:(?:[-*+]|\d{1,9}[.)])\s+)*(`{3,}|~{3,})[ \t]*[\w+#./-]+[ \t]*(?:$|[{:]|[\w-]+=)/;
const INNER_CLOSING = /^[\s>]*(`{3,}|~{3,})[ \t\r]*$/;
const DOCUMENT = /^(?:markdown|md|mdx|rmd|qmd)$/i;

// The fence that this line opens, or null. nests: whether to guess.
function opened(line, nests = true) {
  const found = OPENING.exec(line);
  if (!found) return null;
  const [, space, ticks, info, tildes, other] = found;
  return new Fence(ticks ?? tildes, space.length, (info ?? other).trim().split(/\s+/)[0], nests);
}

class Fence {
  constructor(marks, indent, language, nests) {
    Object.assign(this, {indent, language, nests, levels: [marks], guessed: false, closed: false});
  }

  // Takes the next line of the block; true if it is the fence that closes it.
  isClosedBy(line) {
    const innermost = this.levels.at(-1), isInner = this.levels.length > 1;
    const fits = found => found !== null && found[1].startsWith(innermost);
    if (fits((isInner ? INNER_CLOSING : CLOSING).exec(line))) this.levels.pop();
    else if (this.nests) this.nest(INNER_OPENING.exec(line), fits);
    this.closed = !this.levels.length;
    return this.closed;
  }

  nest(found, fits) {
    if (!fits(found)) return;
    this.levels.push(found[1]);
    this.guessed = true;
  }

  // Whether the text has ended and shows that the guess was wrong.
  get isMistaken() { return this.guessed && !this.closed && !DOCUMENT.test(this.language); }
}

// A text in pieces: what stands between blocks as {text}, blocks as {language, code}, without their fences.
function split(text) {
  const lines = text.split("\n"), pieces = [];
  let between = [], nests = true;
  for (let i = 0; i < lines.length; i++) {
    const found = blockAt(lines, i, nests);
    if (!found) { between.push(lines[i]); continue; }
    ({nests} = found);
    if (between.length) pieces.push({text: between.join("\n")});
    between = [];
    pieces.push(found.block);
    i = found.last;
  }
  if (between.length) pieces.push({text: between.join("\n")});
  return pieces;
}

// {block, last: the index of its last line, nests: whether later blocks may hold others}; null if no block begins at this line.
function blockAt(lines, first, nests) {
  const fence = opened(lines[first], nests);
  if (!fence) return null;
  let last = first + 1;
  while (last < lines.length && !fence.isClosedBy(lines[last])) last++;
  if (fence.isMistaken) return blockAt(lines, first, false);
  return {block: {language: fence.language, code: lines.slice(first + 1, last).join("\n")}, last, nests};
}

return Object.freeze({opened, split});
})();
