"""Models in other formats, for other programs or this one: `export`, `push`, `quantize` (docs/export.md). It
uses the worker's readers.

Never in here: aiohttp, anything of the front, changing a model's own files. hub_code is no package of this
program: transformers runs it, from an exported folder."""
