"""Models in other formats, for other programs: the commands `export` and `push`. docs/export.md is its
manual."""
