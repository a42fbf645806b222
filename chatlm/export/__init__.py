"""Models in other formats, for other programs: the commands `export` and `push` (docs/export.md).

Never in here: computing answers, and changing a model's own files. hub_code is no package of this program:
transformers runs it, from an exported folder."""
