// Runs JavaScript that a model wrote, in a worker of a frame (javascript.html) without the page's origin, storage and network.
"use strict";

const Javascript = (() => {

const {TEXT, element} = Parts;

const LIMIT_MS = 10000;           // of the code
const FRAME_MS = 3000;            // for the frame to load, and to answer after that limit
const CHARACTERS = 8192;          // of the result

// The result of code, {text, cut, is_error, ms}. `signal` ends it.
function run(code, signal) {
  const frame = element("iframe", {src: "javascript.html", hidden: true, title: TEXT.codeFrame}), begun = performance.now();
  frame.setAttribute("sandbox", "allow-scripts");
  return new Promise(resolve => {
    const end = (text, failed, cut = 0) => {
      removeEventListener("message", hear);
      clearTimeout(late);
      frame.remove();
      resolve({text, is_error: failed, cut, ms: Math.round(performance.now() - begun)});
    };
    const hear = ({source, data}) => { if (source === frame.contentWindow && Fields.isText(data?.text)) end(data.text, Boolean(data.failed), Number(data.cut) || 0); };
    const late = setTimeout(() => end(TEXT.codeLost, true), LIMIT_MS + FRAME_MS);
    addEventListener("message", hear);
    signal?.addEventListener("abort", () => end(TEXT.callCancelled, true));
    frame.onload = () => frame.contentWindow?.postMessage({code, limit_ms: LIMIT_MS, characters: CHARACTERS}, "*");
    document.body.append(frame);
  });
}

Parts.register({
  strings: {
    codeFrame: "Code that runs", codeLost: "The code did not answer, and was ended.",
  },
});

return Object.freeze({run});
})();
