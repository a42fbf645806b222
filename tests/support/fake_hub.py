"""A server on loopback that plays the HTTP API of the Hugging Face hub with real files."""

import asyncio
import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager

from aiohttp import web


class FakeHub:
    """`repositories` is name -> {file: bytes}. Large files lie at another host, behind a redirect, as at the real hub.

    `requests` are (method, file or address, Range, Authorization). The first `cuts[file]` bytes of each answer with
    that file arrive, then the connection ends: properly (`end`), or with a reset. `sizes` overrides what is told.
    `breaks[file]` are the bytes at which its next answers end, one each. `held[file]` is how many bytes of it are
    sent before `released` is set; `on_bytes(file, start)` is called before each answer with a file.
    """

    def __init__(self, repositories):
        self.repositories, self.gated, self.token = repositories, set(), None
        self.requests, self.cuts, self.reset, self.sizes, self.status = [], {}, False, {}, None
        self.etag = None    # of every large file, instead of its SHA-256
        self.breaks, self.held, self.on_bytes, self.tags = {}, {}, lambda file, start: None, ["gguf"]
        self.held_now, self.released = threading.Event(), threading.Event()
        self.url, self.digests = "", {}
        self.knows_fields = True    # those that a search may ask for
        self.objects = {}           # large files that were uploaded: SHA-256 -> bytes
        self.made = set()           # repositories that a push has made
        self.public = set()         # repositories that everybody may read
        self.commits = []           # (repository, message) of each
        self.on_upload = lambda digest: None    # called before an upload is answered; may return a status

    def digest(self, algorithm, data):
        """In hexadecimal; computed once, since the library gives up after ten seconds without an answer."""
        known = self.digests.setdefault((algorithm, id(data)), [data])     # keeps the data, so that the id stays its own
        if len(known) == 1:
            known.append(hashlib.new(algorithm, data).hexdigest())
        return known[1]

    def revision(self, repository):
        files = sorted((name, self.digest("sha1", data)) for name, data in self.repositories[repository].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()

    def fetched(self):
        """The files whose contents were asked for."""
        return [name for method, name, *_ in self.requests if method == "GET" and not name.startswith("api/")]

    def refuse(self, status, code, message="no"):
        return web.Response(status=status, headers={"X-Error-Code": code, "X-Error-Message": message})

    async def handle(self, http):
        path = http.path.strip("/")
        self.requests.append((http.method, re.sub(r".*?/resolve/[^/]+/", "", path), http.headers.get("Range"),
                              http.headers.get("Authorization")))
        if self.status:
            return web.Response(status=self.status)
        if path.startswith("files/"):
            _, org, name, file = path.split("/", 3)
            return await self.send(http, f"{org}/{name}", file)
        if path == "api/models" and not self.knows_fields and "expand[]" in http.query:
            return self.refuse(400, "Invalid")
        if path == "api/models":
            return web.json_response([
                {"id": name, "modelId": name, "tags": self.tags, "gated": "manual" if name in self.gated else False, "downloads": 7, "private": False}
                for name in self.repositories if http.query.get("search", "").lower() in name.lower()])
        if http.method in ("POST", "PUT"):
            return await self.write(http, path)
        match = re.match(r"api/models/([^/]+/[^/]+)(/tree/main/.+)?$", path) or re.fullmatch(r"([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        repository = match and match[1]
        if self.token and http.headers.get("Authorization") not in (None, f"Bearer {self.token}"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repository not in self.repositories:
            return self.refuse(404 if self.token else 401, "RepoNotFound")
        files = self.repositories[repository]
        if "/tree/main/" in path:       # a folder in it: there is none
            return self.refuse(404, "EntryNotFound")
        if path.startswith("api/"):
            return web.json_response({
                "id": repository, "modelId": repository, "sha": self.revision(repository), "private": repository in self.private, "gated": repository in self.gated,
                "tags": [], "downloads": 0, "siblings": [
                    {"rfilename": name, "size": self.sizes.get(name, len(data)), "blobId": "0" * 40, **self.large(data)} for name, data in files.items()]})
        if repository in self.gated and http.headers.get("Authorization") is None:
            return self.refuse(401, "GatedRepo", "Access to model is restricted")
        if match[2] not in files:
            return self.refuse(404, "EntryNotFound")
        data = files[match[2]]
        headers = {"X-Repo-Commit": self.revision(repository), "ETag": f'"{self.digest("sha1", data)}"'}
        if len(data) < 1 << 20:
            return await self.send(http, repository, match[2], headers)
        return web.Response(status=302, headers=headers | {
            # the real hub also offers its large files by another protocol, which needs a library in Rust and another server
            "X-Xet-Hash": "a" * 64, "X-Xet-Refresh-Route": f"{self.url}/api/models/{repository}/xet-read-token/main",
            "X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{self.etag or self.digest("sha256", data)}"',
            "Location": f"{self.url.replace('localhost', '127.0.0.1')}/files/{repository}/{match[2]}"})

    @property
    def private(self):
        """The repositories that were made here, and not for everybody."""
        return self.made - self.public

    async def write(self, http, path):
        """What a push asks."""
        if http.headers.get("Authorization") != f"Bearer {self.token}" and not path.startswith("uploads/"):
            return self.refuse(401, "", "Invalid username or password.")
        if path.startswith("uploads/"):
            digest, data = path.removeprefix("uploads/"), await http.read()
            if status := self.on_upload(digest):
                return web.Response(status=status)
            assert hashlib.sha256(data).hexdigest() == digest
            self.objects[digest] = data
            return web.Response()
        if path == "api/validate-yaml":
            return web.json_response({"errors": [], "warnings": []})
        if path == "api/repos/create":
            body = await http.json()
            name = f"{body['organization']}/{body['name']}"
            if name in self.repositories:
                return web.json_response({"error": "You already created this model repo", "url": f"{self.url}/{name}"}, status=409)
            self.repositories[name] = {}
            self.made.add(name)
            if not (body.get("private") or body.get("visibility") == "private"):
                self.public.add(name)
            return web.json_response({"url": f"{self.url}/{name}", "name": name})
        if match := re.fullmatch(r"api/models/([^/]+/[^/]+)/preupload/main", path):
            found = [{"path": file["path"], "shouldIgnore": False, "uploadMode": "lfs" if file["size"] > 100_000 else "regular"}
                     for file in (await http.json())["files"]]
            return web.json_response({"files": found})
        if re.fullmatch(r"[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            found = []
            for each in (await http.json())["objects"]:
                actions = {"actions": {"upload": {"href": f"{self.url}/uploads/{each['oid']}"}}}
                found.append(each | ({} if each["oid"] in self.objects else actions))
            return web.json_response({"transfer": "basic", "objects": found})
        match = re.fullmatch(r"api/models/([^/]+/[^/]+)/commit/main", path)
        return await self.commit(match[1], (await http.text()).splitlines()) if match else web.Response(status=404)

    async def commit(self, name, lines):
        files = dict(self.repositories[name])
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "header":
                self.commits.append((name, value["summary"]))
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                del files[value["path"]]
        self.repositories[name] = files
        return web.json_response({"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "hookOutput": ""})

    def large(self, data):
        if len(data) < 1 << 20:
            return {}
        return {"lfs": {"sha256": self.digest("sha256", data), "size": len(data), "pointerSize": 134}}

    async def send(self, http, repository, file, headers=None):
        data, start, ranged = self.repositories[repository][file], 0, False
        whole = len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", http.headers.get("Range", "")):
            start, ranged = int(match[1]), True
            data = data[:int(match[2]) + 1] if match[2] else data
        more = {"Content-Range": f"bytes {start}-{len(data) - 1}/{whole}"} if ranged else {}
        response = web.StreamResponse(status=206 if ranged else 200, headers={**(headers or {}), **more, "Content-Length": str(len(data) - start)})
        self.on_bytes(file, start) if http.method == "GET" else None
        data = self.repositories[repository][file][:len(data)]
        await response.prepare(http)
        if http.method == "HEAD":
            return response
        cut = self.cuts.get(file)
        if self.breaks.get(file):
            cut = max(self.breaks[file].pop(0) - start, 0)
        held = self.held.get(file)
        if held is not None and start < held < len(data):
            await response.write(data[start:held])
            self.held_now.set()
            while not self.released.is_set():
                if http.transport is None or http.transport.is_closing():
                    return response
                await asyncio.sleep(0.01)
            start = held
        await response.write(data[start:] if cut is None else data[start:start + cut])
        if cut is not None and start + cut < len(data):
            if self.reset:
                http.transport.abort()
            else:
                http.transport.close()
        return response


@contextmanager
def fake_hub(**repositories):
    """A FakeHub that runs in a thread; the names of repositories have __ for the slash."""
    hub = FakeHub({name.replace("__", "/"): files for name, files in repositories.items()})
    loop, ready = asyncio.new_event_loop(), threading.Event()

    async def serve():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", hub.handle)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        hub.url = f"http://localhost:{runner.addresses[0][1]}"
        hub.end = asyncio.Event()
        ready.set()
        await hub.end.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield hub
    finally:
        loop.call_soon_threadsafe(hub.end.set)
        thread.join(30)
