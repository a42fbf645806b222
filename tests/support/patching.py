"""Replaces a name of the program in every module that has it: `from ... import X` gave each its own."""

import sys


def patch(monkeypatch, module, name, value):
    """monkeypatch.setattr(module, name, value), in every other module too that has the same object under this name.

    A module that is imported before the end of the test gets the value from `module`; the end puts it right there too."""
    monkeypatch.setattr(Everywhere(module, name), "value", value)


def replace_everywhere(module, name, value):
    """The same for good, in a process of its own. Returns what was there."""
    assert name in vars(module), f"{module.__name__} has no {name}"
    former = vars(module)[name]
    for each in modules():
        if name in vars(each) and vars(each)[name] is former:
            setattr(each, name, value)
    assert vars(module)[name] is value, f"{name} of {module.__name__} was not replaced: it is no module of the program"
    return former


def modules():
    """Of the program, those that are loaded."""
    return [module for name, module in list(sys.modules.items())
            if module is not None and (name in ("chat_server", "chatlm") or name.startswith("chatlm."))]


class Everywhere:
    """A name in all its modules, as one attribute: monkeypatch also puts it back everywhere."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    @property
    def value(self):
        assert self.name in vars(self.module), f"{self.module.__name__} has no {self.name}"
        return getattr(self.module, self.name)

    @value.setter
    def value(self, value):
        replace_everywhere(self.module, self.name, value)
