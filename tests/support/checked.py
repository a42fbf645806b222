"""Every engine that a test makes, so that the counts of those that live are checked after each test."""

import weakref

from chatlm.worker.engine.engine import Engine
from chatlm.worker.engine.integrity import integrity_faults

fresh = []                      # made since the last check; held until then, since a test may drop them at its end
made = weakref.WeakSet()        # all that live, such as those of a module's fixtures


def note(engine, *arguments, original=Engine.__init__, **options):
    original(engine, *arguments, **options)
    fresh.append(engine)
    made.add(engine)


Engine.__init__ = note


def take_faults():
    """The faults of these engines; those that have any are not asked again."""
    found = []
    for engine in [*made]:
        if faults := integrity_faults(engine):
            made.discard(engine)
            found += faults
    fresh.clear()
    return found
