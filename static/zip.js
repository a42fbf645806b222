// Reads zip files: the texts of chats in one.
"use strict";

const Zip = (() => {

const {TEXT} = Parts;

const MOST_BYTES = 4e8;           // unpacked; a longer text could not be read at once anyway
const CHATS = /\.jsonl$|(?:^|\/)conversations(?:-\d+)?\.json$/i;

// The texts of the files with chats, in their order: [{name, text}]. Throws an Error with the reason.
async function textsIn(file, name, most = MOST_BYTES) {
  const entries = await listedIn(file).catch(() => null);
  if (!entries) throw new Error(TEXT.damagedZip(name));
  const found = entries.filter(entry => CHATS.test(entry.name));
  if (!found.length) throw new Error(TEXT.emptyZip(name));
  const texts = [];
  let left = most;
  for (const entry of found) {
    const parts = await unpacked(file, entry, left).catch(() => { throw new Error(TEXT.damagedZip(name)); });
    if (!parts) throw new Error(TEXT.hugeZip(name, Math.round(most / 1e6)));
    left -= parts.reduce((size, {length}) => size + length, 0);
    texts.push({name: entry.name, text: await new Blob(parts).text()});
  }
  return texts;
}

const viewOf = async (file, begin, end) => new DataView(await file.slice(begin, end).arrayBuffer());

// The directory at the end of the file: [{name, method, size: packed, at: of its own header}].
async function listedIn(file) {
  const begin = Math.max(0, file.size - 65557), tail = await viewOf(file, begin, file.size);
  let end = tail.byteLength - 22;
  while (tail.getUint32(end, true) !== 0x06054b50) end--;                  // without it, a RangeError
  const count = tail.getUint16(end + 10, true), directory = await viewOf(file, tail.getUint32(end + 16, true), begin + end);
  const entries = [];
  for (let at = 0, i = 0; i < count; i++) {
    if (directory.getUint32(at, true) !== 0x02014b50) throw new RangeError();
    const [length, extra, comment] = [28, 30, 32].map(offset => directory.getUint16(at + offset, true));
    const name = new TextDecoder().decode(new Uint8Array(directory.buffer, at + 46, length));
    entries.push({name, method: directory.getUint16(at + 10, true), size: directory.getUint32(at + 20, true), at: directory.getUint32(at + 42, true)});
    at += 46 + length + extra + comment;
  }
  return entries;
}

// The bytes of an entry in pieces; null if there are more than `most`.
async function unpacked(file, {method, size, at}, most) {
  const header = await viewOf(file, at, at + 30), begin = at + 30 + header.getUint16(26, true) + header.getUint16(28, true);
  const packed = file.slice(begin, begin + size);
  if (header.getUint32(0, true) !== 0x04034b50 || packed.size < size || ![0, 8].includes(method)) throw new RangeError();
  const stream = method ? packed.stream().pipeThrough(new DecompressionStream("deflate-raw")) : packed.stream();
  const parts = [];
  for (let reader = stream.getReader(), left = most; ;) {
    const {done, value} = await reader.read();
    if (done) return parts;
    left -= value.length;
    if (left < 0) { reader.cancel(); return null; }
    parts.push(value);
  }
}

Parts.register({
  strings: {
    damagedZip: name => `${name} is damaged, or no zip file that this page can read.`,
    emptyZip: name => `${name} contains no chats: no .jsonl file and no conversations.json.`,
    hugeZip: (name, mb) => `${name} unpacks to more than ${mb} MB.`,
  },
});

return Object.freeze({textsIn});
})();
