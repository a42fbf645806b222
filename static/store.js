// Storage: conversations, nodes and drafts in IndexedDB, shared by the tabs of this browser.
//
// A change is a patch: one transaction merges it into the stored record and raises the record's revision,
// so tabs never overwrite each other's fields. Other tabs are notified of changed records and read them again.
// Without IndexedDB everything stays in memory. If it is full, unwritten changes stay in `waiting`,
// are read from there, and are tried again with the next change.
"use strict";

{

const KINDS = ["conversations", "nodes", "drafts"];

const promised = request => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

// A record with a patch merged in; null to delete it. A patch of a missing record creates it only if it is
// complete (`created`): otherwise another tab has deleted the record. If two tabs follow one stream, the one
// ahead wins. Late parts of a stream that has ended (`ended`) are dropped.
function patched(record, patch) {
  if (patch === null || !record && !patch.created) return null;
  const late = patch.stream?.id === record?.ended || patch.stream?.next < record?.stream?.next;
  if (record && patch.stream && late) return record;
  return {...record, ...patch, revision: (record?.revision ?? 0) + 1};
}

class Store {
  constructor(name) {
    Object.assign(this, {name, db: null, memory: new Map(KINDS.map(kind => [kind, new Map()])), waiting: new Map(),
      writing: new Map(), flushing: null, trouble: "", onNews: () => {}, onTrouble: () => {}, onMessage: () => {}});
    this.channel = typeof BroadcastChannel === "function" ? new BroadcastChannel(name) : null;
    if (this.channel) this.channel.onmessage = ({data}) => data.changed ? this.hear(data.changed) : this.onMessage(data);
  }

  async open() {
    try {
      const request = indexedDB.open(this.name, 1);
      request.onupgradeneeded = () => {
        for (const kind of KINDS) request.result.createObjectStore(kind, {keyPath: "id"});
        request.transaction.objectStore("nodes").createIndex("conversation", "conversation");
      };
      this.db = await promised(request);
      this.db.onversionchange = () => this.db.close();
    } catch (error) {
      this.setTrouble("missing");
    }
  }

  // All records of a kind, or the nodes of one conversation, including those not yet written.
  async read(kind, conversation = null) {
    const mine = record => conversation === null || record.conversation === conversation;
    if (!this.db) return [...this.memory.get(kind).values()].filter(mine);
    const objects = this.db.transaction(kind).objectStore(kind);
    const stored = await promised(conversation === null ? objects.getAll() : objects.index("conversation").getAll(conversation));
    const records = new Map(stored.map(record => [record.id, record]));
    for (const {kind: other, id, patch} of [...this.writing.values(), ...this.waiting.values()]) {
      const record = other === kind ? patched(records.get(id), patch) : null;
      if (record && mine(record)) records.set(id, record);
      else if (other === kind) records.delete(id);
    }
    return [...records.values()];
  }

  // Merges `patch` into a record, or deletes it (null).
  change(kind, id, patch) {
    if (!this.db) return this.remember(kind, id, patch);
    const key = `${kind} ${id}`, earlier = this.waiting.get(key)?.patch;
    if (earlier === null && patch && !patch.created) return;        // it is about to be deleted
    this.waiting.set(key, {kind, id, patch: patch && earlier ? {...earlier, ...patch} : patch});
    this.flushing ??= this.flush().finally(() => { this.flushing = null; });
  }

  remember(kind, id, patch) {
    const records = this.memory.get(kind), record = patched(records.get(id), patch);
    if (record) records.set(id, record);
    else records.delete(id);
  }

  async flush() {
    await null;                     // changes made together are written together
    while (this.waiting.size) {
      const batch = this.writing = this.waiting;
      this.waiting = new Map();
      try {
        await this.write([...batch.values()]);
        this.setTrouble("");
        this.channel?.postMessage({changed: [...batch.values()].map(({kind, id}) => [kind, id])});
      } catch (error) {
        for (const [key, later] of this.waiting) {
          const earlier = batch.get(key);
          batch.set(key, later.patch && earlier?.patch ? {...later, patch: {...earlier.patch, ...later.patch}} : later);
        }
        this.waiting = batch;
        return this.setTrouble("full");
      } finally {
        this.writing = new Map();
      }
    }
  }

  write(changes) {
    const transaction = this.db.transaction(KINDS, "readwrite");
    for (const {kind, id, patch} of changes) {
      const objects = transaction.objectStore(kind);
      objects.get(id).onsuccess = ({target}) => {
        const record = patched(target.result, patch);
        if (!record) objects.delete(id);
        else if (record !== target.result) objects.put(record);
      };
    }
    return new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = transaction.onerror = () => reject(transaction.error);
    });
  }

  // When the page closes, a transaction may not finish in time: unwritten changes go to localStorage, which is
  // synchronous.
  leave() {
    const changes = [...this.writing.values(), ...this.waiting.values()];
    if (!changes.length || !this.db) return;
    try { localStorage.setItem(`${this.name} left ${Tree.newId()}`, JSON.stringify(changes)); } catch (error) { /* too large */ }
  }

  // Writes the changes that closed pages left there.
  recover() {
    for (const key of this.db ? Object.keys(localStorage) : []) {
      if (!key.startsWith(`${this.name} left `)) continue;
      for (const {kind, id, patch} of JSON.parse(localStorage.getItem(key))) this.change(kind, id, patch);
      localStorage.removeItem(key);
    }
  }

  // Another tab has changed these records.
  async hear(changed) {
    if (!this.db) return;
    const stored = this.db.transaction(KINDS);
    const records = await Promise.all(changed.map(([kind, id]) => promised(stored.objectStore(kind).get(id)).catch(() => null)));
    this.onNews(changed.map(([kind, id], i) => {
      const mine = [this.writing, this.waiting].map(changes => changes.get(`${kind} ${id}`)).filter(Boolean);
      return [kind, id, mine.reduce((record, {patch}) => patched(record, patch), records[i] ?? null)];
    }));
  }

  // Sends the other tabs a message that is not stored.
  tell(message) { this.channel?.postMessage(message); }

  setTrouble(trouble) {
    if (trouble === this.trouble) return;
    this.trouble = trouble;
    this.onTrouble();
  }
}

Parts.share({Store});
}
