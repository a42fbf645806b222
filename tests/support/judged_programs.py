"""220 programs as models write them, each with its verdict: our own, and that of nanochat's execution.py at 92d63d4.

Where the two differ, `STRICTER` says why. test_programs.py compares both, where a checkout of nanochat is given."""

from typing import NamedTuple


class Judged(NamedTuple):
    name: str
    program: str
    right: bool
    upstream: bool


# solutions of small problems: {name: (the body of check, right solutions, wrong ones)}
PROBLEMS = {
    "add": (["candidate(1, 2) == 3", "candidate(-1, 1) == 0"],
            ["def add(a, b): return a + b", "add = lambda a, b: sum([a, b])"],
            ["def add(a, b): return a - b", "def add(a): return a", "def add(a, b) return a + b"]),
    "is_even": (["candidate(2)", "not candidate(3)"],
                ["def is_even(n): return n % 2 == 0", "def is_even(n):\n    return not n & 1"],
                ["def is_even(n): return n % 2", "def is_even(n): return True", "def is_even(n): pass"]),
    "factorial": (["candidate(0) == 1", "candidate(6) == 720"],
                  ["def factorial(n): return 1 if n < 2 else n * factorial(n - 1)", "import math\nfactorial = math.factorial"],
                  ["def factorial(n): return n * factorial(n - 1)", "def factorial(n): return n", "def factoriel(n): return 1"]),
    "fibonacci": (["[candidate(i) for i in range(6)] == [0, 1, 1, 2, 3, 5]"],
                  ["def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
                   "from functools import lru_cache\n@lru_cache(None)\ndef fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)"],
                  ["def fibonacci(n): return n", "def fibonacci(n):\nreturn n", "def fibonacci(n): raise NotImplementedError"]),
    "reverse": (["candidate('abc') == 'cba'", "candidate('') == ''"],
                ["def reverse(s): return s[::-1]", "def reverse(s): return ''.join(reversed(s))"],
                ["def reverse(s): return reversed(s)", "def reverse(s): return s", "def reverse(s): return s.reverse()"]),
    "palindrome": (["candidate('aba')", "not candidate('ab')"],
                   ["def palindrome(s): return s == s[::-1]", "def palindrome(s): return all(a == b for a, b in zip(s, reversed(s)))"],
                   ["def palindrome(s): return True", "def palindrome(s): return s[0] == s", "palindrome = None"]),
    "vowels": (["candidate('hello') == 2", "candidate('') == 0"],
               ["def vowels(s): return sum(c in 'aeiou' for c in s)", "import re\ndef vowels(s): return len(re.findall('[aeiou]', s))"],
               ["def vowels(s): return len(s)", "def vowels(s): return sum(c in 'aei' for c in s)", "def vowels(s): return s.count(5)"]),
    "largest": (["candidate([3, 9, 2]) == 9", "candidate([-1]) == -1"],
                ["def largest(values): return max(values)", "def largest(values):\n    best = values[0]\n    for value in values:\n        if value > best:\n            best = value\n    return best"],
                ["def largest(values): return min(values)", "def largest(values):\n    best = 0\n    for value in values: best = max(best, value)\n    return best", "def largest(values): return values[10]"]),
    "unique": (["candidate([1, 1, 2]) == [1, 2]", "candidate([]) == []"],
               ["def unique(values): return list(dict.fromkeys(values))", "def unique(values):\n    found = []\n    for value in values:\n        if value not in found:\n            found.append(value)\n    return found"],
               ["def unique(values): return set(values)", "def unique(values): return values", "def unique(values): return [v for v in values if values.count(v) == 1]"]),
    "flatten": (["candidate([1, [2, [3]]]) == [1, 2, 3]"],
                ["def flatten(v): return [v] if isinstance(v, int) else [x for part in v for x in flatten(part)]",
                 "def flatten(v):\n    out = []\n    for x in v:\n        out += flatten(x) if isinstance(x, list) else [x]\n    return out"],
                ["def flatten(v): return sum(v, [])", "def flatten(v): return v", "def flatten(v): return [x for part in v for x in part]"]),
    "is_prime": (["candidate(7)", "not candidate(1)", "not candidate(9)"],
                 ["def is_prime(n): return n > 1 and all(n % i for i in range(2, n))", "def is_prime(n):\n    if n < 2: return False\n    i = 2\n    while i * i <= n:\n        if n % i == 0: return False\n        i += 1\n    return True"],
                 ["def is_prime(n): return n % 2 == 1", "def is_prime(n): return all(n % i for i in range(2, n))", "def is_prime(n): return n / 0"]),
    "gcd": (["candidate(12, 18) == 6", "candidate(5, 7) == 1"],
            ["def gcd(a, b):\n    while b: a, b = b, a % b\n    return a", "from math import gcd"],
            ["def gcd(a, b): return min(a, b)", "def gcd(a, b): return a * b", "from maths import gcd"]),
    "words": (["candidate('a b  c') == ['a', 'b', 'c']"],
              ["def words(s): return s.split()", "import re\ndef words(s): return re.findall(r'\\S+', s)"],
              ["def words(s): return s.split(' ')", "def words(s): return list(s)", "def words(s): return s.splits()"]),
    "title": (["candidate('ab cd') == 'Ab Cd'"],
              ["def title(s): return s.title()", "def title(s): return ' '.join(w.capitalize() for w in s.split(' '))"],
              ["def title(s): return s.upper()", "def title(s): return s.capitalize()", "def title(s): return title(s)"]),
    "mean": (["abs(candidate([1.0, 2.0]) - 1.5) < 1e-9"],
             ["def mean(v): return sum(v) / len(v)", "from statistics import mean"],
             ["def mean(v): return sum(v)", "def mean(v): return sum(v) // len(v)", "def mean(v): return v.mean()"]),
    "count": (["candidate('aab') == {'a': 2, 'b': 1}"],
              ["from collections import Counter\ndef count(s): return Counter(s)", "def count(s):\n    out = {}\n    for c in s: out[c] = out.get(c, 0) + 1\n    return out"],
              ["def count(s): return {c: 1 for c in s}", "def count(s):\n    out = {}\n    for c in s: out[c] += 1\n    return out", "def count(s): return len(s)"]),
    "merge": (["candidate([1, 4], [2, 3]) == [1, 2, 3, 4]"],
              ["def merge(a, b): return sorted(a + b)", "import heapq\ndef merge(a, b): return list(heapq.merge(a, b))"],
              ["def merge(a, b): return a + b", "def merge(a, b): return (a + b).sort()", "def merge(a, b): return sorted(a, b)"]),
    "brackets": (["candidate('(())')", "not candidate('())(')"],
                 ["def brackets(s):\n    depth = 0\n    for c in s:\n        depth += 1 if c == '(' else -1\n        if depth < 0: return False\n    return depth == 0",
                  "def brackets(s):\n    while '()' in s: s = s.replace('()', '')\n    return not s"],
                 ["def brackets(s): return s.count('(') == s.count(')')", "def brackets(s): return s[0] == '('", "def brackets(s):\n    depth = 0\n  return depth"]),
    "roman": (["candidate('XIV') == 14"],
              ["def roman(s):\n    of = dict(I=1, V=5, X=10)\n    v = [of[c] for c in s]\n    return sum(-a if a < b else a for a, b in zip(v, v[1:] + [0]))",
               "def roman(s): return {'XIV': 14}[s]"],
              ["def roman(s): return sum(dict(I=1, V=5, X=10)[c] for c in s)", "def roman(s): return {}[s]", "def roman(s): return '14'"]),
    "transpose": (["candidate([[1, 2], [3, 4]]) == [[1, 3], [2, 4]]"],
                  ["def transpose(m): return [list(row) for row in zip(*m)]", "def transpose(m): return [[row[i] for row in m] for i in range(len(m[0]))]"],
                  ["def transpose(m): return list(zip(*m))", "def transpose(m): return m", "def transpose(m): return m.T"]),
}

