"""The doctor, `check MODEL`: what is wrong with a model, before it is served.

`examine` runs the rows of `checks.CHECKS`, functions of one `ExaminedModel` that yield `Finding`s, in the
role `doctor`. A check reads the model's files, with the rooms that a worker reads them with, and changes
nothing. Nothing here answers requests, and no other room imports this one."""
