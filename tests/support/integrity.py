"""Walks the whole cache: is every page owned by whom the sequences say, and indexed as what it holds?"""

from collections import Counter


def check_pages(pool, owners):
    """AssertionError if a page is lost, owned twice or wrongly indexed; `owners` have a table each."""
    counted = Counter(page for pages in owners for page in pages if page != pool.hole)
    free, cached = set(pool.free), set(pool.evictable)
    assert len(free) == len(pool.free), "a page is free twice"
    for page in range(pool.num_pages):
        assert pool.refs[page] == counted[page], f"page {page}: {pool.refs[page]} refs, {counted[page]} owners"
        places = (page in free) + (page in cached) + (pool.refs[page] > 0)
        assert places == 1, f"page {page} is in {places} places"
        assert page not in cached or pool.keys[page] is not None, f"cached page {page} is not in the index"
        assert page not in free or pool.keys[page] is None, f"free page {page} is in the index"
    for key, content in pool.index.items():
        assert set(content.pages) != {pool.hole} or key in pool.bare, "an index entry has no page"
        for group, page in enumerate(content.pages):
            assert page == pool.hole or pool.keys[page] == (group, key), f"the index entry of page {page} is stale"


def check_sequences(scheduler):
    """The same of a scheduler's pool, whose running sequences own pages and whose waiting ones own none."""
    restorations = scheduler.keeper.restorations if scheduler.keeper else []
    if states := scheduler.pool.states:
        held = Counter(restoration.slot for restoration in restorations if restoration.slot is not None) + Counter(slot for s in scheduler.running for slot in s.states.values()) + Counter([*states.passed.values(), *states.ends.values()])
        assert [held[slot] for slot in range(states.num_slots)] == states.refs, "a slot's references are not its owners"
        assert sorted(states.free) == [slot for slot in range(states.num_slots) if not held[slot]], "a slot is lost"
        assert {*states.passed, *states.ends} <= {content.serial for content in scheduler.pool.index.values()}, "a snapshot has no content"
        assert all(not s.states for s in scheduler.waiting) and states.snapshots <= states.most_snapshots
    assert all(sequence.pages for sequence in scheduler.running), "a running sequence owns no pages"
    assert all(not sequence.pages for sequence in scheduler.waiting), "a waiting sequence owns pages"
    check_pages(scheduler.pool, [owner.pages for owner in (*scheduler.running, *restorations)])
