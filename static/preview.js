// Shows a block of HTML or SVG code as it looks, in a frame (preview.html) without the page's origin, scripts and network.
"use strict";

const Preview = (() => {

const {TEXT, element} = Parts;

const MOST_HEIGHT = 0.7;          // of the window

// Opens a preview below the bar of a code block, or closes it.
function togglePreview(clicked) {
  const box = clicked.closest(".code"), open = box.querySelector(".preview");
  clicked.setAttribute("aria-pressed", String(!open));
  if (open) return open.remove();
  const frame = element("iframe", {src: "preview.html", title: TEXT.previewOf});
  frame.setAttribute("sandbox", "allow-scripts");                            // for preview.html's own script; its policy admits no other
  frame.onload = () => frame.contentWindow?.postMessage(box.querySelector("pre code").textContent, "*");
  const hear = ({source, data}) => {
    if (!frame.isConnected) removeEventListener("message", hear);
    else if (source === frame.contentWindow && data?.height > 0) frame.style.height = `${Math.min(data.height + 2, MOST_HEIGHT * innerHeight)}px`;
  };
  addEventListener("message", hear);
  return box.querySelector(".code-bar").after(element("div", {className: "preview"}, frame, element("p", {className: "hint", textContent: TEXT.previewHint})));
}

Parts.register({
  strings: {
    previewOf: "Preview of the code", previewHint: "Scripts do not run here, and nothing is loaded from elsewhere.",
  },
});

return Object.freeze({toggle: togglePreview});
})();
