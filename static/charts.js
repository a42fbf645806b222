// Charts of the server's status and of a training run, drawn by uPlot in the page's colours.
"use strict";

const Charts = (() => {

const {TEXT, $, number} = Parts;

const FONT = `11px ${getComputedStyle(document.documentElement).fontFamily}`;
const LOOKS = [{colour: "--accent", dash: []}, {colour: "--amber", dash: [6, 4]}];       // of the first run and of the second, which has other marks too

const axisOf = more => ({stroke: () => resolved("--soft"), font: FONT, grid: {stroke: () => resolved("--line"), width: 1}, ticks: {show: false}, ...more});
const sizeOf = box => ({width: box.clientWidth || 300, height: box.clientHeight || 120, legend: {show: false}, cursor: {show: false}});
const axisOfValues = write => axisOf({size: (_, texts) => 12 + 6.5 * Math.max(8, ...(texts ?? []).map(text => text.length)), space: 34, values: (_, ticks) => labelled(ticks, write)});
const empty = lines => Array.from({length: 1 + lines}, () => []);

// No two labels are the same. `write` gets a value and the distance of two.
function labelled(ticks, write) {
  const texts = ticks.map(at => write(at, ticks[1] - ticks[0]));
  return texts.map((text, i) => texts.indexOf(text) === i ? text : "");
}

// A chart over time in a `figure` with a caption and a box of the class "chart". `lines`: how many. Returns uPlot's object, whose `setData`
// takes [places, values of a line ...].
function makeChart(box, {write, lines = 1}) {
  const line = ({colour}) => ({stroke: () => resolved(colour), width: 1.5, points: {show: true, size: 4, fill: () => resolved(colour), filter: (plot, i) => lonely(plot.data[i])}});
  return new uPlot({...sizeOf(box), padding: [8, 34, 0, 0], scales: {x: {time: true, range: lastMinute}, y: {range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1]}},
    axes: [axisOf({size: 24, space: 90, values: (_, ticks) => ticks.map(at => new Date(1000 * at).toLocaleTimeString())}), axisOfValues(write)],
    series: [{}, ...LOOKS.slice(0, lines).map(line)]}, empty(lines), box);
}

// The places of values without a neighbour, through which no line goes.
const lonely = values => [...values.keys()].filter(i => values[i] !== null && (values[i - 1] ?? null) === null && (values[i + 1] ?? null) === null);

// At least a minute; around a single time uPlot would show days.
const lastMinute = (_, low, high) => high - low >= 86400 ? [low - 60, low] : [Math.min(low, high - 60), high];

// Gives a chart its data, and its box's width, which may have changed.
function drawChart(plot, box, data) {
  plot.setData(data);
  const width = box.clientWidth;
  if (width && plot.width !== width) plot.setSize({width, height: plot.height});
}

// training runs --------------------------------------------------------------------------------------------------------

const WHOLE = Array.from({length: 14}, (_, i) => 10 ** i).flatMap(one => [one, 2 * one, 5 * one]);      // between two labels of steps or tokens
const LABEL_PX = 64;              // the room of a label
const LETTER_PX = 6.5;            // of a letter in it
const AXIS_PX = 75;               // about the width of the axis of values and the room on the right

// A chart of curves over the steps of training runs (curves.js). `looks`: of each curve; `onDraw` is called when it has been drawn.
function makeStepChart(box, {write, looks, onDraw}) {
  const line = ({colour, dash}) => ({stroke: () => resolved(colour), dash, width: 1.5, spanGaps: true, points: {show: false}});
  const widened = (_, low, high) => { const room = (high - low || Math.abs(high) || 1) / 8; return [low - room, high + room]; };
  const {layout, scales} = box.shown, isPlain = layout.isPlain;
  const places = isPlain ? {incrs: WHOLE, values: (_, ticks) => ticks.map(at => labelOf(box.shown.layout.parts[0], at))} :
    {splits: plot => ticksOf(plot, box.shown.layout).map(({at}) => at), values: plot => ticksOf(plot, box.shown.layout).map(({text}) => text)};
  return new uPlot({...sizeOf(box), padding: [isPlain ? 8 : 22, isPlain ? 28 : 8, 0, 0],
    hooks: {drawClear: [plot => drawStages(plot, box.shown, write)], draw: [plot => drawMarks(plot, box.shown), onDraw]},
    scales: {x: {time: false, range: (plot, low, high) => isPlain ? widened(plot, low, high) : [0, 1]}, y: {range: widened}},
    axes: [axisOf({size: 24, space: 90, ...places}), scales ? axisOf({size: 12, values: () => [], grid: {show: false}}) : axisOfValues(write)], series: [{}, ...looks.map(look => line(LOOKS[look]))]}, empty(looks.length), box);
}

// The labels below all parts of the axis. Where those of two parts would touch, the one that is not alone in its part goes.
function ticksOf(plot, {parts}) {
  const width = plot.width - AXIS_PX, ticks = [];
  let ofLast = 0;
  for (const part of parts) {
    const own = ticksIn(part, part.width * width);
    if (ticks.length && labelsTouch(ticks.at(-1), own[0], width)) {
      if (ofLast > 1) ticks.pop();
      else own.shift();
    }
    ofLast = own.length;
    ticks.push(...own);
  }
  return ticks;
}

const labelsTouch = (a, b, width) => (b.at - a.at) * width < LETTER_PX * (a.text.length + b.text.length + 2) / 2;

// `curves` and `layout`: as curves.js returns them. They are kept as the box's own, for what is drawn beside the lines.
function drawStepChart(plot, box, curves, layout) {
  box.shown = {...curves, layout};
  drawChart(plot, box, curves.data);
  plot.redraw(false, true);        // uPlot keeps the labels of an axis whose ends are the same, but the stages between them may have moved
}

const labelOf = ({by}, value) => by === "tokens" ? new Intl.NumberFormat(undefined, {notation: "compact", maximumSignificantDigits: 3}).format(value) : number(value);

// The labels below a part of the axis that is so wide.
function ticksIn(part, width) {
  const {low, high} = part, most = Math.max(1, Math.floor(width / LABEL_PX)), every = WHOLE.find(each => Math.floor(high / each) - Math.ceil(low / each) < most) ?? WHOLE.at(-1);
  const first = Math.ceil(low / every) * every, values = first > high ? [low] : Array.from({length: Math.floor((high - first) / every) + 1}, (_, i) => first + i * every);
  return values.map(value => ({at: Curves.placeIn(part, value), text: labelOf(part, value)}));
}

// A band for each stage, with its name; and with its highest and lowest value, where it has a scale of its own.
function drawStages({ctx, bbox}, {layout, scales}, write) {
  if (layout.isPlain) return;
  const ratio = devicePixelRatio, left = place => bbox.left + place * bbox.width;
  ctx.save();
  ctx.font = FONT.replace("11", String(11 * ratio));
  ctx.textBaseline = "bottom";
  ctx.textAlign = "left";
  for (const [i, part] of layout.parts.entries()) {
    const {stage, by, from, width} = part;
    if (i % 2) {
      ctx.fillStyle = resolved("--sunken");
      ctx.fillRect(left(from), bbox.top, width * bbox.width, bbox.height);
    }
    ctx.fillStyle = resolved("--soft");
    ctx.fillRect(left(from), bbox.top - 16 * ratio, ratio, bbox.height + 16 * ratio);
    ctx.fillText(by === "tokens" ? TEXT.stageByTokens(stage) : stage, left(from) + 5 * ratio, bbox.top - 3 * ratio);
    const {low, high} = scales?.get(part) ?? {};
    const ends = low < high ? [[high, bbox.top + 14 * ratio], [low, bbox.top + bbox.height - 2 * ratio]] : low === high ? [[low, bbox.top + bbox.height / 2 - 6 * ratio]] : [];
    for (const [value, bottom] of ends) ctx.fillText(write(value, high - low || 1), left(from) + 5 * ratio, bottom);
  }
  ctx.restore();
}

// A mark on each step: a disc, or a diamond of the second run; hollow if its value is of an earlier step; with a ring if there is a warning.
function drawMarks(plot, {points}) {
  const {ctx, bbox} = plot, colours = LOOKS.map(({colour}) => resolved(colour)), page = resolved("--page"), danger = resolved("--danger");
  const ratio = devicePixelRatio, size = ratio * (points.length > bbox.width / ratio / 5 ? 1.5 : 3.5);
  ctx.save();
  ctx.setLineDash([]);
  ctx.lineWidth = 1.5 * ratio;
  for (const {step, look, x, y, isStale} of points) {
    const left = plot.valToPos(x, "x", true), top = plot.valToPos(y, "y", true);
    traceMark(ctx, look, left, top, size + (isStale ? ratio / 2 : 0));
    ctx.strokeStyle = colours[look];
    ctx.fillStyle = isStale ? page : colours[look];
    ctx.fill();
    ctx.stroke();
    if (!step.warning) continue;
    traceMark(ctx, 0, left, top, 3.5 * ratio + size);
    ctx.strokeStyle = danger;
    ctx.stroke();
  }
  ctx.restore();
}

function traceMark(ctx, look, x, y, size) {
  ctx.beginPath();
  if (look === 0) return ctx.arc(x, y, size, 0, 2 * Math.PI);
  for (const [dx, dy] of [[0, -1], [1, 0], [0, 1], [-1, 0]]) ctx.lineTo(x + 1.3 * dx * size, y + 1.3 * dy * size);
  return ctx.closePath();
}

// One of the page's colours in a form that canvas accepts: an element's computed style resolves light-dark().
function resolved(variable) {
  $("status").style.setProperty("outline-color", `var(${variable})`);
  return getComputedStyle($("status")).outlineColor;
}

return Object.freeze({make: makeChart, draw: drawChart, makeOfSteps: makeStepChart, drawOfSteps: drawStepChart});
})();
