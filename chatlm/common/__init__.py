"""What both houses use: flags and limits, errors and the log, messages, text, processes, finding a model.

It knows nothing of either house: a front and a worker each import what they need of it. Never in here: torch,
numpy, gguf or aiohttp, which one of the houses must not load; a library that only some models or flags need
is imported in the function that needs it. What passes between the houses is defined here, so both read one
definition."""
