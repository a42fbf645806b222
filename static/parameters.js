// Made by `python docs/parameters.py` from chatlm/front/api/tables.py; a test compares the two.
//
// What can be set for a chat; "" or absent is the server's default. `command` is the word after a slash. `slider`: its least and most
// value and its step. `folded`: shown under "More parameters"; `apart`: not among the settings.
"use strict";

const Parameters = (() => {

const all = [
  {name: "temperature", command: "temperature", min: 0, max: 2, step: "any", slider: [0, 2, 0.05]},
  {name: "top_k", command: "topk", min: 0, max: 2147483647, step: 1, slider: [0, 200, 1]},
  {name: "top_p", command: "topp", min: 0, max: 1, step: "any", slider: [0, 1, 0.01]},
  {name: "min_p", command: "minp", min: 0, max: 1, step: "any", slider: [0, 0.5, 0.01]},
  {name: "presence_penalty", command: "presence", min: -2, max: 2, step: "any", slider: [-2, 2, 0.1], folded: true},
  {name: "frequency_penalty", command: "frequency", min: -2, max: 2, step: "any", slider: [-2, 2, 0.1], folded: true},
  {name: "repetition_penalty", command: "repetition", min: 0.01, max: 10, step: "any", slider: [0.5, 2, 0.01], folded: true},
  {name: "typical_p", command: "typicalp", min: 0, max: 1, step: "any", slider: [0, 1, 0.01], folded: true},
  {name: "xtc_probability", command: "xtcprobability", min: 0, max: 1, step: "any", slider: [0, 1, 0.01], folded: true},
  {name: "xtc_threshold", command: "xtcthreshold", min: 0, max: 1, step: "any", slider: [0, 1, 0.01], folded: true},
  {name: "dry_multiplier", command: "drymultiplier", min: 0, max: 100, step: "any", slider: [0, 5, 0.05], folded: true},
  {name: "dry_base", command: "drybase", min: 1, max: 100, step: "any", slider: [1, 4, 0.05], folded: true},
  {name: "dry_allowed_length", command: "dryallowedlength", min: 0, max: 2147483647, step: 1, slider: [0, 20, 1], folded: true},
  {name: "dry_penalty_last_n", command: "drypenaltylastn", min: -1, max: 2147483647, step: 1, slider: [-1, 4096, 1], folded: true},
  {name: "top_n_sigma", command: "topnsigma", min: -1, max: 1000, step: "any", slider: [0, 5, 0.1], folded: true},
  {name: "reasoning_effort", command: "effort", choices: ["none", "low", "medium", "high"], folded: true},
  {name: "thinking_budget", command: "budget", min: 0, max: 9007199254740991, step: 1, apart: true},
  {name: "max_tokens", command: "maxtokens", min: 1, max: 9007199254740991, step: 1, slider: [1, 4096, 1]},
  {name: "seed", command: "seed", min: 0, max: 9007199254740991, step: 1},
];

Parts.register({
  strings: {
    parameters: {
      temperature: "Temperature",
      top_k: "Top-k",
      top_p: "Top-p",
      min_p: "Min-p",
      presence_penalty: "Presence penalty",
      frequency_penalty: "Frequency penalty",
      repetition_penalty: "Repetition penalty",
      typical_p: "Typical-p",
      xtc_probability: "XTC probability",
      xtc_threshold: "XTC threshold",
      dry_multiplier: "DRY multiplier",
      dry_base: "DRY base",
      dry_allowed_length: "DRY allowed length",
      dry_penalty_last_n: "DRY penalty last n",
      top_n_sigma: "Top-n sigma",
      reasoning_effort: "Thinking effort",
      thinking_budget: "Thinking budget",
      max_tokens: "Max tokens",
      seed: "Seed",
    },
    parameterHints: {
      temperature: "how random the answer is; 0 = greedy",
      top_k: "keep this many of the likeliest tokens; 0 or -1 = all",
      top_p: "keep the likeliest tokens up to this total probability; 1 = off",
      min_p: "drop tokens below this share of the likeliest one's probability; 0 = off",
      presence_penalty: "lowers the logits of tokens of the answer; 0 = off",
      frequency_penalty: "the same, for each time it occurs",
      repetition_penalty: "makes tokens less likely that already occurred; 1 = off",
      typical_p: "keep the most typical tokens up to this total probability; 1 = off",
      xtc_probability: "how often XTC leaves out top choices; 0 = off",
      xtc_threshold: "of the tokens at least this likely, XTC keeps only the least likely; above 0.5 = off",
      dry_multiplier: "DRY's penalty for tokens that continue a repetition; 0 = off",
      dry_base: "by what factor DRY's penalty grows with each token of the repetition",
      dry_allowed_length: "tokens that DRY lets repeat without a penalty",
      dry_penalty_last_n: "tokens in which DRY looks for repetitions; 0 = off, -1 = all",
      top_n_sigma: "keep tokens within this many standard deviations of the largest logit; 0 or -1 = off",
      reasoning_effort: "how much the model thinks, if its template supports that",
      thinking_budget: "most tokens that the model thinks, at most max_tokens",
      max_tokens: "most tokens of the answer",
      seed: "same seed, same answer",
    },
  },
});

return Object.freeze({all});
})();
