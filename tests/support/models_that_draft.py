"""Engines in which a model drafts, whatever that costs."""

from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.engine import model_drafts
from chatlm.worker.engine.draft_model import DraftModel
from chatlm.worker.engine.drafts import NO_DRAFT, Drafting
from chatlm.worker.engine.lookup import Lookup
from works import assignment

NEW = 40            # tokens of an answer


def works_of(new=NEW, **sampling):
    """Four answers to prompts of different lengths, two of them at temperature 1."""
    prompts = [tuple((31 * i * i + 7 * i + 5 * n) % 250 for i in range(length)) for n, length in enumerate((70, 37, 1, 19))]
    return [assignment(f"w{n}", prompt, SamplingParams(**{"temperature": t, "seed": n} | sampling), new, ignore_eos=True)
            for n, (prompt, t) in enumerate(zip(prompts, (0.0, 0.7, 1.0, 1.0)))]


def draft_always(monkeypatch, length):
    """Models draft so many tokens each time, all of which are verified; nothing is drafted from texts."""
    monkeypatch.setattr(model_drafts, "best_cut", lambda chances, seconds, speed=0.0: model_drafts.Length(min(len(chances), length), 1e9 * bool(chances)))
    monkeypatch.setattr(DraftModel, "behind", lambda model, sequence: 0)
    monkeypatch.setattr(Lookup, "propose", lambda lookup, sequences: [NO_DRAFT] * len(sequences))
    monkeypatch.setattr(Drafting, "_counts", lambda drafting, drafts, times, rows, most: [len(draft.tokens) for draft in drafts])