TEST = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == -6\n\ncheck(twice)"
GOOD, BAD = "def twice(x): return 2 * x", "def twice(x): return x"

# What comes before the tests of `twice`: upstream calls these right, and we do not.
STRICTER = {
    # A program that ends before its tests with status 0 is right there, and wrong here.
    "raises SystemExit(0)": f"{BAD}\nraise SystemExit(0)",
    "raises SystemExit": f"{BAD}\nraise SystemExit",
    "sys.exit()": f"import sys\n{BAD}\nsys.exit()",
    "sys.exit(0)": f"import sys\n{BAD}\nsys.exit(0)",
    "sys.exit(False)": f"import sys\n{BAD}\nsys.exit(False)",
    "sys.exit(256)": f"import sys\n{BAD}\nsys.exit(256)",
    "os._exit(0)": f"import os\n{BAD}\nos._exit(0)",
    "os._exit(256)": f"import os\n{BAD}\nos._exit(256)",
    "posix._exit(0)": f"import posix\n{BAD}\nposix._exit(0)",
    "exit of C": f"import ctypes\n{BAD}\nctypes.CDLL(None).exit(0)",
    "_exit of C": f"import ctypes\n{BAD}\nctypes.CDLL(None)._exit(0)",
    "a main block that exits": f"import sys\n{BAD}\nif __name__ == '__main__':\n    sys.exit(0)",
    "a main block that exits, of a right solution": f"import sys\n{GOOD}\nif __name__ == '__main__':\n    print(twice(2))\n    sys.exit()",
    "a main function whose status is the exit's": f"import sys\n{GOOD}\ndef main(): print(twice(4)); return 0\nif __name__ == '__main__':\n    sys.exit(main())",
    "a main block that raises SystemExit": f"{GOOD}\nif __name__ == '__main__':\n    raise SystemExit(None)",
    "argparse's help": f"import argparse\n{GOOD}\nargparse.ArgumentParser().parse_args(['-h'])",
    "the function exits": "import sys\ndef twice(x): sys.exit(0)",
    "the function exits at once": "import os\ndef twice(x): os._exit(0)",
    "the function raises SystemExit": "def twice(x): raise SystemExit",
    "the function exits at the second call": "import sys\ndef twice(x):\n    if x < 0: sys.exit()\n    return 4",
    "the result exits when it is compared": "import os\nclass It:\n    def __eq__(self, other): os._exit(0)\ndef twice(x): return It()",
    "a hook for exceptions": f"import os, sys\nsys.excepthook = lambda *_: os._exit(0)\n{BAD}",
    "at the exit": f"import atexit, os\natexit.register(os._exit, 0)\n{BAD}",
    "a thread ends it": "import os, threading, time\nthreading.Thread(target=os._exit, args=(0,)).start()\ndef twice(x): time.sleep(9)",
    "an alarm ends it": "import os, signal\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\nsignal.setitimer(signal.ITIMER_REAL, 0.1)\ndef twice(x):\n    while True: pass",
    "a tracer ends it": f"import os, sys\nsys.settrace(lambda frame, *_: os._exit(0) if frame.f_code.co_name == 'check' else None)\n{BAD}",
    "another program in its place": f"import os, sys\n{BAD}\nos.execv('/bin/true', ['true'])",
    "another Python in its place": f"import os, sys\n{BAD}\nos.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    "writes to all files and exits": f"import os\n{BAD}\nfor n in os.listdir('/proc/self/fd'):\n    try: os.write(int(n), b'1')\n    except OSError: pass\nos._exit(0)",
    "a child runs the tests": f"import ctypes, os\n{BAD}\nif ctypes.CDLL(None).fork(): os._exit(0)",
    "a child of a wrong program exits": "import os, _thread\n_thread.start_new_thread(lambda: os._exit(0), ())\ndef twice(x):\n    import time; time.sleep(1)",
    # Limits that upstream does not have.
    "a file of 64 MiB": f"open('x', 'wb').write(bytes(64 << 20))\n{GOOD}",
    "100 open files": f"files = [open(str(n), 'w') for n in range(100)]\n{GOOD}",
    "closes files that it did not open": f"import os\nos.closerange(3, 1100)\n{GOOD}",
    "signals itself by a pidfd": f"import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getpid()), 0)\n{GOOD}",
    "starts a process by posix_spawn": f"import os\nos.posix_spawn('/bin/true', ['true'], {{}})\n{GOOD}",
}

