"""Everything with tensors: a process of this house holds one replica of a model, or one rank of it.

It loads weights, schedules, computes and draws tokens, and turns them into text, step by step. Never in here:
aiohttp or anything else of HTTP, the format of an API, any name of the front. It gets a `WorkerConfig` and
requests whose prompts are token ids that fit, and sends back a `Stepped` for each step. It opens no network
socket, but for processes that prove to know its secret."""
