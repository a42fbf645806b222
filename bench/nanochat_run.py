"""A training run of nanochat's own code, served while it trains: does our server say of its checkpoints what nanochat says?

    python3 -m venv NV && NV/bin/pip install torch==2.13.0
    NV/bin/pip install rustbpe tiktoken pyarrow filelock numpy pyyaml jinja2 requests
    git clone URL NANOCHAT          (karpathy/nanochat)
    python bench/nanochat_run.py NANOCHAT --python NV/bin/python [--steps 200] [--text FOLDER ...] [--out BASE]

This program needs the server's Python with pyarrow and PyYAML; nanochat's scripts run as processes of --python, on the CPU, in float32 and
without torch.compile, and need neither wandb nor a network: bench/nanochat_data.py writes what they would download. tok_train, base_train,
chat_sft and chat_rl run one after the other, while a server with --watch serves their checkpoints; each is asked as soon as it is there. Then
bench/nanochat_upstream.py asks nanochat's code the same, and a table compares:

- bits per byte of the validation shard: evaluate_bpb, and what base_train wrote beside the checkpoint, with `eval --suite bpb` (at most BPB_LIMIT apart)
- CORE and the chat tasks, item by item, with `eval`; an item that NEAR_TIE nats decide may differ
- the likeliest tokens of Engine.generate, those that its calculator forced, and results of its calculator. An answer is compared to the
  first token that leads the runner-up by at most CLOSE, in logits: other arithmetic may choose the other

It ends with 1 if anything differs by more than that, with 2 and one line if it cannot run. It takes 3 to 5 minutes on two cores that do other
things too, and is ended after --minutes. Everything is seeded. A checkout of the branch experiment_refactor writes its own layout of folders.

--base-only trains a base model into --out and compares nothing: a checkpoint for bench/quality.py that has seen real text, for example

    python bench/nanochat_run.py NANOCHAT --base-only --out BASE --width 256 --head-dim 128 --length 512 --vocabulary 4096 --steps 500 --text /usr/share/doc
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from servers import NotReady, our_server

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

BPB_LIMIT, NEAR_TIE, CLOSE = 2e-5, 1e-3, 1e-3
ROWS = 16                               # of the validation shard
TOKENS = 40                             # of an answer, at most
REFERENCE_TOKENS = 2**19                # of a batch, for which nanochat's learning rates are made
LR_SCALE = 0.6                          # of these rates: nanochat's own rule would hardly move a small batch's model in so few steps
PACKAGES = ("torch", "rustbpe", "tiktoken", "pyarrow", "filelock", "numpy", "yaml", "jinja2", "requests")


def talk(*texts, system=None):
    """The messages of a conversation: a user's, an assistant's, and so on."""
    said = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return [*[{"role": "system", "content": system}] * bool(system), *said]


TEXTS = ("The capital of France is", "The server answers", "If the cache is full, then", "python chat_server.py --watch", "é and 1,024: ",
         "A token is a piece of text. " * 20)      # the last is longer than the window of the short layers
CHATS = (*map(talk, ("What is 12+30?", "What is 7*8?", "What is 50-9?", "What is 41+41?", "How many a are in banana?", "How many r are in strawberry?",
                     "What is 3*19?", "Hello", "The server answers requests of")),
         talk("What is 2+2?", "4", "What is 15+4?"), talk("What is 31-6?", system="Be brief."))
TASKS, MOST = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K"), 12       # chat tasks, and items of each
EXPRESSIONS = ("12+30", "7*8", "50-9", "1,200*3", "12/5", "1/3", "7//2", "2**3", "1/0", "(1+2)*(3-4)", "-5+2", "1.5*4", ".5+.5", "5-", "", "abc", "03",
               "'banana'.count('a')", "\"a'b\".count(\"'\")", "'a' + 'b'", "'banana'.upper()", "'é'.count('é')", "2 + 3", "(((1)))", "1_000+1", "0x10+1",
               "()", "1e5", "'file'.count('f')", " 1", "1\n", "31\n## 31")
STAGES = {"base": "base", "chatsft": "sft", "sft": "sft", "chatrl": "rl", "rl": "rl"}     # by the names of folders, as they are trained


class CannotRun(Exception):
    """One line that says why."""


class Checkpoint(NamedTuple):
    stage: str
    step: int       # of no other stage

    def __str__(self):
        return f"{self.stage} {self.step}"


# 1. the comparison -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """What nanochat and our server say of one thing."""

    what: str
    upstream: str
    ours: str
    result: str
    fine: bool


def compared_numbers(what, upstream, ours, limit):
    apart = abs(upstream - ours)
    return Row(what, f"{upstream:.6f}", f"{ours:.6f}", f"{apart:.1e} apart", apart <= limit)


def digits_of(items):
    return "".join(str(int(items[number]["correct"])) for number in sorted(items))


def compared_items(what, upstream, ours):
    """upstream: a digit for each item, 1 if it is right. ours: {item: what `eval` keeps of it}"""
    digits, margins = digits_of(ours), [ours[number]["margin"] for number in sorted(ours)]
    differ = [number for number, (one, other) in enumerate(zip(upstream, digits)) if one != other]
    near = [number for number in differ if margins[number] is not None and margins[number] <= NEAR_TIE]
    count = min(len(upstream), len(digits))
    result = f"{count - len(differ)} of {max(len(upstream), len(digits))} equal" + f", {len(near)} near ties" * bool(near)
    return Row(what, f"{upstream.count('1')} right", f"{digits.count('1')} right", result, len(digits) == len(upstream) > 0 and near == differ)


def begin_alike(answer, tokens):
    """(with how many tokens nanochat's answer and ours begin alike, whether they end so because other arithmetic may choose the next one)"""
    theirs = answer["tokens"]
    same = next((place for place, (one, other) in enumerate(zip(theirs, tokens)) if one != other), min(len(theirs), len(tokens)))
    return same, same < min(len(theirs), len(tokens)) and answer["leads"][same] <= CLOSE and not answer["forced"][same]


def compared_answers(what, upstream, ours):
    """upstream: the answers of bench/nanochat_upstream.py. ours: their tokens"""
    alike = [begin_alike(answer, tokens) for answer, tokens in zip(upstream, ours, strict=True)]
    equal, ties = sum(same for same, _ in alike), sum(tie for _, tie in alike)
    result = f"{equal} of {sum(len(answer['tokens']) for answer in upstream)} equal" + f", {ties} answers to a near tie" * bool(ties)
    whole = all(tie or answer["tokens"] == tokens for answer, tokens, (_, tie) in zip(upstream, ours, alike))
    return Row(what, f"{sum(len(answer['tokens']) for answer in upstream)} tokens", f"{sum(map(len, ours))} tokens", result, equal > 0 and whole)


def compared_forced(what, upstream, ours):
    """The tokens that the calculator forced into these answers; there must be some."""
    wanted, equal = 0, 0
    for answer, tokens in zip(upstream, ours, strict=True):
        same, tie = begin_alike(answer, tokens)
        forced = [place for place, yes in enumerate(answer["forced"]) if yes and not (tie and place > same)]
        wanted, equal = wanted + len(forced), equal + sum(place < same for place in forced)
    result = f"{equal} of {wanted} equal" if wanted else "the model never called it: more --steps"
    return Row(what, f"{wanted} tokens", f"{equal} tokens", result, 0 < wanted == equal)


def compared_lists(what, upstream, ours):
    differ = [f"{name!r}: {upstream.get(name)!r}, {ours.get(name)!r}" for name in dict.fromkeys([*upstream, *ours]) if upstream.get(name) != ours.get(name)
              or (name in upstream) != (name in ours)]
    return Row(what, f"{len(upstream)}", f"{len(ours)}", "; ".join(differ) or "equal", not differ)


def table(rows):
    lines = ["| what | nanochat | ours | |", "|---|---|---|---|"]
    return lines + [f"| {row.what} | {row.upstream} | {row.ours} | {'' if row.fine else '**DIFFERENT** '}{row.result} |" for row in rows]


# 2. nanochat -------------------------------------------------------------------------------------------------------------


class Nanochat:
    """nanochat's code, each script in a process of its own."""

    def __init__(self, options, base):
        self.checkout, self.python, self.base, self.options = options.checkout, options.python, base, options
        self.layout = layout_of(options.checkout)
        self.ends_s = time.monotonic() + 60 * options.minutes
        self.logs = base / "logs"
        self.tag = f"d{options.depth}"

    @property
    def env(self):
        """For nanochat: the base folder, the CPU alone, and no way to the network."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("NANOCHAT_")}
        return kept | {"NANOCHAT_BASE_DIR": str(self.base), "NANOCHAT_EXPERIMENT": "bench", "NANOCHAT_DTYPE": "float32", "CUDA_VISIBLE_DEVICES": "",
                       "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": f"{self.logs}{os.pathsep}{self.checkout}", "PYTHONUNBUFFERED": "1",
                       "GOMP_SPINCOUNT": "1000",                        # otherwise other programs slow it down 20-fold
                       **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"), "no_proxy": "127.0.0.1"}

    @property
    def env_of_ours(self):
        """The same for our server and its commands."""
        env = {name: value for name, value in self.env.items() if name != "PYTHONPATH"}
        return env | ({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {})

    @property
    def commit(self):
        """Of the checkout, if git knows it."""
        done = subprocess.run(["git", "-C", self.checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        return done.stdout.strip() or "of no commit"

    def prepare(self):
        self.logs.mkdir()
        (self.logs / "wandb.py").write_text('"""Stands in for the package, which nanochat imports and, without --run, never calls."""\n')
        if self.layout == "experiments":
            self.run("nanochat.experiment")
        self.run("scripts.tok_train", vocab_size=self.options.vocabulary)

    @contextlib.contextmanager
    def started(self, module, **flags):
        """A script that runs meanwhile. CannotRun if it fails."""
        words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
        log = self.logs / f"{module.rpartition('.')[2]}.log"
        with log.open("w") as output:
            process = subprocess.Popen([self.python, "-m", module, *words], cwd=self.checkout, env=self.env, stdin=subprocess.DEVNULL, stdout=output,
                                       stderr=subprocess.STDOUT, start_new_session=True)
        try:
            yield process
            self.ended(process, module, log)
        finally:
            end_group(process)

    def ended(self, process, name, log):
        try:
            code = process.wait(max(self.ends_s - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            raise CannotRun(f"{name} still ran after --minutes {self.options.minutes:g}") from None
        if code:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            raise CannotRun(f"nanochat's {name} ended with {code}: {''.join(last)}")

    def run(self, module, **flags):
        print(f"{module} ...", flush=True)
        with self.started(module, **flags):
            pass

    def trainings(self):
        """The scripts that train, with their flags, in order. No step is of two stages."""
        o, steps = self.options, self.options.steps
        batch = o.batch * o.length
        scale = LR_SCALE / (batch / REFERENCE_TOKENS) ** 0.5
        yield "scripts.base_train", dict(
            depth=o.depth, aspect_ratio=o.width // o.depth, head_dim=o.head_dim, max_seq_len=o.length, device_batch_size=o.batch, total_batch_size=batch,
            num_iterations=steps, save_every=steps // 2, eval_every=steps // 2, eval_tokens=ROWS * o.length, core_metric_every=-1, sample_every=-1,
            warmup_steps=10, embedding_lr=0.3 * scale, unembedding_lr=0.008 * scale, matrix_lr=0.02 * scale, scalar_lr=0.5 * scale, device_type="cpu")
        if o.base_only:
            return
        yield "scripts.chat_sft", dict(
            num_iterations=steps * 3 // 4 + 1, eval_every=-1, eval_tokens=batch, chatcore_every=-1, mmlu_epochs=1, gsm8k_epochs=steps, embedding_lr=0.2,
            unembedding_lr=0.004, matrix_lr=0.02, device_type="cpu")
        yield "scripts.chat_rl", dict(
            device_batch_size=4, num_samples=4, examples_per_step=24, max_new_tokens=32, save_every=3, eval_examples=2, device_type="cpu")

    def written(self):
        """The checkpoints on disk and their files, as they were trained."""
        found = {}
        for path in self.base.rglob("model_*.pt"):
            stage = next(STAGES[name] for name in (path.parent.name, path.parent.parent.name.partition("_")[0]) if name in STAGES)
            found[Checkpoint(stage, int(path.stem.rpartition("_")[2]))] = path
        order = [*STAGES.values()]
        return dict(sorted(found.items(), key=lambda one: (order.index(one[0].stage), one[0].step)))

    def ask(self, checkpoint, **questions):
        """What bench/nanochat_upstream.py answers."""
        asked, answered = (self.logs / f"{checkpoint} {name}.json" for name in ("questions", "answers"))
        asked.write_text(json.dumps({"source": checkpoint.stage, "tag": self.tag, "step": checkpoint.step, "max_tokens": TOKENS, **questions}))
        log = self.logs / f"{checkpoint}.log"
        with log.open("w") as output:
            process = subprocess.Popen([self.python, ROOT / "bench" / "nanochat_upstream.py", self.checkout, asked, answered], cwd=self.base, env=self.env,
                                       stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self.ended(process, f"judgement of {checkpoint}", log)
        finally:
            end_group(process)
        return json.loads(answered.read_text())


def end_group(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def layout_of(checkout):
    """How the checkout's code lays out its folders. CannotRun if it is none."""
    for name in ("nanochat/gpt.py", "scripts/base_train.py", "scripts/chat_sft.py", "scripts/chat_rl.py"):
        if not (checkout / name).is_file():
            raise CannotRun(f"{checkout} is not a checkout of karpathy/nanochat: {name} is missing; "
                            "`git clone https://github.com/karpathy/nanochat` makes one")
    return "experiments" if (checkout / "nanochat" / "experiment.py").is_file() else "checkpoints"


def check_python(python):
    """CannotRun names the packages that nanochat's Python lacks."""
    code = f"import importlib.util as u; print(*[name for name in {PACKAGES} if not u.find_spec(name)])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise CannotRun(f"--python {python}: {error.strerror}") from None
    if done.returncode or done.stdout.strip():
        missing = ", ".join(done.stdout.split()) or done.stderr.strip().rpartition("\n")[2]
        raise CannotRun(f"--python {python} lacks {missing}; the docstring of bench/nanochat_run.py says how to make one")


# 3. our server -----------------------------------------------------------------------------------------------------------


class Ours:
    """The server that watches the run, as its clients see it."""

    def __init__(self, url, nanochat):
        self.url, self.nanochat = url, nanochat
        self.names = {}         # by step
        self.answers = {}       # by checkpoint
        self.beside = {}        # by checkpoint: what trained while it answered

    def post(self, route, body):
        request = urllib.request.Request(f"{self.url}{route}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise CannotRun(f"our {route} answered {error.code}: {error.read().decode(errors='replace')}") from None

    def see(self):
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=60) as response:
            self.names = {model["step"]: model["id"] for model in json.load(response)["data"] if "step" in model}
        return self.names

    def served(self):
        return {checkpoint: self.names[checkpoint.step] for checkpoint in self.nanochat.written() if checkpoint.step in self.see()}

    def tokens(self, checkpoint):
        """The likeliest answers to TEXTS and, of a chat model, to CHATS."""
        common = {"model": self.names[checkpoint.step], "max_tokens": TOKENS, "temperature": 0, "return_token_ids": True}
        bodies = [("/v1/completions", {"prompt": text}) for text in TEXTS]
        if checkpoint.stage != "base":
            bodies += [("/v1/chat/completions", {"messages": messages}) for messages in CHATS]
        return [self.post(route, {**common, **body})["choices"][0]["token_ids"] for route, body in bodies]

    def follow(self, training, name):
        """Ask each checkpoint once it is served, until the training has ended."""
        while training.poll() is None and time.monotonic() < self.nanochat.ends_s:
            for checkpoint in self.served():
                if checkpoint not in self.answers:
                    self.answers[checkpoint] = self.tokens(checkpoint)
                    if training.poll() is None:
                        self.beside[checkpoint] = name
                        print(f"  {checkpoint} has answered while {name} runs", flush=True)
            time.sleep(0.5)

    def ask_the_rest(self):
        """Ask the checkpoints that were written last. Those that are not served within half a minute have no answers."""
        end_s = time.monotonic() + 30
        while len(self.served()) < len(self.nanochat.written()) and time.monotonic() < end_s:
            time.sleep(0.5)
        for checkpoint in self.served():
            if checkpoint not in self.answers:
                self.answers[checkpoint] = self.tokens(checkpoint)

    def evaluated(self, checkpoint, suite, *more):
        """(what `eval --json` prints, {task: {item: what it keeps of it}})"""
        with tempfile.TemporaryDirectory(dir=self.nanochat.logs) as results:
            command = [sys.executable, ROOT / "chat_server.py", "eval", self.names[checkpoint.step], "--url", self.url, "--suite", suite, "--json",
                       "--results", results, *more]
            left_s = max(self.nanochat.ends_s - time.monotonic(), 1)
            done = subprocess.run(command, env=self.nanochat.env_of_ours, capture_output=True, text=True, timeout=left_s)
            if done.returncode:
                raise CannotRun(f"our eval --suite {suite} of {checkpoint} ended with {done.returncode}: {done.stderr.strip().rpartition(chr(10))[2]}")
            items = {}
            for path in Path(results).glob("*.jsonl"):
                for line in map(json.loads, path.read_text().splitlines()):
                    items.setdefault(line["task"], {})[line["item"]] = line
        return json.loads(done.stdout), items


# 4. the run --------------------------------------------------------------------------------------------------------------


def train(nanochat, ours=None):
    for module, flags in nanochat.trainings():
        name = module.rpartition(".")[2]
        print(f"{name} ...", flush=True)
        with nanochat.started(module, **flags) as training:
            if ours:
                ours.follow(training, name)
    if ours:
        ours.ask_the_rest()


def compare(nanochat, ours):
    from chatlm.worker.engine.calculator import calculate
    written = nanochat.written()
    yield compared_lists("checkpoints", dict.fromkeys(map(str, written)), {name: None for name in map(str, written) if name in map(str, ours.answers)})
    yield Row("checkpoints that answered while nanochat trained", "", f"{len(ours.beside)}", f"of {len(written)}", bool(ours.beside))
    last = {checkpoint.stage: checkpoint for checkpoint in written}
    for checkpoint, path in written.items():
        if checkpoint not in ours.answers:
            continue
        print(f"comparing {checkpoint} ...", flush=True)
        chats = checkpoint.stage != "base"
        questions = {"texts": TEXTS, "chats": CHATS if chats else ()}
        if checkpoint == last["base"]:
            questions |= {"rows": ROWS, "core": True, "expressions": EXPRESSIONS}
        elif checkpoint == last.get("sft"):
            questions |= {"tasks": TASKS, "most": MOST}
        found = nanochat.ask(checkpoint, **questions)
        beside = f", while {ours.beside[checkpoint]} ran" if checkpoint in ours.beside else ""
        yield compared_answers(f"likeliest tokens, {checkpoint}{beside}", found["answers"], ours.answers[checkpoint])
        if chats:
            yield compared_forced(f"tokens that the calculator forced, {checkpoint}", found["answers"], ours.answers[checkpoint])
        if "rows" in questions:
            yield from compared_base(ours, checkpoint, found, path)
            yield compared_lists("results of the calculator", dict(zip(EXPRESSIONS, found["results"])), {one: calculate(one) for one in EXPRESSIONS})
        if "tasks" in questions:
            _, items = ours.evaluated(checkpoint, "chat", "--max-per-task", str(MOST))
            for task in TASKS:
                yield compared_items(f"{task}, {checkpoint}", found["items"][task], items.get(task, {}))


def compared_base(ours, checkpoint, found, path):
    """Bits per byte and CORE."""
    bpb = ours.evaluated(checkpoint, "bpb", "--max-per-task", str(ROWS))[0]["val_bpb"]
    yield compared_numbers(f"bits per byte, {checkpoint}", found["bpb"], bpb, BPB_LIMIT)
    meta = json.loads(path.with_name(re.sub(r"model_(\d+)\.pt", r"meta_\1.json", path.name)).read_text())
    yield compared_numbers(f"bits per byte that base_train wrote, {checkpoint}", meta["val_bpb"], bpb, BPB_LIMIT)
    result, items = ours.evaluated(checkpoint, "core")
    for task, digits in found["items"].items():
        yield compared_items(f"CORE's task `{task}`, {checkpoint}", digits, items.get(task, {}))
    same = all(digits == digits_of(items.get(task, {})) for task, digits in found["items"].items())
    limit = 1e-6 if same else 1.0       # else its tasks say whether all is well
    yield compared_numbers(f"CORE, {checkpoint}", found["core"], result["core_metric"], limit)


def options_of(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of karpathy/nanochat")
    parser.add_argument("--python", default=sys.executable, help="with nanochat's packages (default: this one)")
    parser.add_argument("--text", nargs="+", default=[ROOT / "docs", ROOT / "bench", ROOT / "chatlm"],
                        help="folders whose .md, .rst, .txt and .py files are the texts (default: our own)")
    parser.add_argument("--out", type=Path, help="a new folder, which becomes nanochat's base folder and stays")
    parser.add_argument("--base-only", action="store_true", help="train a base model into --out and compare nothing")
    parser.add_argument("--minutes", type=float, default=20, help="the most that it may take (default: 20)")
    for name, default in (("steps", 200), ("depth", 4), ("width", 128), ("head-dim", 32), ("length", 256), ("vocabulary", 2048), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    options = parser.parse_args(words)
    options.checkout = options.checkout.expanduser().absolute()
    if options.steps < 40 or options.steps % 2:
        raise CannotRun("--steps must be an even number of 40 or more, so that no step is of two stages")
    if options.width % options.depth or options.width % options.head_dim:
        raise CannotRun("--width must be a multiple of --depth and of --head-dim")
    if options.base_only and not options.out:
        raise CannotRun("--base-only needs --out, where the checkpoint stays")
    return options


@contextlib.contextmanager
def base_folder(out):
    """--out, or a folder that goes."""
    if not out:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    out = out.expanduser().absolute()
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise CannotRun(f"--out {out}: {error.strerror}; it must be a new folder") from None
    yield out


def run(options):
    """The rows of the table; none of --base-only."""
    layout_of(options.checkout)
    check_python(options.python)
    from nanochat_data import texts_below, write_data
    with base_folder(options.out) as base:
        nanochat = Nanochat(options, base)
        print(f"nanochat {nanochat.commit}, folders of {nanochat.layout}", flush=True)
        try:
            write_data(base, texts_below(options.text), nanochat.layout)
        except ValueError as error:
            raise CannotRun(f"--text: {error}") from None
        nanochat.prepare()
        if options.base_only:
            return train(nanochat) or []
        with our_server("--watch", base, "--dtype", "float32", "--no-downloads", "--nice", "5", env=nanochat.env_of_ours, ready="/livez") as server:
            ours = Ours(server.url, nanochat)
            train(nanochat, ours)
            return [*compare(nanochat, ours)]


def interrupted(number, frame):
    raise CannotRun(f"ended by {signal.Signals(number).name}")


def main(words=None):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)          # so that nothing is left running
    began_s = time.monotonic()
    try:
        rows = run(options_of(words))
    except (CannotRun, ImportError, AssertionError, NotReady, OSError, subprocess.TimeoutExpired) as error:
        print(f"nanochat_run: {error}", file=sys.stderr)
        return 2
    print("", *table(rows) if rows else (), f"{time.monotonic() - began_s:.0f} s", sep="\n")
    return int(not all(row.fine for row in rows))


if __name__ == "__main__":
    sys.exit(main())
