"""Drawing answers on a terminal, and reading lines from it."""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import importlib.util
import os
import signal
import sys
import termios
import textwrap
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import visible
from chatlm.front.aio import interruptible, supervised
from chatlm.terminal.calculator import MarkedText, as_code

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import Piece, PromptProgress


TERMINAL_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@functools.cache
def markdown_library() -> tuple[Any, Any]:
    """(parser, rich's class) for models' Markdown: HTML, LaTeX and line breaks are kept as typed."""
    from markdown_it import MarkdownIt
    from rich import markdown
    from rich.text import Text

    class Heading(markdown.Heading):
        LEVEL_ALIGN = dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), "default")

    class Code(markdown.CodeBlock):
        def __rich_console__(self, console, options) -> Iterator[Any]:
            whole = options.max_width == console.width  # not in a list: long lines stay whole, for copying
            code = str(self.text).rstrip("\n")
            overflow = "ignore" if whole else "fold"
            yield Text(code, "cyan", no_wrap=whole, overflow=overflow)

    class Markdown(markdown.Markdown):
        elements = markdown.Markdown.elements | {"heading_open": Heading, "fence": Code}

    rewriting = ["html_block", "html_inline", "entity", "code", "lheading", "reference", "image", "text_join"]
    return MarkdownIt("commonmark").enable("table").disable(rewriting, True), Markdown


def markdown_blocks(text: str, style: str) -> list[tuple[int, Any]]:
    """[(line where a block begins, its rich renderable)]."""
    parser, renderer = markdown_library()
    blocks: list[tuple[int, Any]] = []
    for token in parser.parse(text):
        if token.level == 0 and token.nesting >= 0:
            blocks.append((token.map[0], renderer("", justify="default", style=style, hyperlinks=False)))
        for part in token.children or ():
            if part.type == "softbreak":
                part.type = "hardbreak"
            elif part.type == "text_special":  # a backslash before anything else is LaTeX's
                part.type = "text"
                part.content = part.content if part.content in "*_`#~|>" else part.markup
        blocks[-1][1].parsed.append(token)
    return blocks


class MarkdownWriter:
    """Draws an answer as it arrives. Finished blocks are written once; only the last one is redrawn.

    An answer that continues the text `before` starts with the last block of that text."""

    def __init__(self, console, before: str = "", hint: bool = False):
        from rich import live, segment
        self.console = console
        self.segment = segment
        self.waiting = "..."
        self.hint = "Tab: answer now" if hint else ""  # shown while it thinks
        self.text = ""
        self.style = "dim"
        self.begun = False
        self.marks = MarkedText(as_code, before)
        before = before.translate(TERMINAL_CONTROLS)
        blocks = markdown_blocks(before, "none")
        if blocks:
            self.text = before.split("\n", blocks[-1][0])[-1]
            self.style = "none"
        self.live = live.Live(self, console=console, refresh_per_second=10, transient=True,
                              vertical_overflow="visible")
        self.live.start(refresh=True)

    def progress(self, event: PromptProgress):
        share = min(1.0, event.prompt_tokens_done / max(1, event.prompt_tokens))
        if event.loading is not None:
            self.waiting = f"loading the model, {event.loading:.0%}"
        elif event.queue_position:
            self.waiting = f"number {event.queue_position} in the queue"
        else:
            self.waiting = f"reading the prompt, {share:.0%}"
        self.live.refresh()

    def push(self, event: Piece):
        for delta in event.deltas:
            thinks = delta.kind == "reasoning"
            text = delta.text if thinks else self.marks.push(delta)
            style = "dim" if thinks else "none"
            if style != self.style:
                self._write(markdown_blocks(self.text, self.style), "")
                self.style = style
            self.text += text.translate(TERMINAL_CONTROLS)
            if "\n" in text:
                *blocks, (line, _) = markdown_blocks(self.text, style) or [(0, None)]
                self._write(blocks, self.text.split("\n", line)[-1])

    def _write(self, blocks: list[tuple[int, Any]], rest: str):
        """Write blocks permanently; `rest` is the text after them."""
        lines = self._lines(blocks)
        self.text = rest
        if lines:
            self.begun = True
            self.console.print(self.segment.SegmentLines(lines, new_lines=True), crop=False)

    def _lines(self, blocks: list[tuple[int, Any]]) -> list[list[Any]]:
        """Lines of rich's segments, with one empty line between blocks."""
        separated: list[list[Any]] = []
        for _, drawn in blocks:
            lines = [[*line] for line in self.segment.Segment.split_lines(self.console.render(drawn))]
            full = [i for i, line in enumerate(lines) if any(part.text.strip() for part in line)] or [0]
            gap = [[]] if self.begun or separated else []
            separated += gap + lines[full[0]:full[-1] + 1]
        return separated

    def __rich_console__(self, console, options) -> Iterator[Any]:
        """The last lines that fit on the screen: lines that have scrolled away are never redrawn."""
        lines = self._lines(markdown_blocks(self.text, self.style))
        if self.hint and self.style == "dim" and (lines or self.begun):
            lines.append([self.segment.Segment(self.hint, console.get_style("cyan"))])
        lines = lines[1 - options.size.height:]
        cut = partial(self.segment.Segment.adjust_line_length, length=options.max_width, pad=False)
        drawn = self.segment.SegmentLines(map(cut, lines), new_lines=True)
        yield drawn if lines or self.begun else self.waiting

    def close(self):
        self.live.stop()
        self._write(markdown_blocks(self.text, self.style), "")


