"""Who owns which slot of the states that some layers keep for a sequence instead of keys and values.

    a slot is free   in `free`, content meaningless
            | held   by `refs` >= 1 running sequences and snapshots

A slot holds the state after some number of tokens, in all such layers. A running sequence has one slot; while
a draft is verified it has one for each token of the draft, of which it then keeps one. A snapshot is the
state at the end of a content of the prefix index. It is found by the content's serial, and shared without a
copy, since a slot with several holders is never written. Snapshots are taken at the end of a prompt, every
INTERVAL tokens, and at the last full page of an answer: there a conversation continues, unless its template
rewrites the answer. Where a prompt was cut, because its client left, there is one too."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatlm.worker.engine.facts import StateFacts

if TYPE_CHECKING:
    from chatlm.worker.engine.sequence import Chunk, Sequence


class StatePool:
    """Allocator of slots, of which at most `most_snapshots` are snapshots. No tensors here.

    The least recently used snapshot is evicted first, but ends of prompts only after all others: a
    conversation continues from its last end of a prompt."""

    INTERVAL = 1024  # tokens between snapshots

    def __init__(self, num_slots: int, most_snapshots: int):
        self.num_slots = num_slots
        self.most_snapshots = most_snapshots
        self.free = list(range(num_slots - 1, -1, -1))
        self.refs = [0] * num_slots
        self.ends: OrderedDict[int | str, int] = OrderedDict()    # of ends of prompts: serial -> slot
        self.passed: OrderedDict[int | str, int] = OrderedDict()  # of all other contents
        self.fresh: deque[int | str] = deque(maxlen=1 << 12)      # serials to copy to kept pages

    def __contains__(self, serial: int | str) -> bool:
        """Is there a snapshot after this content?"""
        return serial in self.passed or serial in self.ends

    @property
    def snapshots(self) -> int:
        return len(self.passed) + len(self.ends)

    def facts(self, bytes_each: int) -> StateFacts:
        return StateFacts(self.num_slots, self.most_snapshots, bytes_each)

    def gauges(self) -> dict[str, float]:
        return {"states_used": self.num_slots - len(self.free), "states_total": self.num_slots,
                "state_snapshots": self.snapshots}

    def allocate(self, evict: bool = True) -> int | None:
        """Take a slot, evicting snapshots if needed and allowed; None if all are held."""
        while evict and not self.free and self.snapshots:
            self._evict()
        if not self.free:
            return None
        slot = self.free.pop()
        self.refs[slot] = 1
        return slot

    def release(self, slot: int):
        self.refs[slot] -= 1
        if not self.refs[slot]:
            self.free.append(slot)

    def share(self, serial: int | str) -> int:
        """The slot of a snapshot, with one more reference."""
        snapshots = self.ends if serial in self.ends else self.passed
        snapshots.move_to_end(serial)
        slot = snapshots[serial]
        self.refs[slot] += 1
        return slot

    def keep(self, serial: int | str, slot: int, before: int | str | None):
        """Make the state in a slot the snapshot of a content, unless it has one.

        before: the end of the previous prompt of the conversation, if the content is the end of one; else
        None. The previous end is then an ordinary snapshot."""
        if before is not None and before in self.ends:
            self.passed[before] = self.ends.pop(before)
        if serial in self:
            if before is not None and serial in self.passed:
                self.ends[serial] = self.passed.pop(serial)
            return
        if self.snapshots >= self.most_snapshots and self.snapshots:
            self._evict()
        if self.most_snapshots:
            (self.passed if before is None else self.ends)[serial] = slot
            self.refs[slot] += 1

    def forget(self, serial: int | str):
        """Drop the snapshot of a content, if there is one."""
        for snapshots in (self.passed, self.ends):
            if serial in snapshots:
                self.release(snapshots.pop(serial))

    def _evict(self):
        _, slot = (self.passed or self.ends).popitem(last=False)
        self.release(slot)


@dataclass(eq=False)
class HeldStates:
    """The states that a sequence holds. Serials are of contents of the prefix index."""

    slots: dict[int, int] = field(default_factory=dict)  # number of tokens -> slot with the state after them
    began: int | str = ""     # serial of the last end of a prompt that has a snapshot
    answered: int | str = ""  # serial of the content in its answer that has the snapshot


class StateTables:
    """The states of running sequences."""

    def __init__(self, pool: StatePool, page_size: int):
        self.pool = pool
        self.page_size = page_size

    def end_of_prompt(self, sequence: Sequence) -> int:
        """The end of the last page that a prompt continuing this one can share."""
        return (len(sequence.work.prompt_ids) - 1) // self.page_size * self.page_size

    def begin(self, sequence: Sequence, computed: int):
        """Give an admitted sequence the snapshot after its `computed` cached tokens."""
        sequence.states.began = sequence.serial
        if computed:
            sequence.states.slots[computed] = self.pool.share(sequence.serial)

    def prepare(self, chunk: Chunk) -> Chunk | None:
        """The chunk with the slots that its step reads and writes; its draft is cut if slots run out. None if
        there is no slot for it now.

        It writes to the slot it reads, unless the slot has other holders or the step may be repeated."""
        pool = self.pool
        sequence = chunk.sequence
        states = sequence.states.slots
        begin = sequence.computed
        end = begin + chunk.count
        for tokens in [tokens for tokens in states if tokens != begin]:
            pool.release(states.pop(tokens))  # of drafts that were wrong, and of steps that are repeated
        read = states.get(begin)
        if read is not None and pool.refs[read] == 1 and not chunk.on_host:
            written = states.pop(begin)
        else:
            written = pool.allocate()
        if written is None:
            return None
        states[end] = written
        chunk = self._with_draft_slots(chunk)
        self._add_snapshot_slots(sequence, begin, end)
        later = sorted((tokens, slot) for tokens, slot in states.items() if tokens > begin)
        return chunk._replace(reads=0 if read is None else read,
                              writes=tuple((tokens - begin - 1, slot) for tokens, slot in later))

    def _with_draft_slots(self, chunk: Chunk) -> Chunk:
        """Give each token of a chunk's draft a slot; the draft is cut where slots run out."""
        end = chunk.sequence.computed + chunk.count
        for i in range(1, len(chunk.draft) + 1):
            slot = self.pool.allocate(evict=False)
            if slot is None:
                return chunk._replace(draft=chunk.draft[:i - 1], draws=i)
            chunk.sequence.states.slots[end + i] = slot
        return chunk

    def _add_snapshot_slots(self, sequence: Sequence, begin: int, end: int):
        """Give a sequence slots for the states at which snapshots are due between these tokens."""
        interval = self.pool.INTERVAL
        first = -(-(begin + 1) // interval) * interval
        for point in {*range(first, end, interval), self.end_of_prompt(sequence)}:
            if begin < point < end and self.pool.most_snapshots:
                slot = self.pool.allocate()
                if slot is not None:
                    sequence.states.slots[point] = slot

    def pass_content(self, sequence: Sequence, end: int):
        """A content, sequence.serial, has been filled up to `end`. Keep the state there if a snapshot is due,
        or if it is the last in the answer so far."""
        pool = self.pool
        serial = sequence.serial
        states = sequence.states
        slot = states.slots.get(end)
        if slot is None:
            return
        is_end = end == self.end_of_prompt(sequence)
        if is_end or end % pool.INTERVAL == 0:
            pool.keep(serial, slot, states.began if is_end else None)
            pool.fresh.append(serial)
            states.began = serial if is_end else states.began
        elif end > len(sequence.work.prompt_ids) and serial not in pool:
            if states.answered in pool.passed:
                pool.forget(states.answered)
            if pool.passed or pool.snapshots < pool.most_snapshots:  # never evict an end of a prompt
                pool.keep(serial, slot, None)
                states.answered = serial

    def keep_cut(self, sequence: Sequence):
        """Keep the state of a prompt that is cut here, so that the same prompt can go on from it."""
        pool = self.pool
        computed = sequence.computed
        slot = sequence.states.slots.get(computed)
        if slot is None or computed % self.page_size or sequence.serial in pool or not sequence.shares_pages:
            return
        has_room = pool.passed or pool.snapshots < pool.most_snapshots  # never evict an end of a prompt
        if computed < self.end_of_prompt(sequence) and has_room:
            pool.keep(sequence.serial, slot, None)
            pool.fresh.append(sequence.serial)

    def advance(self, sequence: Sequence):
        """Release the states before its computed tokens."""
        for tokens in [tokens for tokens in sequence.states.slots if tokens < sequence.computed]:
            self.pool.release(sequence.states.slots.pop(tokens))

    def release(self, sequence: Sequence):
        for slot in sequence.states.slots.values():
            self.pool.release(slot)
        if sequence.states.answered in self.pool:  # each page of an answer had one; copy only the last
            self.pool.fresh.append(sequence.states.answered)
        sequence.states.slots = {}
