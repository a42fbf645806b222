"""Everything with tensors: a process of this house holds one replica of a model, or one rank of it.

It loads weights, schedules, computes and draws tokens, and turns them into text, step by step. It gets a
`WorkerConfig` and requests whose prompts are token ids that fit, and sends back a `Stepped` for each step.
Never in here: aiohttp or other HTTP code, the format of an API, any name of the front; nor a network
socket, except for processes that prove that they know its secret."""
