// Which marks of a text belong together: * and _ (bold, italics) and ~ (struck), by CommonMark's rules for delimiter runs.
//
// CommonMark lets a run of marks close only where a word ends or a space or punctuation follows. Chinese, Japanese and Korean have no
// spaces between words, so `**「…」**と` would never close. Here a run beside one of their characters opens and closes, whatever is on its
// other side. (So does https://github.com/tats-u/markdown-cjk-friendly.) `_` stays as it is: it is part of names.
"use strict";

const Emphasis = (() => {

const RUN = /\*+|_+|~+/g;
const SPACE = /^\s$/;
const PUNCTUATION = /^[\p{P}\p{S}]$/u;
// letters, punctuation and full-width forms; ideographic space is a space
const CJK = /^[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Hangul}\p{scx=Bopomofo}\p{scx=Yi}\u3001-\u303f\ufe30-\ufe4f\uff01-\uffee]$/u;

const before = (text, at) => [...text.slice(Math.max(0, at - 2), at)].at(-1) ?? " ";
const after = (text, at) => at < text.length ? String.fromCodePoint(text.codePointAt(at)) : " ";

// A run of equal marks: where its marks that are left begin and how many these are, and whether they may open or close.
function runOf(text, {0: {length}, index: at}) {
  const mark = text[at], run = {mark, at, left: length, length, opens: false, closes: false};
  const [last, next] = [before(text, at), after(text, at + length)];
  const ends = [SPACE.test(next), SPACE.test(last)];
  if (mark !== "_" && !ends.includes(true) && (CJK.test(last) || CJK.test(next))) Object.assign(run, {opens: true, closes: true});
  else {
    const [beforePunctuation, behindPunctuation] = [PUNCTUATION.test(next), PUNCTUATION.test(last)];
    run.opens = !ends[0] && (!beforePunctuation || ends[1] || behindPunctuation);
    run.closes = !ends[1] && (!behindPunctuation || ends[0] || beforePunctuation);
    if (mark === "_" && run.opens && run.closes) Object.assign(run, {opens: behindPunctuation, closes: beforePunctuation});
  }
  if (mark === "~") restrictTildes(run, last, next);
  return run;
}

// One or two are marks, but one between words or numbers is a range: 5~10.
function restrictTildes(run, last, next) {
  const isRange = run.length === 1 && !/[\s\p{P}\p{S}]/u.test(last + next);
  if (run.length > 2 || isRange) Object.assign(run, {opens: false, closes: false});
}

function belongTogether(opener, closer) {
  if (opener.mark !== closer.mark || !opener.opens || !opener.left) return false;
  if (closer.mark === "~") return opener.length === closer.length;
  // "*a**b*" is no bold between two italics (CommonMark's rules 9 and 10)
  const ambiguous = opener.closes || closer.opens;
  return !ambiguous || (opener.length + closer.length) % 3 !== 0 || opener.length % 3 === 0 && closer.length % 3 === 0;
}

// Map: index of an opening mark -> {size: how many marks, 1 or 2; end: the index behind the closing ones}.
function pairsOf(text) {
  const pairs = new Map(), open = [], hopeless = new Map();      // kind of a closer -> how many of `open` were looked through in vain
  for (const found of text.matchAll(RUN)) {
    const closer = runOf(text, found);
    while (closer.closes && closer.left) {
      const kind = `${closer.mark}${closer.opens}${closer.length % 3}`, bottom = hopeless.get(kind) ?? 0;
      let i = open.length - 1;
      while (i >= bottom && !belongTogether(open[i], closer)) i--;
      if (i < bottom) {
        hopeless.set(kind, open.length);
        break;
      }
      const opener = open[i], size = closer.mark === "~" ? closer.left : Math.min(opener.left, closer.left, 2);
      opener.left -= size;
      closer.left -= size;
      closer.at += size;
      pairs.set(opener.at + opener.left, {size, end: closer.at});
      open.length = opener.left ? i + 1 : i;
      for (const [other, looked] of hopeless) hopeless.set(other, Math.min(looked, open.length));
    }
    if (closer.opens && closer.left) open.push(closer);
  }
  return pairs;
}

return Object.freeze({pairsOf});
})();
