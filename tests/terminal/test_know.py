"""/know of the terminal: folders become collections of a real server, and its requests ask them."""

import os

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import ChatServerError
from chatlm.common.messages.requests import Message
from chatlm.terminal.chat import new_request
from chatlm.terminal.knowing import Knowing, passages_line
from chatlm.terminal.remote import RemotePool
from fake_pool import FakePool
from real_server import server


@pytest.fixture(scope="module")
def url(tmp_path_factory, nanochat_fixtures, default_embedder_path):
    folder = tmp_path_factory.mktemp("know")
    (folder / "fixed").mkdir()
    (folder / "fixed" / "valve.md").write_text("Turn the valve left.")
    with server(nanochat_fixtures / "gen5", "--embedder", "--database", folder / "store.db",
                "--knowledge", f"manuals={folder / 'fixed'}") as (_, at):
        yield at


class Passages(str):
    """What follows /passages."""


async def told(url, *values):
    """What /know says, what requests then have, and the collections that the server has."""
    lines = []
    pool = RemotePool(Settings(command="chat", url=url))
    await pool.start()
    try:
        knowing = Knowing(pool, lines.append)
        for value in values:
            if isinstance(value, Passages):
                knowing.limit(value)
            else:
                await knowing.take(str(value))
        request = new_request(Settings(), messages=(Message("user", "Hi"),))
        bodies = [body.get("knowledge") for _, body in pool._routes(request)]
        rows = await knowing._rows("v1/vector_stores")
        files = {row["name"]: {file["filename"]: file["id"] for file in await knowing._rows(
            f"v1/vector_stores/{row['id']}/files")} for row in rows}
        return "\n".join(lines), bodies, {row["name"]: row["id"] for row in rows}, files
    finally:
        await pool.close()


async def test_a_folder_becomes_a_collection_and_only_what_changed_is_brought_again(url, tmp_path):
    folder = tmp_path / "cats"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("Tibbles sleeps.")
    (folder / "deep" / "b.md").write_text("# Chip\n\nIt has the number 5521.")
    (folder / 'ü "q" 100%20.txt').write_text("Odd names are kept.")
    (folder / "odd.bin").write_bytes(bytes(range(256)))
    os.symlink("/etc/passwd", folder / "link.txt")
    said, bodies, stores, files = await told(url, folder)
    assert bodies == [{"stores": [stores["cats"]]}] * 2
    assert "cats: 3 files, 1 failed" in said and "link.txt: it is a link" in said and "odd.bin: " in said
    assert {*files["cats"]} == {"a.txt", "deep/b.md", "odd.bin", 'ü "q" 100%20.txt'}
    (folder / "a.txt").write_text("Tibbles is awake.")
    _, _, _, after = await told(url, folder)
    assert after["cats"]["deep/b.md"] == files["cats"]["deep/b.md"]
    assert after["cats"]["a.txt"] != files["cats"]["a.txt"] and {*after["cats"]} == {*files["cats"]}


async def test_names_off_and_what_is_wrong(url, tmp_path):
    said, bodies, stores, _ = await told(url, "", "manuals")
    assert "  manuals: " in said and bodies == [{"stores": [stores["manuals"]]}] * 2
    said, bodies, _, _ = await told(url, "manuals", "off")
    assert bodies == [None, None] and said.endswith("The chat asks no collection: /know FOLDER or /know NAME")
    with pytest.raises(ValueError, match=r"is no folder here, and no collection of the server \(it has .*did you mean manuals"):
        await told(url, "manual")
    with pytest.raises(ValueError, match="`chat --url` talks to one"):
        await Knowing(FakePool(), print).take("manuals")


async def test_how_many_passages_are_read(url):
    said, bodies, stores, _ = await told(url, "manuals", Passages("3 0.25"))
    assert bodies == [{"stores": [stores["manuals"]], "max_num_results": 3, "score_threshold": 0.25}] * 2
    assert said.endswith("at most 3 passages with a score of at least 0.25 are read.")
    said, bodies, _, _ = await told(url, Passages("7"), "manuals", Passages("off"), Passages(""))
    assert bodies == [{"stores": [stores["manuals"]]}] * 2 and said.endswith("as many passages are read as are worth it.")
    for wrong in ("0", "51", "x", "3 2", "3 x", "-1", "0.5"):
        with pytest.raises(ValueError, match="/passages N, from 1 to 50"):
            await told(url, Passages(wrong))


async def test_a_folder_called_as_a_followed_one_makes_its_own(url, tmp_path):
    """That of --knowledge can be asked by all and changed by none."""
    (tmp_path / "manuals").mkdir()
    (tmp_path / "manuals" / "mine.txt").write_text("Mine.")
    said, bodies, stores, files = await told(url, tmp_path / "manuals")
    [asked] = bodies[0]["stores"]
    assert "manuals: 1 file" in said and len(stores) >= 1
    lines = []
    pool = RemotePool(Settings(command="chat", url=url))
    await pool.start()
    try:
        store = await Knowing(pool, lines.append)._ask("GET", f"v1/vector_stores/{asked}")
    finally:
        await pool.close()
    assert not store["read_only"]


async def test_a_server_without_collections_says_so(tiny_url):
    with pytest.raises(ChatServerError, match="--database"):
        await told(tiny_url, "manuals")


def test_what_was_read_fits_a_line():
    passages = [{"index": number, "filename": f"{number}.pdf", "page": number % 2 or None}
                for number in range(1, 9)]
    line = passages_line({"read": 8, "of": 1234, "passages": passages})
    assert line == ("8 of 1,234 parts were read: [1] 1.pdf, page 1; [2] 2.pdf; [3] 3.pdf, page 1; [4] 4.pdf; "
                    "[5] 5.pdf, page 1; and 3 more")
    assert passages_line({"read": 0, "of": 3, "passages": []}) == "0 of 3 parts were read"
