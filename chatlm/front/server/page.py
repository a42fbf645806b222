"""The page's files, sent from memory."""

from __future__ import annotations

import gzip
import hashlib
import html
import mimetypes
import re
from collections.abc import Mapping

from aiohttp import web

from chatlm.front.api.errors import NANOCHAT
from chatlm.front.server.routes import Route


MISSING = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>Not found</title></head>
<body><main><h1>Not found</h1><p>There is no {path} here.</p>
<p><a href="{home}">Open the chat</a></p></main></body></html>
"""


def missing_page(http: web.Request, home: str) -> web.Response | None:
    """What a browser gets in place of the JSON of a 404: a page with a link to the chat."""
    if http.method != "GET" or "text/html" not in http.headers.get("Accept", ""):
        return None
    return web.Response(text=MISSING.format(path=html.escape(http.path), home=html.escape(home)), status=404,
                        content_type="text/html")


POLICY = "Content-Security-Policy"
# Files that the page shows in a frame; nobody else may. The policy is in addition to the one within them.
FRAMES = ("preview.html", "javascript.html")
FRAME_POLICY = "sandbox allow-scripts; frame-ancestors 'self'"


class PageFiles:
    """The page's files, in memory: a bundle has no folder to send them from, and no path is ever built from
    a request. Scripts and styles are compressed once, at the first request for them."""

    COMPRESSED = (".js", ".css")

    def __init__(self, files: Mapping[str, bytes]):
        self.files = files
        self.compressed = {}
        self.tags = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in files.items()}

    async def handle_index(self, http: web.Request, name: str = "index.html") -> web.Response:
        if (page := self.files.get(name)) is None:
            return web.Response(text="chat_server is running, but its page is missing (no static/).\n")
        up = b"../" if name != "index.html" and http.path.endswith("/") else b""
        page = page.replace(b"<head>", b'<head>\n<base href="%sstatic/">' % up, 1)
        return web.Response(body=page, content_type="text/html", charset="utf-8")

    async def handle_usage(self, http: web.Request) -> web.Response:
        return await self.handle_index(http, "usage.html")

    async def handle_file(self, http: web.Request) -> web.Response:
        name = http.match_info["name"]
        if (body := self.files.get(name)) is None:
            raise web.HTTPNotFound
        tag = self.tags[name]
        headers = {"Vary": "Accept-Encoding"}
        if name.endswith(self.COMPRESSED) and re.search(r"\bgzip\b(?!;q=0)",
                                                        http.headers.get("Accept-Encoding", "")):
            if name not in self.compressed:
                self.compressed[name] = gzip.compress(body)
            body = self.compressed[name]
            tag = f"{tag}-gzip"
            headers["Content-Encoding"] = "gzip"
        headers["ETag"] = f'"{tag}"'
        if name in FRAMES:
            headers[POLICY] = FRAME_POLICY
        if headers["ETag"] in http.headers.get("If-None-Match", ""):
            return web.Response(status=304, headers=headers)
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return web.Response(body=body, headers=headers, content_type=content_type)


PAGE_ROUTES: tuple[Route[PageFiles], ...] = (
    Route("GET", "/", NANOCHAT, PageFiles.handle_index, "the page", open=True),
    Route("GET", "/static/{name:.+}", NANOCHAT, PageFiles.handle_file, "its files", open=True,
          quiet=True),
    Route("GET", "/usage", NANOCHAT, PageFiles.handle_usage, "a page that shows what each API key used",
          open=True),
)
