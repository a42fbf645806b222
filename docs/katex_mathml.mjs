// Makes katex.min.js from katex/dist/katex.mjs: what builds MathML, without what builds HTML. See static/vendor/README.md.
//   npm install katex@0.19.1 acorn acorn-walk esbuild && node katex_mathml.mjs > katex.min.js
import {readFileSync} from "node:fs";
import {parse} from "acorn";
import {simple} from "acorn-walk";
import {buildSync} from "esbuild";

let code = readFileSync("node_modules/katex/dist/katex.mjs", "utf8");
const cuts = [];
simple(parse(code, {ecmaVersion: 2022, sourceType: "module"}), {
  ObjectExpression(node) {
    for (const [i, property] of node.properties.entries()) {
      if (property.key?.name !== "htmlBuilder") continue;
      const next = node.properties[i + 1];
      cuts.push([property.start, next ? next.start : property.end]);
    }
  },
  Literal(node) {        // outlines are only drawn in HTML
    if (typeof node.value === "string" && /^M-?\d/.test(node.value)) cuts.push([node.start, node.end, '""']);
  },
  VariableDeclarator(node) {        // for MathML it counts only whether a font has a character; \LaTeX asks for A and T
    if (!/^(buildHTMLTree|buildTree)$/.test(node.id.name)) return;
    cuts.push([node.init.start, node.init.end, node.id.name === "buildTree" ? "(tree, expression, settings) => buildMathML(tree, expression, optionsFromSettings(settings), settings.displayMode, true)" : "buildTree"]);
  },
});
const isInside = cut => cuts.some(other => other !== cut && other[0] <= cut[0] && cut[1] <= other[1]);
for (const [start, end, text = ""] of cuts.filter(cut => !isInside(cut)).sort((a, b) => b[0] - a[0])) code = code.slice(0, start) + text + code.slice(end);
code = code.replace(/^var katex = \{[^]*$/m, "export {renderToString};");
code = code.replace(/"(\d+)": \[-?[\d.]+(, -?[\d.]+){4}\]/g, (all, number) => ["65", "84"].includes(number) ? all : `${number}: 1`);
process.stdout.write("/*! KaTeX 0.19.1, MIT, only MathML: see README.md */\n" + buildSync({stdin: {contents: code, resolveDir: "."}, bundle: true, minify: true,
  write: false, format: "iife", globalName: "katex", target: "es2020", legalComments: "none"}).outputFiles[0].text);
