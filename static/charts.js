// Charts of the server's status and of a training run, drawn by uPlot in the page's colours.
"use strict";

{

const FONT = `11px ${getComputedStyle(document.documentElement).fontFamily}`;

// A chart in a `figure` with a caption and a box of the class "chart". `lines`: how many; `steps`: its points lie on steps of a training run,
// not in time, and are drawn. `onDraw` is called when it has been drawn. Returns uPlot's object, whose `setData` takes [places, values of a line ...].
function makeChart(box, {write, lines = 1, steps = false, onDraw = () => {}}) {
  const grid = {stroke: () => resolved("--line"), width: 1}, axis = {stroke: () => resolved("--soft"), font: FONT, grid, ticks: {show: false}};
  const line = stroke => ({stroke: () => resolved(stroke), width: 1.5, spanGaps: steps, points: {show: true, size: steps ? 7 : 4, fill: () => resolved(stroke), filter: (plot, i) => steps ? null : lonely(plot.data[i])}});
  const shownAt = at => steps ? number(at) : new Date(1000 * at).toLocaleTimeString();
  const range = (_, low, high) => steps ? [low - (high - low) / 8 - 1e-6, high + (high - low) / 8 + 1e-6] : [0, high > 0 ? high * 1.1 : 1];
  const room = (_, texts) => 12 + 6.5 * Math.max(8, ...(texts ?? []).map(text => text.length));
  return new uPlot({width: box.clientWidth || 300, height: box.clientHeight || 120, legend: {show: false}, cursor: {show: false}, padding: [8, steps ? 28 : 34, 0, 0],
    hooks: {draw: [onDraw]}, scales: {x: {time: !steps, ...(steps ? {} : {range: lastMinute})}, y: {range}},
    axes: [{...axis, size: 24, space: 90, incrs: steps ? WHOLE : undefined, values: (_, ticks) => ticks.map(shownAt)},
      {...axis, size: room, space: 34, values: (_, ticks) => ticks.map(write)}],
    series: [{}, line("--accent"), line("--amber")].slice(0, 1 + lines)}, [[], [], []].slice(0, 1 + lines), box);
}

// The places of values without a neighbour, through which no line goes.
const lonely = values => [...values.keys()].filter(i => values[i] !== null && (values[i - 1] ?? null) === null && (values[i + 1] ?? null) === null);

const WHOLE = Array.from({length: 10}, (_, i) => 10 ** i).flatMap(one => [one, 2 * one, 5 * one]);      // between two labels of steps

// At least a minute; around a single time uPlot would show days.
const lastMinute = (_, low, high) => high - low >= 86400 ? [low - 60, low] : [Math.min(low, high - 60), high];

// Gives a chart its data, and its box's width, which may have changed.
function drawChart(plot, box, data) {
  plot.setData(data);
  const width = box.clientWidth;
  if (width && plot.width !== width) plot.setSize({width, height: plot.height});
}

// One of the page's colours in a form that canvas accepts: an element's computed style resolves light-dark().
function resolved(variable) {
  $("status").style.setProperty("outline-color", `var(${variable})`);
  return getComputedStyle($("status")).outlineColor;
}

share({makeChart, drawChart});
}
