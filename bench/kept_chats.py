#!/usr/bin/env python3
"""Chats that a server keeps for many owners: what they cost those who ask it, and whether anything is lost when it is killed.

    python bench/kept_chats.py [--owners 1000] [--chats 200] [--devices 50] [--seconds 60] [--kills 200] [--minutes 10] [--small]

1. The database is filled: owners with so many chats of a question and an answer of about 300 characters.
2. Load. Devices of different owners wait for news (`GET /v1/chats/changes?wait=20`); a writer changes one of their chats every 50 ms, and each
   device says when it has heard of it. Beside them /livez is asked every 20 ms, and one answer after the other is streamed: the gaps between
   its events count. First the same without devices and writer, to compare.
3. Searches of one owner with 60 MB of messages: words that no chat has, and words that many have.
4. Kills. A client writes messages one after the other, and the server is killed (SIGKILL) at a random moment. The next server must have all
   that was acknowledged, and at most what was under way besides. Ends after --minutes.

--small is for tests: 20 owners, 5 chats, 5 devices, 3 s, 2 MB, 2 kills. Without MODEL the default model answers.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import secrets
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from chatlm.common.hub.default_model import fetch_default_model
from chatlm.front.annexes.chats.changes import Changing
from chatlm.front.annexes.chats.records import change_of
from chatlm.front.server.access import space_of
from servers import free_port, our_server

WRITE_S, LIVEZ_S = 0.05, 0.02
WORDS = 20_000
CHARACTERS = 300


def an_id(number):
    return f"{number:032x}"


def header_of(owner):
    return f"owner-{owner:05}-of-the-load-bench"


def shown(times_s, digits=1):
    """p50 / p99 / the longest, in ms."""
    ordered = sorted(times_s)
    if not ordered:
        return "-"
    points = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], ordered[-1]
    return " / ".join(f"{1e3 * point:.{digits}f}" for point in points) + f" ms of {len(ordered):,}"


def vocabulary(source):
    return ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(3, 9))) for _ in range(WORDS)]


def text_of(source, words, characters):
    return " ".join(source.choices(words, k=characters // 7))


class Filled:
    """Writes records as the server would, without its requests."""

    def __init__(self, path):
        self.connection = sqlite3.connect(path)
        self.connection.execute("PRAGMA synchronous = OFF")
        self.changing = {}      # by owner

    def add(self, owner, kind, name, body):
        if owner not in self.changing:
            self.changing = {owner: Changing(self.connection, owner, int(time.time()))}
        self.changing[owner].create(change_of(kind, name, 0, body))

    def close(self):
        self.connection.commit()
        self.connection.close()


def fill(path, owners, chats, megabytes):
    """`owners` with `chats` each; another, the number `owners`, has so many megabytes in chats of twenty messages."""
    source = random.Random(1)
    words = vocabulary(source)
    filled = Filled(path)
    number = 0
    for owner in range(owners):
        name = space_of(header_of(owner))
        for _ in range(chats):
            number += 1
            chat, question = an_id(number * 10), an_id(number * 10 + 1)
            filled.add(name, "chat", chat, {"created": 1, "updated": number, "title": text_of(source, words, 40)})
            filled.add(name, "node", question, {"created": 1, "conversation": chat, "role": "user",
                                                           "content": text_of(source, words, CHARACTERS)})
            filled.add(name, "node", an_id(number * 10 + 2), {
                "created": 2, "conversation": chat, "parent": question, "role": "assistant",
                "content": text_of(source, words, CHARACTERS)})
    name = space_of(header_of(owners))
    for _ in range(int(megabytes * 1e6 / 30_000)):
        number += 1
        chat = an_id(number * 100)
        filled.add(name, "chat", chat, {"created": 1, "updated": number, "title": text_of(source, words, 40)})
        for place in range(20):
            node = {"created": 1, "conversation": chat, "role": "user", "content": text_of(source, words, 1550)}
            filled.add(name, "node", an_id(number * 100 + place + 1), node)
    filled.close()
    return words


class Client:
    """One connection to the server, for one owner."""

    def __init__(self, port, owner=None):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self.headers = {"Content-Type": "application/json"} | ({} if owner is None else {"X-Chat-Space": header_of(owner)})

    def ask(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body)
        self.connection.request(method or ("GET" if body is None else "POST"), path, data, self.headers)
        response = self.connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise RuntimeError(f"{path}: {response.status} {text[:300]}")
        return json.loads(text) if text[:1] in b"{[" else text


class Load:
    """What runs at the same time, until `over` is set."""

    def __init__(self, port, seconds):
        self.port = port
        self.over = threading.Event()
        self.times = {name: [] for name in ("livez", "gaps", "news", "writes")}
        self.sent = {}          # title -> when it was sent
        self.seconds = seconds
        self.failures = []

    def run(self, *works):
        def kept(work):
            try:
                work()
            except Exception as error:
                self.failures.append(repr(error))
        threads = [threading.Thread(target=kept, args=[work]) for work in works]
        for thread in threads:
            thread.start()
        time.sleep(self.seconds)
        self.over.set()
        for thread in threads:
            thread.join()
        return self.times

    def livez(self):
        client = Client(self.port)
        while not self.over.wait(LIVEZ_S):
            began_s = time.perf_counter()
            client.ask("/livez")
            self.times["livez"].append(time.perf_counter() - began_s)

    def answers(self):
        while not self.over.is_set():
            client = Client(self.port)
            body = {"messages": [{"role": "user", "content": "Tell me a long story about the sea."}], "stream": True, "max_tokens": 200,
                    "ignore_eos": True}
            client.connection.request("POST", "/v1/chat/completions", json.dumps(body), client.headers)
            response = client.connection.getresponse()
            last_s = None
            while (line := response.readline()) and not self.over.is_set():
                if line.startswith(b"data: {"):
                    now_s = time.perf_counter()
                    if last_s is not None:
                        self.times["gaps"].append(now_s - last_s)
                    last_s = now_s
            client.connection.close()

    def device(self, owner):
        def work():
            client = Client(self.port, owner)
            rev = 0
            while True:     # as a page that opens: first all that there is
                page = client.ask(f"/v1/chats/changes?after={rev}")
                rev = page["rev"]
                if not page["has_more"]:
                    break
            while not self.over.is_set():
                page = client.ask(f"/v1/chats/changes?after={rev}&wait=2")
                rev = page["rev"] or rev
                for row in page["data"]:
                    sent_s = self.sent.get((row["record"] or {}).get("title"))
                    if sent_s is not None:
                        self.times["news"].append(time.perf_counter() - sent_s)
        return work

    def writer(self, owners, chats):
        source = random.Random(3)
        clients = {owner: Client(self.port, owner) for owner in owners}
        number = 0
        while not self.over.wait(WRITE_S):
            number += 1
            owner = source.choice(owners)
            chat = an_id((owner * chats + 1 + source.randrange(chats)) * 10)
            title = f"Title {number}"
            self.sent[title] = began_s = time.perf_counter()
            answer = clients[owner].ask("/v1/chats/changes", {"changes": [
                {"kind": "chat", "id": chat, "base": 0, "patch": {"title": title}}]})
            self.times["writes"].append(time.perf_counter() - began_s)
            if answer["data"][0]["state"] != "stored":
                raise RuntimeError(answer)


def searched(port, owner, words):
    client = Client(port, owner)
    for name, question in (("in no chat", "zzqqzz"), ("two in no chat", "zzqqzz yyqqyy"), ("one in no chat", f"{words[7]} zzqqzz"),
                           ("in many", f"{words[5]} {words[77]}")):
        times_s = []
        for _ in range(7):
            began_s = time.perf_counter()
            client.ask(f"/v1/chats/search?q={question.replace(' ', '+')}")
            times_s.append(time.perf_counter() - began_s)
        print(f"search, {name}: {shown(times_s, 0)}", flush=True)


def killed_at_random(model, path, kills, minutes):
    """(kills, messages acknowledged). Raises AssertionError if one is lost."""
    source = random.Random(7)
    until_s = time.monotonic() + minutes * 60
    owner, chat = 70_000, an_id(1)
    last = done = 0
    while done < kills and time.monotonic() < until_s:
        port = free_port()
        with our_server(model, "--database", path, "--host", "127.0.0.1", "--port", port, port=port) as server:
            client = Client(port, owner)
            client.ask("/v1/chats/changes", {"changes": [{"kind": "chat", "id": chat, "patch": {"created": 1, "title": "Kept"}}]})
            there = {int(node["id"], 16) for node in client.ask(f"/v1/chats/{chat}")["nodes"]}
            missing = set(range(2, last + 2)) - there
            assert not missing, f"after {done} kills {len(missing)} acknowledged messages are lost: {sorted(missing)[:5]}"
            assert len(there) <= last + 1, "more is there than was sent"
            last = max(last, len(there))
            killer = threading.Timer(source.uniform(0.0, 0.4), lambda: os.kill(server.process.pid, signal.SIGKILL))
            killer.start()
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                while True:
                    node = {"created": 1, "conversation": chat, "role": "user", "content": secrets.token_hex(source.choice([8, 2000]))}
                    [row] = client.ask("/v1/chats/changes", {"changes": [{"kind": "node", "id": an_id(last + 2), "patch": node}]})["data"]
                    assert row["state"] == "stored", row
                    last += 1
            killer.join()
        done += 1
        if last > 9_000:        # of a chat's 10,000 messages
            break
    return done, last


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    for name, usual in (("owners", 1000), ("chats", 200), ("devices", 50), ("seconds", 60), ("megabytes", 60), ("kills", 200)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--minutes", type=float, default=10.0, help="of kills")
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    if chosen.small:
        chosen.owners, chosen.chats, chosen.devices, chosen.seconds, chosen.megabytes, chosen.kills = 20, 5, 5, 3, 2, 2
    model = chosen.model or fetch_default_model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        with our_server(model, "--database", path):
            pass                # makes the tables
        began_s = time.monotonic()
        words = fill(path, chosen.owners, chosen.chats, chosen.megabytes)
        print(f"{chosen.owners:,} owners with {chosen.chats} chats: {path.stat().st_size / 1e6:,.0f} MB, filled in "
              f"{time.monotonic() - began_s:.0f} s; load {os.getloadavg()[0]:.1f}", flush=True)
        port = free_port()
        with our_server(model, "--database", path, "--host", "127.0.0.1", "--port", port, port=port) as server:
            print(f"ready after {server.ready_s:.1f} s", flush=True)
            owners = random.Random(2).sample(range(chosen.owners), chosen.devices)
            for name, devices in (("alone", []), (f"{chosen.devices} devices", owners)):
                load = Load(port, chosen.seconds)
                before_s = server.front.cpu_times()
                works = [load.livez, load.answers, *map(load.device, devices)]
                if devices:
                    works.append(lambda load=load: load.writer(owners, chosen.chats))
                times = load.run(*works)
                after_s = server.front.cpu_times()
                busy_s = after_s.user + after_s.system - before_s.user - before_s.system
                print(f"{name}: /livez {shown(times['livez'])}; between tokens {shown(times['gaps'])}; a change {shown(times['writes'])}; until a device "
                      f"has it {shown(times['news'])}; the front's processor {100 * busy_s / chosen.seconds:.0f} %", flush=True)
                assert not load.failures, load.failures[:3]
            searched(port, chosen.owners, words)
        done, last = killed_at_random(model, Path(folder) / "killed.db", chosen.kills, chosen.minutes)
        print(f"{done} kills, {last:,} acknowledged messages, none lost; load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
