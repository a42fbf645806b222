"""Engines in which a model drafts, whatever that costs."""

from chatlm.worker.engine import model_drafts
from chatlm.worker.engine.drafts import NO_DRAFT, Drafting
from chatlm.worker.engine.lookup import Lookup


def draft_always(monkeypatch, length):
    """Models draft so many tokens each time, all of which are verified; nothing is drafted from texts."""
    monkeypatch.setattr(model_drafts, "best_length", lambda share, draft_s, step_s, most: min(most, length))
    monkeypatch.setattr(model_drafts.ModelDrafts, "FIRST", length)
    monkeypatch.setattr(Lookup, "propose", lambda lookup, sequences: [NO_DRAFT] * len(sequences))
    monkeypatch.setattr(Drafting, "_counts", lambda drafting, drafts, times, rows, most, other_s: [len(draft.tokens) for draft in drafts])
