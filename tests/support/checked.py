"""Every engine that a test makes, so that the counts of those that live are checked after each test."""

import weakref

from chatlm.worker.engine.engine import Engine
from chatlm.worker.engine.integrity import integrity_faults

made = weakref.WeakSet()


def note(engine, *arguments, original=Engine.__init__, **options):
    original(engine, *arguments, **options)
    made.add(engine)


Engine.__init__ = note


def take_faults():
    """The faults of all engines that still exist; those that have any are not asked again."""
    found = []
    for engine in [*made]:
        if faults := integrity_faults(engine):
            made.discard(engine)
            found += faults
    return found
