"""Checks that everything an engine counts has the right owners: after each test, and in idle workers.

    a page          is free, cached or referenced, and its references equal its entries in tables
    the index       points to pages that point back, and whose owners have the same tokens
    a state's slot  is free, or referenced once by each sequence, restoration and snapshot that holds it
    an adapter      has a slot of its own, with a digest, a size and tensors; no other slot has these
    drafts, and     are made for answers that go on, and for no others
    pictures

A fault is one line: what is wrong, the count, and the holders found."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence as Seq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlm.worker.engine.adapter_slots import AdapterSlots
    from chatlm.worker.engine.draft_model import Followers
    from chatlm.worker.engine.encoded_pictures import Pictures
    from chatlm.worker.engine.engine import Engine
    from chatlm.worker.engine.keeper import Restoration
    from chatlm.worker.engine.kvcache import Content, Key, PagePool
    from chatlm.worker.engine.run_queue import RunQueue
    from chatlm.worker.engine.sequence import Sequence
    from chatlm.worker.engine.states import StatePool


class IntegrityError(AssertionError):
    """An engine's counts do not match what it has: a bug of ours. `faults` has a line for each."""

    def __init__(self, faults: list[str]):
        super().__init__("; ".join(faults))
        self.faults = faults


def check_integrity(engine: Engine):
    """IntegrityError if a count of an engine is wrong. Call it between two steps."""
    if faults := integrity_faults(engine):
        raise IntegrityError(faults)


def integrity_faults(engine: Engine) -> list[str]:
    return all_faults(integrity_slices(engine))


# One part of a check: the name of what was looked at (see BROKEN_INVARIANTS), and its faults
Slice = tuple[str, list[str]]
SLICE = 1024  # pages, or entries of the prefix index, in a slice: 3 ms


def all_faults(slices: Iterable[Slice]) -> list[str]:
    return [fault for _, faults in slices for fault in faults]


def integrity_slices(engine: Engine) -> Iterator[Slice]:
    """The same check in short parts. In between the engine may do nothing: else begin anew."""
    restorations = engine.keeper.restorations if engine.keeper else ()
    yield from queue_slices(engine.queue, restorations)
    yield "adapters", adapter_faults(engine)
    for model in engine.draft_models:
        for name, faults in follower_slices(model.drafter.followers):
            yield name, [f"of a draft model: {fault}" for fault in faults]
    yield "drafts", draft_faults(engine)
    if engine.pictures:
        yield "pictures", picture_faults(engine.pictures, engine.queue)


def count_faults(kind: str, refs: Seq[int], free: Seq[int], cached: Collection[int],
                 holdings: Iterable[tuple[str, Iterable[int]]]) -> list[str]:
    """Faults of numbered pages or slots: those whose reference count is not their number of holders, and
    those not in exactly one state. holdings: (name, its numbers) of each holder; names are unique."""
    holders = defaultdict(list)
    faults = []
    for name, numbers in holdings:
        for number in numbers:
            holders[number].append(name)
    if not holders and are_at_rest(refs, free, cached):
        return faults
    times = Counter(free)
    cached = {*cached}
    known = {*range(len(refs))}
    referenced = {number for number, counted in enumerate(refs) if counted}
    free_twice = set() if len(times) == len(free) else {number for number, n in times.items() if n > 1}
    # The others, nearly all of a large cache, are free or cached and nothing else. Tests ask after each step.
    unsure = referenced | holders.keys() | free_twice | times.keys() & cached | known - times.keys() - cached
    for number in sorted(unsure & known):
        counted = refs[number]
        found = holders[number]
        if counted != len(found):
            faults.append(f"{kind} {number}: references counted: {counted}, found: {len(found)} "
                          f"({', '.join(found) or 'nobody holds it'})")
        faults += [f"{kind} {number} is held {held} times by {name}"
                   for name, held in Counter(found).items() if held > 1]
        if times[number] > 1:
            faults.append(f"{kind} {number} is in the free list {times[number]} times")
        states = []
        if number in times:
            states.append("free")
        if number in cached:
            states.append("cached")
        if counted > 0 or found:
            states.append("referenced")
        if len(states) != 1:
            faults.append(f"{kind} {number} is {' and '.join(states) or 'lost: not free, cached or held'}")
    unknown = sorted((times.keys() | cached | holders.keys()) - known)
    return faults + [f"{kind} {number} does not exist ({', '.join(holders[number]) or 'nobody holds it'})"
                     for number in unknown]


def are_at_rest(refs: Seq[int], free: Seq[int], cached: Collection[int]) -> bool:
    """Is each of these numbers free or cached, once, and none referenced? Of 100,000 this is known in 10 ms,
    which is a fifth of what it takes to say what is wrong."""
    listed = {*free}
    if any(refs) or len(listed) < len(free) or len(free) + len(cached) != len(refs):
        return False
    numbers = range(len(refs))
    are_known = all(min(each) in numbers and max(each) in numbers for each in (free, cached) if each)
    return are_known and listed.isdisjoint(cached)


