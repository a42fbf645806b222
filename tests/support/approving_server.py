"""A server of its own process with a scripted model and a real tool, to be killed:
`approving_server.py FOLDER DATABASE`.

It writes its URL into FOLDER/url. The model always calls `fake__slow`, which waits for FOLDER/gate. DATABASE
may be empty."""

import asyncio
import sys
from pathlib import Path

from tool_rounds import calls, tool_place


async def run(folder, database):
    more = {"database": database} if database else {}
    text = calls(("fake__slow", {"path": str(folder / "gate")}))
    async with tool_place(folder, text, "It is there.", allowed=(), **more) as at:
        (folder / "url.part").write_text(at.url)
        (folder / "url.part").rename(folder / "url")
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1]), sys.argv[2]))