ALIKE = {
    # wrong, by both
    "exit()": (f"{BAD}\nexit()", False), "exit() of a right solution": (f"{GOOD}\nexit()", False), "quit()": (f"{BAD}\nquit()", False),
    "exit(0) in a main block": (f"{GOOD}\nif __name__ == '__main__': exit(0)", False), "help()": (f"{GOOD}\nhelp(twice)", False),
    "sys.exit(1)": (f"import sys\n{GOOD}\nsys.exit(1)", False), "sys.exit in words": (f"import sys\n{GOOD}\nsys.exit('done')", False),
    "os._exit(3)": (f"import os\n{GOOD}\nos._exit(3)", False), "os.abort()": (f"import os\n{GOOD}\nos.abort()", False), "raises KeyboardInterrupt": (f"{GOOD}\nraise KeyboardInterrupt", False),
    "kills itself": (f"import signal\n{GOOD}\nsignal.raise_signal(signal.SIGKILL)", False), "os.kill": (f"import os\n{GOOD}\nos.kill(os.getpid(), 0)", False),
    "os.fork": (f"import os\nos.fork()\n{GOOD}", False), "os.system": (f"import os\nos.system('true')\n{GOOD}", False), "os.remove": (f"import os\nopen('x', 'w')\nos.remove('x')\n{GOOD}", False),
    "os.getcwd": (f"import os\nos.getcwd()\n{GOOD}", False), "os.chdir": (f"import os\nos.chdir('/')\n{GOOD}", False), "os.environ is set": (f"import os\nos.environ['A'] = '1'\n{GOOD}", False),
    "subprocess": (f"import subprocess\nsubprocess.run(['true'])\n{GOOD}", False), "shutil.rmtree": (f"import os, shutil\nos.mkdir('a')\nshutil.rmtree('a')\n{GOOD}", False),
    "multiprocessing": (f"import multiprocessing\np = multiprocessing.Process(target=print)\np.start()\n{GOOD}", False),
    "a temporary folder": (f"import tempfile\nwith tempfile.TemporaryDirectory() as f: pass\n{GOOD}", False), "resource": (f"import resource\n{GOOD}", False), "psutil": (f"import psutil\n{GOOD}", False),
    "tkinter": (f"import tkinter\n{GOOD}", False), "no such module": (f"import nosuchmodule\n{GOOD}", False), "input()": (f"{GOOD}\nprint(twice(int(input())))", False),
    "input() in a main block": (f"{GOOD}\nif __name__ == '__main__': print(twice(int(input())))", False), "__file__": (f"print(__file__)\n{GOOD}", False),
    "its own source": (f"import inspect\n{GOOD}\ninspect.getsource(twice)", False), "a pickle of its own class": (f"import pickle\nclass A: pass\npickle.dumps(A())\n{GOOD}", False),
    "256 MiB": (f"x = bytearray(256 << 20)\n{GOOD}", False), "memory without end": (f"x = []\nwhile True: x.append(bytes(1 << 20))\n{GOOD}", False),
    "recursion without end": ("def twice(x): return twice(x)", False), "a null byte": (f"{GOOD}\0", False), "half of a character": (f"x = '\ud800'\n{GOOD}", False), "a mark of byte order": (f"\ufeff{GOOD}", False),
    "words": ("Here is the function that you asked for.", False), "nothing": ("", False), "a half": ("def twice(x):", False), "an open text": (f"{GOOD}\nx = '''", False), "an open bracket": (f"{GOOD}\nx = (", False),
    "prose after it": (f"{GOOD}\nThis doubles x.", False), "Python 2": ("def twice(x):\n    print x\n    return 2 * x", False), "tabs and spaces": ("def twice(x):\n\ty = x\n        return 2 * y", False),
    "a future import that comes late": (f"{GOOD}\nfrom __future__ import annotations", False), "its own check": (f"{BAD}\ndef check(candidate): pass", False),
    "its own AssertionError": (f"import builtins\nbuiltins.AssertionError = Warning\n{BAD}", False), "its own assertion fails": (f"{GOOD}\nassert twice(1) == 3", False),
    "the name is deleted": (f"{GOOD}\ndel twice", False), "another name": ("def double(x): return 2 * x", False), "a text": ("def twice(x): return str(2 * x)", False), "prints": ("def twice(x): print(2 * x)", False),
    "a coroutine": ("async def twice(x): return 2 * x", False), "a generator": ("def twice(x): yield 2 * x", False), "catches too much": ("def twice(x):\n    try: return y\n    except Exception: return None", False),
    "an error in another thread does not count, the result does": (f"import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start()\n{BAD}", False), "globals are cleared": (f"{GOOD}\nglobals().clear()", False),
    "waits": (f"import time\ntime.sleep(60)\n{GOOD}", False), "does not end": (f"{GOOD}\nwhile True: pass", False), "a thread that does not end": (f"import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n{GOOD}", False),
    "an alarm": (f"import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.1)\ntime.sleep(2)\n{GOOD}", False), "its status at the exit": (f"import atexit, os\natexit.register(os._exit, 4)\n{GOOD}", False),
    # right, by both
    "a main block": (f"{GOOD}\nif __name__ == '__main__':\n    print(twice(2))", True), "asserts its name": (f"assert __name__ == '__main__'\n{GOOD}", True), "doctest": (f"import doctest\n{GOOD}\ndoctest.testmod()", True),
    "always equal": ("class It:\n    def __eq__(self, other): return True\ndef twice(x): return It()", True), "catches its own exit": (f"import sys\ntry: sys.exit(0)\nexcept SystemExit: pass\n{GOOD}", True),
    "an exit in another thread": (f"import sys, threading\nt = threading.Thread(target=sys.exit)\nt.start(); t.join()\n{GOOD}", True), "a daemon that does not end": (f"import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n{GOOD}", True),
    "threads": (f"from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(3) as pool: list(pool.map(abs, range(9)))\n{GOOD}", True), "asyncio": (f"import asyncio\nasync def f(): await asyncio.sleep(0); return 2\ndef twice(x): return asyncio.run(f()) * x", True),
    "a dataclass": ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef twice(x): return A(x).x * 2", True), "an enum": ("import enum\nclass E(enum.Enum): TWO = 2\ndef twice(x): return E.TWO.value * x", True),
    "a future import": (f"from __future__ import annotations\n{GOOD}", True), "prints much": (f"print('x' * 10_000_000)\n{GOOD}", True), "prints other letters": (f"print('\u00e9\u4e2d\U0001f600')\n{GOOD}", True), "writes errors": (f"import sys\nprint('x' * 100_000, file=sys.stderr)\n{GOOD}", True),
    "closes its output": (f"import sys\nsys.stdout.close()\n{GOOD}", True), "reads no input": (f"import sys\nassert sys.stdin.read() == ''\n{GOOD}", True), "a file of its own": (f"open('x', 'w').write('y')\nassert open('x').read() == 'y'\n{GOOD}", True),
    "an empty folder": (f"import os\nassert os.listdir('.') == []\n{GOOD}", True), "a module of its own": (f"open('mine.py', 'w').write('two = 2')\nimport mine\ndef twice(x): return mine.two * x", True), "a folder of its own": (f"import os\nos.makedirs('a/b')\n{GOOD}", True),
    "its arguments": (f"import sys\nassert sys.argv == ['-c']\n{GOOD}", True), "argparse": (f"import argparse\nargparse.ArgumentParser().parse_args()\n{GOOD}", True), "its environment": (f"import os\nassert {{'PATH', 'OMP_NUM_THREADS'}} == {{*os.environ}} - {{'LC_CTYPE'}}\n{GOOD}", True),
    "UTF-8": (f"import sys\nassert sys.getfilesystemencoding() == 'utf-8' == sys.stdout.encoding.lower()\n{GOOD}", True), "100 MiB": (f"x = bytearray(100 << 20)\n{GOOD}", True), "logging": (f"import logging\nlogging.warning('x')\n{GOOD}", True),
    "deep recursion": ("import sys\nsys.setrecursionlimit(100_000)\ndef twice(x): return x if not x else 2 * x + 0 * deep(20_000)\ndef deep(n): return n and deep(n - 1)", True), "CRLF": (f"{GOOD}\r\nx = 1\r\n", True), "a cookie": (f"# -*- coding: latin-1 -*-\n{GOOD}", True),
    "deep recursion in C": ("import functools, sys\nsys.setrecursionlimit(20_000)\n@functools.lru_cache(None)\ndef deep(n): return n and deep(n - 1)\ndef twice(x): return 2 * x + 0 * deep(3000)", True),
    "a class with a call": ("class Twice:\n    def __call__(self, x): return 2 * x\ntwice = Twice()", True), "type hints": ("from typing import *\ndef twice(x: int) -> Optional[int]:\n    '''Doubles x.'''\n    return x * 2", True), "other imports": ("import decimal, fractions, hashlib, itertools, json, random, re, string, uuid\ndef twice(x): return int(fractions.Fraction(x) * 2)", True),
    "a walrus and match": ("def twice(x):\n    match x:\n        case int(): return (y := x) + y", True), "a slow but finite one": ("import time\ndef twice(x): time.sleep(0.3); return x + x", True), "an unhandled warning": (f"import warnings\nwarnings.warn('x')\n{GOOD}", True),
}


def of_problem(name: str, checks: list[str], solution: str) -> str:
    test = "".join(f"    assert {check}\n" for check in checks)
    return f"\n\n{solution}\n\ndef check(candidate):\n{test}\n\ncheck({name})"


def judged_programs() -> list[Judged]:
    found = []
    for name, (checks, right, wrong) in PROBLEMS.items():
        for number, solution in enumerate([*right, *wrong]):
            verdict = number < len(right)
            found.append(Judged(f"{name} {number}", of_problem(name, checks, solution), verdict, verdict))
    found += [Judged(name, f"\n\n{code}\n\n{TEST}", False, True) for name, code in STRICTER.items()]
    found += [Judged(name, f"\n\n{code}\n\n{TEST}", verdict, verdict) for name, (code, verdict) in ALIKE.items()]
    return found
