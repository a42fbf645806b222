"""One replica: `Engine.step` schedules, runs and postprocesses. KV pages, drafts, grammars, the text of
answers."""