def page_faults(pool: PagePool, tables: Iterable[tuple[str, Seq[int]]]) -> list[str]:
    """Faults of the pages and of the prefix index. tables: (name, table) of each owner; names are unique."""
    return all_faults(page_slices(pool, tables))


def page_slices(pool: PagePool, tables: Iterable[tuple[str, Seq[int]]]) -> Iterator[Slice]:
    owned = [(name, [page for page in table if page != pool.hole]) for name, table in tables]
    yield "pages", count_faults("page", pool.refs, pool.free, pool.evictable, owned)
    for faults in index_slices(pool):
        yield "prefixes", faults


def index_slices(pool: PagePool) -> Iterator[list[str]]:
    """Faults of the prefix index: entries and pages that do not point to each other, and what should have
    been forgotten."""
    for first in range(0, pool.num_pages, SLICE):
        yield key_faults(pool, range(first, min(first + SLICE, pool.num_pages)))
    free = {*pool.free}
    entries = [*pool.index.items()]
    serials: set[int] = set()
    for first in range(0, len(entries), SLICE):
        yield entry_faults(pool, entries[first:first + SLICE], free, serials)
    addresses = pool.addresses.of.keys() | pool.addresses.keys.keys() if pool.addresses else set()
    yield [f"the prefix index has no entry {serial}, but its address is known"
           for serial in sorted({*addresses} - serials, key=str)]


def key_faults(pool: PagePool, pages: Iterable[int]) -> list[str]:
    """Faults of the keys by which these pages are found."""
    faults = []
    for page in pages:
        key = pool.keys[page]
        if key is None and page in pool.evictable:
            faults.append(f"page {page} is cached, but has no entry in the prefix index")
        elif key is None and pool.refs[page] > 1:
            faults.append(f"page {page} is shared, but has no entry in the prefix index")
        elif key and (key[1] not in pool.index or pool.index[key[1]].pages[key[0]] != page):
            faults.append(f"page {page} has the key of an entry that does not have this page")
    return faults


def entry_faults(pool: PagePool, entries: Iterable[tuple[Key, Content]], free: Collection[int],
                 serials: set[int]) -> list[str]:
    """Faults of these entries of the prefix index. serials: of those before, which it adds to."""
    faults = []
    for key, content in entries:
        name = f"the index entry {content.serial}"
        if content.serial in serials or not 0 < content.serial <= pool.last_serial:
            faults.append(f"{name} has a serial that is not its own")
        serials.add(content.serial)
        if {*content.pages} == {pool.hole} and key not in pool.bare:
            faults.append(f"{name} has no page, and will never be forgotten")
        for group, page in enumerate(content.pages):
            if page == pool.hole:
                continue
            if page in free:
                faults.append(f"{name} points to page {page}, which is free")
            if page not in range(pool.num_pages) or pool.keys[page] != (group, key):
                faults.append(f"{name} points to page {page}, which does not have its key")
    return faults


def state_faults(pool: PagePool, states: StatePool,
                 holdings: Iterable[tuple[str, Iterable[int]]]) -> list[str]:
    """Faults of the slots of states and of the snapshots. holdings: (name, slots) of each other holder."""
    snapshots = [(f"the {kind} of entry {serial}", [slot]) for kind, known in
                 (("snapshot", states.passed), ("end-of-prompt snapshot", states.ends))
                 for serial, slot in known.items()]
    faults = count_faults("state slot", states.refs, states.free, (), [*holdings, *snapshots])
    indexed = {content.serial for content in pool.index.values()}
    faults += [f"the prefix index has no entry {serial}, but a snapshot of it is kept"
               for serial in sorted({*states.passed, *states.ends} - indexed, key=str)]
    faults += [f"entry {serial} has two snapshots" for serial in states.passed.keys() & states.ends.keys()]
    if states.snapshots > states.most_snapshots:
        faults.append(f"{states.snapshots} snapshots are kept, at most {states.most_snapshots} may be")
    return faults


def queue_faults(queue: RunQueue, restorations: Seq[Restoration] = ()) -> list[str]:
    """Faults of the sequences, and of the pages and states that they and restorations hold."""
    return all_faults(queue_slices(queue, restorations))


def queue_slices(queue: RunQueue, restorations: Seq[Restoration] = ()) -> Iterator[Slice]:
    pool = queue.pool
    everyone = [*queue.running, *queue.waiting]
    yield "answers", sequence_faults(queue, everyone, restorations)
    holders = [*((f"answer {s.work.id}", s.pages, s.states.slots.values()) for s in everyone),
               *((f"restoration {number}", each.pages, () if each.slot is None else (each.slot,))
                 for number, each in enumerate(restorations))]
    yield from page_slices(pool, [(name, pages) for name, pages, _ in holders])
    if pool.states:
        yield "states", state_faults(pool, pool.states, [(name, slots) for name, _, slots in holders])
    for sequence in everyone:
        yield "prefixes", table_faults(pool, sequence)


