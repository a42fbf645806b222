"""Pages, references, the prefix index."""

import random

import pytest

from chatlm.common.config import PAGE_SIZE
from chatlm.worker.engine.integrity import page_faults
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.model.pages import PageLayout, group_layers
from attention_kinds import attention


def faults(pool, tables):
    return page_faults(pool, enumerate(tables))


def fill(pool, tokens, pages, serial=PagePool.ROOT, first=0):
    """Register the whole pages of `tokens`, as a sequence does once they are computed."""
    for i in range(first, len(tokens) // pool.page_size):
        serial = pool.register(serial, tokens[i * pool.page_size:(i + 1) * pool.page_size], pages[i * pool.groups:(i + 1) * pool.groups])
    return serial


def test_allocate_gives_distinct_pages_or_none():
    pool = PagePool(8)
    pages = pool.allocate(5)
    assert len(set(pages)) == 5
    assert pool.allocate(4) is None
    assert pool.available == 3
    assert faults(pool, [pages]) == []


def test_a_released_prefix_is_found_in_whole_pages():
    """A released prefix is found again, and only whole pages of it."""
    pool = PagePool(8)
    tokens = list(range(40))
    pages = pool.allocate(3)
    fill(pool, tokens, pages)
    pool.release(pages)
    matched, _ = pool.match_prefix(tokens)
    assert matched == pages[:2]
    assert faults(pool, [matched]) == []


def test_the_last_token_is_never_matched():
    """The last token is never matched because its logits are needed."""
    pool = PagePool(8)
    tokens = list(range(2 * PAGE_SIZE))
    pages = pool.allocate(2)
    fill(pool, tokens, pages)
    matched, _ = pool.match_prefix(tokens)
    assert matched == pages[:1]


def test_equal_pages_below_other_prefixes_differ():
    """Equal pages below different prefixes are not confused."""
    pool = PagePool(8)
    same = [7] * PAGE_SIZE
    one, two = [1] * PAGE_SIZE + same, [2] * PAGE_SIZE + same
    first, second = pool.allocate(2), pool.allocate(2)
    fill(pool, one, first)
    fill(pool, two, second)
    assert pool.match_prefix(two + [0])[0] == second
    assert pool.match_prefix([3] * PAGE_SIZE + same + [0])[0] == []


def test_tokens_with_equal_hashes_are_told_apart():
    # hash(-1) == hash(-2) in CPython: the index must compare the tokens, not their hash
    pool = PagePool(4)
    fill(pool, [-1] * PAGE_SIZE, pool.allocate(1))
    assert hash((-1,) * PAGE_SIZE) == hash((-2,) * PAGE_SIZE)
    assert pool.match_prefix([-2] * PAGE_SIZE + [0])[0] == []


def test_a_prefix_computed_twice_is_indexed_once():
    """A prefix computed twice is indexed once, and the copy stays private."""
    pool = PagePool(8)
    tokens = list(range(2 * PAGE_SIZE))
    first, second = pool.allocate(2), pool.allocate(2)
    assert fill(pool, tokens, first) == fill(pool, tokens, second)
    pool.release(second)
    assert pool.match_prefix(tokens + [0])[0] == first
    assert faults(pool, [first, first]) == []


def test_eviction_takes_the_oldest_chain_end_first():
    """Eviction takes the least recently released, and the end of a chain first."""
    pool = PagePool(4)
    old, young = list(range(2 * PAGE_SIZE)), list(range(100, 100 + 2 * PAGE_SIZE))
    old_pages = pool.allocate(2)
    fill(pool, old, old_pages)
    young_pages = pool.allocate(2)
    fill(pool, young, young_pages)
    pool.release(old_pages)
    pool.release(young_pages)
    assert pool.allocate(1) == [old_pages[1]]
    assert pool.match_prefix(old + [0])[0] == old_pages[:1]
    assert pool.match_prefix(young + [0])[0] == young_pages


def test_a_shared_page_is_freed_by_its_last_owner():
    pool = PagePool(2)
    tokens = list(range(PAGE_SIZE + 1))
    pages = pool.allocate(1)
    fill(pool, tokens, pages)
    shared, _ = pool.match_prefix(tokens)
    pool.release(pages)
    assert pool.available == 1
    pool.release(shared)
    assert pool.available == 2


def test_random_operations_keep_the_cache_whole():
    """A thousand random operations keep the cache whole."""
    generator = random.Random(1)
    pool = PagePool(24)
    owned = []      # (tokens, pages)
    for _ in range(1000):
        if owned and generator.random() < 0.45:
            tokens, pages = owned.pop(generator.randrange(len(owned)))
            pool.release(pages)
        else:
            tokens = [generator.randrange(2) for _ in range(generator.randrange(1, 6 * PAGE_SIZE))]
            tokens[:PAGE_SIZE] = [generator.randrange(2)] * min(PAGE_SIZE, len(tokens))
            matched, serial = pool.match_prefix(tokens)
            fresh = pool.allocate(-(-len(tokens) // PAGE_SIZE) - len(matched))
            if fresh is None:
                pool.release(matched)
            else:
                fill(pool, tokens, matched + fresh, serial, first=len(matched))
                owned.append((tokens, matched + fresh))
        assert faults(pool, [pages for _, pages in owned]) == []


def test_a_leak_is_noticed():
    pool = PagePool(4)
    pool.allocate(1)
    assert faults(pool, []) == ["page 0: references counted: 1, found: 0 (nobody holds it)"]


def test_those_who_share_no_pages_find_only_their_own():
    pool = PagePool(8)
    tokens = list(range(40))
    for owner in ("alice", PagePool.ROOT):
        pages = pool.allocate(3)
        fill(pool, tokens, pages, owner)
        pool.release(pages)
    found = {owner: pool.match_prefix(tokens, owner)[0] for owner in ("alice", "bob", PagePool.ROOT)}
    assert len(found["alice"]) == len(found[PagePool.ROOT]) == 2 and found["bob"] == []
    assert not set(found["alice"]) & set(found[PagePool.ROOT])
    assert faults(pool, found.values()) == []


# --- layers with a window ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("windows, context, groups, depth, reach", [
    ((), 99, [4], 4, (0,)), ((0, 0, 0, 0), 99, [4], 4, (0,)),
    ((24,) * 4, 99, [4], 4, (24,)), ((24,) * 4, 24, [4], 4, (0,)),          # no token of this context leaves the window
    ((24, 0, 24, 0), 99, [2, 2], 2, (0, 24)), ((0, 0, 0, 20), 99, [1, 1, 1, 1], 1, (0, 0, 0, 20)),
    (tuple(512 * (l % 6 < 5) for l in range(26)), 32768, [4, 4, 4, 4, 4, 4, 2], 4, (0, *[512] * 6)),        # Gemma 3 1B
    ((10, 20, 0, 300), 99, [2, 2], 2, (0, 20)), ((0,) + (9,) * 63, 99, [1, *[4] * 15, 3], 4, (0, *[9] * 16))])
def test_layers_form_groups_of_equal_size(windows, context, groups, depth, reach):
    """Layers with and without a window form groups of equal size."""
    attentions = [attention(4, 2, 8, window=window) for window in windows or (0,) * 4]
    made = group_layers(attentions, context)
    assert [len(each) for each in made.members] == groups and (made.depth, made.windows) == (depth, reach)
    assert sorted(l for each in made.members for l in each) == list(range(len(attentions)))
    layout = PageLayout.of(made, attentions)
    for number, each in enumerate(made.members):
        assert [(layout.group[l], layout.offset[l]) for l in each] == [(number, 32 * index) for index in range(len(each))]
    assert layout.size == 32 * depth and group_layers(attentions, context, apart=False).windows == (0,)


def test_a_prefix_is_found_where_windows_are_whole():
    """A prefix is found where each group's window is whole, and only seen pages are taken."""
    pool = PagePool(20, (0, 40))
    tokens = list(range(6 * PAGE_SIZE))
    table = pool.allocate(12)
    fill(pool, tokens, table)
    pool.release(table)
    matched, _ = pool.match_prefix(tokens + [0])
    assert matched == [page if i % 2 == 0 or i // 2 >= 3 else pool.hole for i, page in enumerate(table)]    # 57 to 96 are seen
    pool.release(matched)
    assert faults(pool, []) == []
    lost = table[2 * 4 + 1]                                         # the window's page of the fifth row
    while pool.keys[lost]:
        pool._evict()
    kept, _ = pool.match_prefix(tokens + [0])
    assert faults(pool, [kept]) == []
    rows = len(kept) // 2
    assert rows < 5 and all(page != pool.hole for page in kept[::2])


def test_random_windows_keep_the_cache_whole():
    """A thousand random operations with windows keep the cache whole."""
    generator = random.Random(2)
    pool = PagePool(40, (0, 20, 40))
    owned = []
    for _ in range(1000):
        if owned and generator.random() < 0.5:
            pool.release(owned.pop(generator.randrange(len(owned))))
        else:
            tokens = [generator.randrange(2)] * PAGE_SIZE + [generator.randrange(2) for _ in range(generator.randrange(1, 5 * PAGE_SIZE))]
            table, serial = pool.match_prefix(tokens)
            first = len(table) // 3
            fresh = pool.allocate(3 * (-(-len(tokens) // PAGE_SIZE) - first))
            if fresh is None:
                pool.release(table)
                continue
            table += fresh
            fill(pool, tokens, table, serial, first)
            for group, window in enumerate(pool.windows):           # as a sequence gives back what it has passed
                for row in range(pool.first_seen(len(tokens), window)):
                    pool.release([table[3 * row + group]])
                    table[3 * row + group] = pool.hole
            owned.append(table)
        assert faults(pool, owned) == []
