// Curves of training runs: where their steps lie along the axis, which curves a metric has, and what stands beside a step's value.
//
// The stages of a lineage lie one after the other, each with a scale of its own: it has far more steps in base than in RL. A curve is one metric
// of one run, that is of one stage, so no line joins two stages. Two lineages share the scales, stage by stage. Where one scale of values would
// flatten the curves of a stage, since another stage has far other values, each stage has one of its own too.
"use strict";

const Curves = (() => {

const STAGES = ["base", "mid", "sft", "chat", "rl"];     // in order of training
const LEAST_SHARE = 0.35;         // of the widest stage's width, for a stage with few steps
const FLAT = 0.25;                // of the chart's height, below which a stage's curves are flat
const PAD = 0.07;                 // of a stage's width, before its first step and behind its last

const placeOfStage = stage => STAGES.indexOf(stage) < 0 ? STAGES.length : STAGES.indexOf(stage);
const unique = values => [...new Set(values)];

// What a step shows of a metric; undefined if that is not known.
const metricOf = (step, metric) => typeof step.metrics[metric] === "number" ? step.metrics[metric] : undefined;

// Where the steps of one or two runs or lineages lie: {parts: [{stage, by, low, high, from, width}], placeOf(step)}. `axis`: "tokens" where all
// steps of a part know them. If no run has a second stage there is one part, whose places are the steps (or tokens) themselves.
function layOut(views, axis) {
  const isPlain = views.every(steps => unique(steps.map(({run}) => run)).length < 2);
  const named = unique(views.flatMap(steps => steps.map(({stage}) => stage)).filter(Boolean)).sort((a, b) => placeOfStage(a) - placeOfStage(b));
  const stages = isPlain || !named.length ? [""] : named;
  const stageOf = step => stages.includes(step.stage) ? step.stage : stages[0];
  const parts = stages.map(stage => {
    const steps = views.map(each => each.filter(step => stageOf(step) === stage)), all = steps.flat();
    const by = axis === "tokens" && all.length && all.every(step => metricOf(step, "tokens") !== undefined) ? "tokens" : "step";
    const values = all.map(step => by === "tokens" ? step.metrics.tokens : step.step);
    return {stage, by, low: values.reduce((a, b) => Math.min(a, b), Infinity), high: values.reduce((a, b) => Math.max(a, b), -Infinity), count: Math.max(...steps.map(({length}) => length))};
  });
  const most = Math.max(...parts.map(({count}) => count)), weights = parts.map(({count}) => Math.max(count, LEAST_SHARE * most));
  const sum = weights.reduce((a, b) => a + b, 0);
  let from = 0;
  for (const [i, part] of parts.entries()) {
    Object.assign(part, {from, width: weights[i] / sum});
    from += part.width;
  }
  const byStage = new Map(parts.map(part => [part.stage, part]));
  const placeOf = step => {
    const part = byStage.get(stageOf(step)), value = part.by === "tokens" ? step.metrics.tokens : step.step;
    return isPlain ? value : placeIn(part, value);
  };
  return {isPlain, parts, placeOf, partOf: step => byStage.get(stageOf(step))};
}

// Where a step or a number of tokens lies in a part, from 0 at the begin of the first part to 1 at the end of the last.
const placeIn = ({low, high, from, width}, value) => from + width * (high > low ? PAD + (1 - 2 * PAD) * (value - low) / (high - low) : 0.5);

// Can any part of the axis be drawn by tokens?
const knowsTokens = views => layOut(views, "tokens").parts.some(({by}) => by === "tokens");

// The curves of a metric: {points: [{step, x, y, value, look, isStale}], looks: a curve's look each, data: [places, heights of a curve ...], scales}.
// `look`: of the first or the second view. `y` is the value, or with `scales`, {low, high} of each stage, its place between these from 0 to 1.
function curvesOf(views, metric, layout) {
  const points = [], looks = [], columns = [], known = views.map(steps => steps.filter(step => metricOf(step, metric) !== undefined));
  const scales = scalesOf(known.flat(), metric, layout);
  const heightOf = (step, value) => {
    const {low, high} = scales?.get(layout.partOf(step)) ?? {low: 0, high: 1};
    return high > low ? (value - low) / (high - low) : 0.5;
  };
  for (const [look, steps] of known.entries()) {
    for (const run of unique(steps.map(step => step.run))) {
      const own = steps.filter(step => step.run === run).map(step => ({step, look, x: layout.placeOf(step), y: heightOf(step, metricOf(step, metric)), value: metricOf(step, metric), isStale: step.stale.includes(metric)}));
      points.push(...own);
      looks.push(look);
      columns.push(new Map(own.map(({x, y}) => [x, y])));
    }
  }
  const places = unique(points.map(({x}) => x)).sort((a, b) => a - b);
  return {points, looks, data: [places, ...columns.map(column => places.map(x => column.get(x) ?? null))], scales};
}

// {low, high} of the values of each part, if in one scale those of a part would be flat; else null.
function scalesOf(steps, metric, {parts, partOf}) {
  const rangeOf = some => some.map(step => metricOf(step, metric)).reduce(({low, high}, value) => ({low: Math.min(low, value), high: Math.max(high, value)}), {low: Infinity, high: -Infinity});
  const all = rangeOf(steps), scales = new Map(parts.map(part => [part, rangeOf(steps.filter(step => partOf(step) === part))]));
  const isFlat = ({low, high}) => high > low && high - low < FLAT * (all.high - all.low);
  return parts.length > 1 && [...scales.values()].some(isFlat) ? scales : null;
}

return Object.freeze({layOut, placeIn, knowsTokens, of: curvesOf, metricOf, placeOfStage});
})();