def sequence_faults(queue: RunQueue, everyone: Seq[Sequence], restorations: Seq[Restoration]) -> list[str]:
    """Faults of what runs and waits, and of restorations for it."""
    faults = []
    for sequence, times in Counter(everyone).items():
        if times > 1:
            faults.append(f"answer {sequence.work.id} is scheduled {times} times")
        if sequence.finished:
            faults.append(f"answer {sequence.work.id} has ended, but is still scheduled")
    faults += [f"answer {s.work.id} is running, but has no pages" for s in queue.running if not s.pages]
    for waiting in queue.waiting:
        holdings = {"pages": waiting.pages, "states": waiting.states.slots,
                    "computed tokens": waiting.computed}
        faults += [f"answer {waiting.work.id} is waiting, but has {kind}"
                   for kind, held in holdings.items() if held]
    awaited = {id(sequence.restoration) for sequence in everyone}
    return faults + [f"restoration {number} goes on, but no answer waits for it" for number, each in
                     enumerate(restorations) if not (each.over or each.ahead) and id(each) not in awaited]


def follower_faults(followers: Followers) -> list[str]:
    """Faults of the pages that a drafting model has for sequences."""
    return all_faults(follower_slices(followers))


def follower_slices(followers: Followers) -> Iterator[Slice]:
    yield from page_slices(followers.pool, [(f"answer {sequence.work.id}", follower.own.pages)
                                            for sequence, follower in followers.of.items()])
    yield "drafts", [f"answer {sequence.work.id} has ended, but still has pages" for sequence in followers.of
                     if sequence.finished]
    for follower in followers.of.values():
        yield "prefixes", table_faults(followers.pool, follower.own)


def draft_faults(engine: Engine) -> list[str]:
    """Faults of what is remembered of answers that are drafted for."""
    faults = [f"answer {sequence.work.id} has ended, but is still drafted for"
              for sequence in engine.drafting.records if sequence.finished]
    for model in engine.draft_models:
        faults += [f"answer {sequence.work.id} has ended, but a draft model still watches it"
                   for sequence in model.watched if sequence.finished]
    return faults


def picture_faults(pictures: Pictures, queue: RunQueue) -> list[str]:
    """Faults of the pictures: work that goes on for nobody, and more of them kept than may be."""
    faults = []
    waits = any(sequence.placeholders for sequence in (*queue.running, *queue.waiting))
    if (pictures.work or pictures.tiles) and not waits:
        faults.append("a picture is being encoded, but no answer waits for it")
    held = sum(picture.nbytes for picture in pictures.by_digest.values())
    if held > pictures.KEPT_BYTES and len(pictures.by_digest) > 1:
        faults.append(f"{held} bytes of pictures are kept, at most {pictures.KEPT_BYTES} may be")
    return faults


def table_faults(pool: PagePool, sequence: Sequence) -> list[str]:
    """Faults of a sequence's table: pages indexed under another group or other tokens."""
    faults = []
    size = pool.page_size
    name = f"the table of answer {sequence.work.id}"
    if len(sequence.pages) % pool.groups:
        faults.append(f"{name} has {len(sequence.pages)} entries in {pool.groups} groups")
    for index, page in enumerate(sequence.pages):
        row, group = divmod(index, pool.groups)
        if page not in range(pool.num_pages) or (known := pool.keys[page]) is None:
            continue
        tokens = tuple(sequence.tokens[row * size:(row + 1) * size])
        if known[0] != group or known[1][1] != tokens or (row + 1) * size > sequence.computed:
            faults.append(f"{name} has page {page} in row {row}, which is indexed with other tokens")
    return faults


def adapter_faults(engine: Engine) -> list[str]:
    """Faults of the slots of adapters, in this rank."""
    known: AdapterSlots | None = engine.adapters
    tensors = {*engine.transformer.adapters}
    if not known:
        return [f"adapter slot {slot} has tensors, but no adapters are served" for slot in sorted(tensors)]
    reading = {slot for slot, _ in known.reading.values()}
    owners = defaultdict(list)
    for adapter_id, slot in [*known.slots.items(), *((id, slot) for id, (slot, _) in known.reading.items())]:
        owners[slot].append(adapter_id)
    faults = [f"adapter slot {slot} belongs to {len(names)} adapters: {', '.join(names)}"
              for slot, names in owners.items() if len(names) > 1]
    faults += [f"adapter slot {slot} of {names[0]} was never given out" for slot, names in owners.items()
               if not 0 < slot <= known.last]
    loaded = {*known.slots.values()}
    for what, slots, most in (("a digest", known.digests, loaded), ("a size", known.sizes, loaded),
                              ("tensors", tensors, loaded | reading)):
        faults += [f"adapter slot {slot} has {what}, but no adapter has the slot"
                   for slot in sorted({*slots} - most)]
        faults += [f"adapter slot {slot} of {owners[slot][0]} lacks {what}"
                   for slot in sorted(loaded - {*slots})]
    for sequence in (*engine.queue.running, *engine.queue.waiting):
        if sequence.adapter and known.digests.get(sequence.adapter) != sequence.adapter_digest:
            faults.append(f"answer {sequence.work.id} has adapter slot {sequence.adapter}, which no adapter "
                          "with its digest has")
    return faults
