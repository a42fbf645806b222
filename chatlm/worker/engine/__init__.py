"""One replica: `Engine.step` schedules, runs and postprocesses. Also KV pages, drafts, grammars and the text
of answers."""