class PlainWriter:
    """Prints an answer as it arrives; a model's control characters never reach a terminal."""

    def __init__(self, silent: bool):
        self.silent = silent
        self.last = "\n"
        self.marks = MarkedText()

    def progress(self, event: PromptProgress):
        pass

    def push(self, event: Piece):
        if not self.silent:
            text = event.text  # alone where a program reads it
            if sys.stdout.isatty():
                said = (self.marks.push(delta) for delta in event.deltas if delta.kind != "reasoning")
                text = "".join(said).translate(TERMINAL_CONTROLS)
            print(text, end="", flush=True)
            self.last = text or self.last

    def close(self):
        if not self.last.endswith("\n"):
            print(flush=True)


def block_is_open(text: str) -> bool:
    """Whether a message in \""" is still open: Enter then starts a new line."""
    text = text.strip()
    return text.startswith('"""') and (len(text) < 6 or not text.endswith('"""'))


def state_file(name: str) -> Path:
    """A persistent file that only its owner can read. OSError if it cannot be created."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "chat_server" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    return path


class Terminal:
    """Where `chat` reads and writes: with prompt_toolkit and rich on a terminal, else as plain lines."""

    def __init__(self, settings: Settings, words: list[str]):
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.session = None
        self.console = None
        self.keeps_history = True  # does what is typed go to the file of the history?
        self.as_json = settings.json
        self.lines: asyncio.Queue[str | None] = asyncio.Queue()
        self.work: asyncio.Future | None = None  # started by a key pressed during an answer
        if self.interactive and all(map(importlib.util.find_spec, ("prompt_toolkit", "rich"))):
            self.console = importlib.import_module("rich.console").Console(highlight=False)
            self.session = self._open_session(settings, words)
        else:
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._read_lines, args=(loop,), name="stdin", daemon=True).start()

    def _open_session(self, settings: Settings, words: list[str]):
        from prompt_toolkit import PromptSession, completion, document, history
        from prompt_toolkit.shortcuts import CompleteStyle
        terminal = self
        paths = completion.PathCompleter(expanduser=True)
        commands = completion.WordCompleter(words, sentence=True)

        class Completer(completion.Completer):
            def get_completions(self, typed, event) -> Iterable[Any]:
                name, _, path = typed.text_before_cursor.partition(" ")
                if name in ("/load", "/save", "/read", "/file", "/image", "/know"):
                    return paths.get_completions(document.Document(path), event)
                return commands.get_completions(typed, event)

        class KeptHistory(history.FileHistory):
            def store_string(self, string: str):
                if terminal.keeps_history:
                    super().store_string(string)

        past = history.InMemoryHistory()
        if settings.history:
            try:
                past = KeptHistory(str(state_file("history")))
            except OSError as error:
                self.note(f"history will not be kept: {error}")
        return PromptSession(
            history=past, key_bindings=self._keys(), multiline=True,
            completer=Completer(), complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE, prompt_continuation="  ", reserve_space_for_menu=0)

    @staticmethod
    def _keys():
        """Enter sends, except in an open block; Alt-Enter starts a line; Ctrl-C clears the input or exits."""
        keys = importlib.import_module("prompt_toolkit.key_binding").KeyBindings()

        @keys.add("enter")
        def enter(event):
            buffer = event.current_buffer
            if block_is_open(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("c-c")
        def stop(event):
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt)

        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        return keys

    def _read_lines(self, loop: asyncio.AbstractEventLoop):
        """Runs in a daemon thread: stdin may be a file, a pipe or a terminal, and must not delay exiting."""
        put = partial(loop.call_soon_threadsafe, self.lines.put_nowait)
        # not sys.stdin itself: at exit, Python waits for a thread that reads from it
        own = partial(open, sys.stdin.fileno(), encoding="utf-8", errors="replace", newline="\n")
        with suppress(OSError, RuntimeError), own(closefd=False) as lines:  # RuntimeError: the loop has ended
            for line in lines:
                put(line.removesuffix("\n"))
            put(None)

    async def read(self, default: str = "", leaves: bool = True) -> str | None:
        """The next message; None if the user leaves, by end of file or Ctrl-C. Where Ctrl-C would end the
        chat, the first one only shows a hint."""
        hints = leaves and self.interactive
        while True:
            try:
                if self.session:
                    return await self.session.prompt_async([("bold", "> ")], default=default)
                return await self._read_block()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not hints:
                    return None
                hints = False
                self.note("Press Ctrl-C again or Ctrl-D to leave the chat")

    async def _read_block(self) -> str | None:
        """One line, or several between \"""."""
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        text = await interruptible(self.lines.get())
        while text is not None and block_is_open(text):
            if (line := await interruptible(self.lines.get())) is None:
                self.lines.put_nowait(None)  # return this message first, then the end of file
                break
            text += "\n" + line
        return text

    def note(self, text: str, style: str = "dim"):
        """Print our own lines: between messages on a terminal, else on stderr, as stdout has only answers."""
        if self.console:
            self.console.print(visible(text), style=style, markup=False, emoji=False)
        else:
            print(visible(text), file=sys.stderr, flush=True)

    def row(self, name: str, text: str) -> str:
        """A name and what it is for, which is wrapped at words beside it."""
        if not self.interactive:
            return f"{name:19} {text}"
        width = self.console.width if self.console else os.get_terminal_size(sys.stderr.fileno()).columns
        return textwrap.fill(f"{name:19} {text}", max(width, 32), subsequent_indent=" " * 20,
                             break_long_words=False, break_on_hyphens=False)

    def writer(self, before: str, hint: bool) -> MarkdownWriter | PlainWriter:
        return MarkdownWriter(self.console, before, hint) if self.console else PlainWriter(self.as_json)

    def _run_soon(self, work: Callable[[], Awaitable]):
        self.work = asyncio.ensure_future(supervised("the action of a key", work))

    @contextmanager
    def unechoed(self, on_tab: Callable[[], Awaitable]) -> Iterator[None]:
        """Do not echo what is typed during an answer: it stays queued for the next prompt. Tab acts at once.

        Reading input here would take it from the next prompt, so the terminal turns Tab into a signal."""
        try:
            descriptor = sys.stdin.fileno()
            before = termios.tcgetattr(descriptor)
        except (OSError, ValueError, termios.error):  # not a terminal
            yield
            return
        silent = copy.deepcopy(before)
        loop = asyncio.get_running_loop()
        silent[3] = silent[3] & ~termios.ECHO | termios.NOFLSH  # otherwise a signal drops typed input
        silent[6][termios.VQUIT] = b"\t"
        loop.add_signal_handler(signal.SIGQUIT, self._run_soon, on_tab)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
        try:
            yield
        finally:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
            loop.remove_signal_handler(signal.SIGQUIT)
