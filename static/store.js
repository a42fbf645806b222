// Storage: conversations, nodes, drafts, projects and prompts in IndexedDB, shared by the tabs of this browser.
//
// A change is a patch: one transaction merges it into the stored record and raises the record's revision,
// so tabs never overwrite each other's fields. Other tabs are notified of changed records and read them again.
// Without IndexedDB everything stays in memory. If it is full, unwritten changes stay in `waiting`,
// are read from there, and are tried again with the next change. A temporary chat is only in the memory of its tab.
"use strict";

const Store = (() => {

const KINDS = ["conversations", "nodes", "drafts", "projects", "prompts"];

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

const name = "chat_server " + Server.PAGE_HOME;
const channel = typeof BroadcastChannel === "function" ? new BroadcastChannel(name) : null;
const memory = new Map(KINDS.map(kind => [kind, new Map()]));     // where there is no database, and of temporary chats
const temporary = new Set();      // ids of temporary chats, of their nodes and drafts

const MOST_WRITTEN = 2000;        // changes in a transaction; the page waits while they are handed over

let db = null;
let waiting = new Map();          // changes that will be written, by kind and id
let writing = new Map();          // those that are being written
let flushing = null;              // a promise while changes are written
let trouble = "";                 // missing: nothing is kept; full: the newest changes are not
let listener = {onNews() {}, onTrouble() {}, onMessage() {}};
let marking = false;              // whether changes are marked as `unsent`, for a server that keeps chats
let follower = () => {};          // what is told of them: (kind, id, patch)

// `onNews`: another tab has changed records, [kind, id, record] each; `onMessage`: it has told something; `onTrouble`: `trouble` has changed.
function listen(to) {
  listener = to;
  if (channel) channel.onmessage = ({data}) => data.changed ? hear(data.changed) : listener.onMessage(data);
}

// Chats are kept on a server too: each change is marked as unsent, and told to `told`.
function mark(on, told = () => {}) {
  marking = on;
  follower = told;
}

async function open() {
  try {
    const request = indexedDB.open(name, 2);
    request.onupgradeneeded = ({oldVersion}) => {
      for (const kind of KINDS.slice(oldVersion ? 3 : 0)) request.result.createObjectStore(kind, {keyPath: "id"});
      if (!oldVersion) request.transaction.objectStore("nodes").createIndex("conversation", "conversation");
    };
    db = await promised(request);
    db.onversionchange = () => db.close();
  } catch (error) {
    setTrouble("missing");
  }
}

// Nothing of a chat with this id is ever written, and no other tab hears of it.
const keepOut = id => { temporary.add(id); };
const isKept = id => !temporary.has(id);

// All records of a kind, or the nodes of one conversation, including those not yet written.
async function read(kind, conversation = null) {
  const mine = record => conversation === null || record.conversation === conversation;
  const unwritten = [...memory.get(kind).values()].filter(mine);
  if (!db) return unwritten;
  const objects = db.transaction(kind).objectStore(kind);
  const stored = await promised(conversation === null ? objects.getAll() : objects.index("conversation").getAll(conversation));
  const records = new Map(stored.map(record => [record.id, record]));
  for (const {kind: other, id, patch} of [...writing.values(), ...waiting.values()]) {
    const record = other === kind ? patched(records.get(id), patch) : null;
    if (record && mine(record)) records.set(id, record);
    else if (other === kind) records.delete(id);
  }
  return [...records.values(), ...unwritten].map(record => Fields.sound(kind, record));
}

// One record; null if there is none.
async function get(kind, id) {
  if (!db || temporary.has(id)) return memory.get(kind).get(id) ?? null;
  const stored = await promised(db.transaction(kind).objectStore(kind).get(id)), key = `${kind} ${id}`;
  const record = [writing, waiting].map(changes => changes.get(key)).filter(Boolean).reduce((record, {patch}) => patched(record, patch), stored ?? null);
  return Fields.sound(kind, record);
}

// Merges `patch` into a record, or deletes it (null). `told`: the server that keeps chats knows it already.
function change(kind, id, given, told = false) {
  if (given?.temporary || temporary.has(given?.conversation)) keepOut(id);
  if (temporary.has(id)) return remember(kind, id, given);
  const marked = marking && !told && kind !== "drafts", patch = marked && given ? {...given, unsent: true} : given;
  if (marked) follower(kind, id, given);
  if (!db) return remember(kind, id, patch);
  const key = `${kind} ${id}`, earlier = waiting.get(key)?.patch;
  if (earlier === null && patch && !patch.created) return;        // it is about to be deleted
  waiting.set(key, {kind, id, patch: patch && earlier ? {...earlier, ...patch} : patch});
  flushing ??= flush().finally(() => { flushing = null; });
}

function remember(kind, id, patch) {
  const records = memory.get(kind), record = patched(records.get(id), patch);
  if (record) records.set(id, record);
  else records.delete(id);
}

async function flush() {
  await null;                     // changes made together are written together
  while (waiting.size) {
    const changes = [...waiting], batch = writing = new Map(changes.slice(0, MOST_WRITTEN));
    waiting = new Map(changes.slice(MOST_WRITTEN));
    try {
      await write([...batch.values()]);
      setTrouble("");
      channel?.postMessage({changed: [...batch.values()].map(({kind, id}) => [kind, id])});
    } catch (error) {
      for (const [key, later] of waiting) {
        const earlier = batch.get(key);
        batch.set(key, later.patch && earlier?.patch ? {...later, patch: {...earlier.patch, ...later.patch}} : later);
      }
      waiting = batch;
      return setTrouble("full");
    } finally {
      writing = new Map();
    }
  }
}

function write(changes) {
  const transaction = db.transaction(KINDS, "readwrite");
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
function leave() {
  const changes = [...writing.values(), ...waiting.values()];
  if (!changes.length || !db) return;
  try { localStorage.setItem(`${name} left ${Tree.newId()}`, JSON.stringify(changes)); } catch (error) { /* too large */ }
}

// Writes the changes that closed pages left there.
function recover() {
  for (const key of db ? Object.keys(localStorage) : []) {
    if (!key.startsWith(`${name} left `)) continue;
    for (const {kind, id, patch} of JSON.parse(localStorage.getItem(key))) change(kind, id, patch);
    localStorage.removeItem(key);
  }
}

// Another tab has changed these records.
async function hear(changed) {
  if (!db) return;
  const stored = db.transaction(KINDS);
  const records = await Promise.all(changed.map(([kind, id]) => promised(stored.objectStore(kind).get(id)).catch(() => null)));
  listener.onNews(changed.map(([kind, id], i) => {
    const mine = [writing, waiting].map(changes => changes.get(`${kind} ${id}`)).filter(Boolean);
    return [kind, id, Fields.sound(kind, mine.reduce((record, {patch}) => patched(record, patch), records[i] ?? null))];
  }));
}

// Sends the other tabs a message that is not stored.
const tell = message => { channel?.postMessage(message); };

function setTrouble(found) {
  if (found === trouble) return;
  trouble = found;
  listener.onTrouble();
}

return Object.freeze({name, channel, listen, mark, keepOut, isKept, open, read, get, change, leave, recover, tell, get flushing() { return flushing; }, get trouble() { return trouble; }});
})();
