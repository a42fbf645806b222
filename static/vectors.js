// The panel of a model that makes vectors of texts: texts in, a table of their similarities out. It loads when such a model is behind the URL.
"use strict";

const Vectors = (() => {

const {TEXT, element, number, newest} = Parts;

const MOST_TEXTS = 24;            // more make a table that nobody reads
const LONGEST_SHOWN = 28;         // characters of a text in the table
const asking = newest();

// What is typed and what came of it, for each model of the server; the empty page is drawn anew whenever the server's state changes.
const panels = new Map();

// The panel goes into the empty page of a model.
function showVectors(page, model) {
  if (!panels.has(model.name)) panels.set(model.name, makePanel(model.name));
  if (page.isConnected || !page.querySelector(".vectors")) page.append(panels.get(model.name));
}

function makePanel(name) {
  const box = element("textarea", {rows: 6, value: TEXT.vectorExamples.join("\n"), dir: "auto"});
  const button = element("button", {type: "submit", className: "primary", textContent: TEXT.vectorCompare});
  const said = element("p", {className: "hint"}), table = element("div", {className: "table"});
  box.setAttribute("aria-label", TEXT.vectorTexts);
  said.setAttribute("role", "status");
  const form = element("form", {className: "vectors"}, element("label", {textContent: TEXT.vectorTexts}), box, button, said, table);
  form.onsubmit = async event => {
    event.preventDefault();
    const isMine = asking(), texts = box.value.split("\n").map(text => text.trim()).filter(Boolean).slice(0, MOST_TEXTS);
    if (!texts.length) return;
    button.disabled = true;
    try {
      const found = await vectorsOf(name, texts);
      if (!isMine()) return;
      said.textContent = TEXT.vectorSize(found[0].length);
      table.replaceChildren(similarities(texts, found));
    } catch (error) {
      if (isMine()) {
        said.textContent = error.message;
        table.replaceChildren();
      }
    } finally {
      button.disabled = false;
    }
  };
  return form;
}

async function vectorsOf(model, input) {
  const response = await Server.post("v1/embeddings", {model, input});
  if (!response.ok) throw await Server.errorOf(response);
  return (await response.json()).data.map(({embedding}) => embedding);
}

const product = (a, b) => a.reduce((total, value, i) => total + value * b[i], 0);
const cosine = (a, b) => product(a, b) / Math.sqrt(product(a, a) * product(b, b));
const shortened = text => text.length > LONGEST_SHOWN ? `${text.slice(0, LONGEST_SHOWN)}…` : text;

function similarities(texts, vectors) {
  const head = element("tr", {}, element("th"), ...texts.map((text, i) => element("th", {textContent: i + 1, title: text, scope: "col"})));
  const rows = texts.map((text, i) => element("tr", {}, element("th", {textContent: `${i + 1}  ${shortened(text)}`, title: text, scope: "row"}),
    ...texts.map((_, j) => {
      const value = cosine(vectors[i], vectors[j]), cell = element("td", {textContent: value.toFixed(2)});
      cell.style.setProperty("--share", `${Math.round(100 * Math.max(0, value))}%`);
      return cell;
    })));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
}

Parts.register({
  strings: {
    vectorTexts: "Texts, one on each line", vectorCompare: "Compare",
    vectorSize: size => `Cosines of vectors of ${number(size)} numbers.`,
    vectorExamples: ["A cat sleeps on the sofa.", "The kitten naps on a couch.", "Interest rates rose again in March."],
  },
});
return Object.freeze({show: showVectors});
})();
