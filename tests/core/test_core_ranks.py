"""Ranks: processes that sum float32 rows through shared memory (csrc/cpu/ranks/ranks.h); numpy only."""

import contextlib
import os
import signal
import sys
import textwrap
import traceback

import numpy as np
import pytest

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from chatlm.worker.kernels.compiled import RankMemory, Ranks  # noqa: E402
from chatlm.worker.kernels.library import _core  # noqa: E402
from chatlm.worker.kernels.ranks import all_reduce_reference  # noqa: E402
from nightly import WHOLE  # noqa: E402

PART_BYTES, SECONDS = 256 << 10, 60

# What every rank's process knows: `ranks` has joined, part(rank, phase) is what a rank brings, line() goes to the test.
PRELUDE = """
    import os, sys
    import numpy as np
    from chatlm.worker.kernels import compiled
    from chatlm.worker.kernels.ranks import Ranks, all_reduce_reference

    def part(rank, phase, rows, columns):       # of many magnitudes, so that the order of a sum shows
        generator = np.random.default_rng((rank, phase))
        return (generator.standard_normal((rows, columns)) * 10.0 ** generator.integers(-6, 7, (rows, columns))).astype(np.float32)

    def shape(phase):
        return 1 + phase % 5, 16 * (1 + phase * 7 % 61)

    def say(line):
        print(line, flush=True)

    path, rank, patience_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    ranks = Ranks(path, rank, patience_s)
"""
exec(textwrap.dedent(PRELUDE).split("path, rank")[0])


class Rank:
    """A copy of this process that runs the code of a rank; what subprocess.Popen is for a command, without the time of imports."""

    def __init__(self, code, *arguments):
        theirs, stdin = os.pipe()
        stdout, said = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for ours, usual in ((theirs, 0), (said, 1), (said, 2)):
                os.dup2(ours, usual)
            os.closerange(3, max(theirs, stdin, stdout, said) + 1)          # as Popen closes what others read from
            self.run(code, arguments)
        os.close(theirs), os.close(said)
        self.stdin, self.stdout, self.ended = open(stdin, "w"), open(stdout), False

    @staticmethod
    def run(code, arguments):
        sys.stdin, sys.stdout, sys.argv = open(0, closefd=False), open(1, "w", closefd=False), ["-c", *arguments]
        try:
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            status = 1
        finally:
            sys.stdout.flush()
            os._exit(status)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        if not self.ended:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self):
        """The rest of what it says, when it has ended."""
        if not self.ended:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
            self.rest = self.stdout.read()
            os.waitpid(self.pid, 0)
            self.stdout.close()
            self.ended = True
        return self.rest


class Started:
    """A memory file and a process for each rank."""

    def __init__(self, count, code, patience_s=SECONDS, part_bytes=PART_BYTES):
        self.memory = RankMemory(count, part_bytes)
        code = textwrap.dedent(PRELUDE) + textwrap.dedent(code)
        self.processes = [Rank(code, self.memory.path, str(rank), str(patience_s)) for rank in range(count)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def said(self, *ranks):
        """The rest of what they say, when they have ended."""
        return [self.processes[rank].communicate().splitlines() for rank in ranks or range(len(self.processes))]


PHASES = """
    order = np.random.default_rng(rank)
    for phase in range(int({phases})):
        rows, columns = shape(phase)
        parts = [part(each, phase, rows, columns) for each in range(ranks.count)]
        out = np.empty((rows, columns), np.float32)
        residual = None if phase % 3 else part(99, phase, rows, columns)
        if phase % 3 == 2:
            out[:] = parts[rank]                # in place
        ranks.all_reduce(out if phase % 3 == 2 else parts[rank], out, residual)
        assert out.tobytes() == all_reduce_reference(parts, residual).tobytes(), phase
        if phase % 10 == 0:
            wide = np.empty((rows, columns * ranks.count - 5), np.float32)
            ranks.all_gather(parts[rank], wide)
            assert wide.tobytes() == np.hstack(parts)[:, :-5].tobytes(), phase
    say("the same")
"""


@pytest.mark.parametrize("count", [1, 2, 4])
def test_every_rank_gets_the_ordered_sum_s_bits(count):
    """Every rank gets the bits of the sum in the order of the ranks."""
    with Started(count, PHASES.format(phases=100)) as started:
        assert started.said() == [["the same"]] * count


def test_another_order_gives_other_bits():
    """Another order of these parts gives other bits."""
    parts = [part(rank, 0, 1, 1024) for rank in range(3)]
    assert all_reduce_reference(parts).tobytes() != all_reduce_reference(parts[::-1]).tobytes()


@pytest.mark.parametrize("count", [2, 4])
def test_no_rank_skips_or_repeats_a_phase(count):
    """Of thousands of phases back to back, no rank skips or repeats one."""
    code = """
        big = np.empty((1, PART // 4), np.float32)
        for phase in range(PHASES):
            x = big[:, :16 * (1 + phase * 7 % 61)]
            x = np.ascontiguousarray(x) if phase % 500 else big
            x[:] = phase + rank
            ranks.all_reduce(x, x)
            assert (x == ranks.count * phase + ranks.count * (ranks.count - 1) // 2).all(), (phase, x)
        say("all")
    """.replace("PART", str(PART_BYTES)).replace("PHASES", "5000" if WHOLE else "1500")
    with Started(count, code) as started:
        assert started.said() == [["all"]] * count


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="POSIX")
def test_a_rank_stopped_for_a_while_is_waited_for():
    code = """
        x = np.empty((1, 64), np.float32)
        for phase in range(2000):
            x[:] = phase
            ranks.all_reduce(x, x)
            assert (x == phase * ranks.count).all()
            if phase % 400 == 0:
                say(phase)
        say("all")
    """
    with Started(2, code) as started:
        slow = started.processes[1]
        for _ in range(4):                      # each time in another place
            slow.stdout.readline()
            slow.send_signal(signal.SIGSTOP)
            os.waitpid(slow.pid, os.WUNTRACED)
            slow.send_signal(signal.SIGCONT)
        assert [lines[-1] for lines in started.said()] == ["all", "all"]


UNTIL_IT_FAILS = """
    x = np.ones((1, 1024), np.float32)
    ranks.all_reduce(x, x)
    say("begun")
    if rank == ranks.count - 1:
        sys.stdin.readline()
    try:
        while True:
            ranks.all_reduce(x, x)
    except RuntimeError as failure:
        say(failure)
    try:
        ranks.all_reduce(x, x)
    except RuntimeError as failure:
        say("again: " + str(failure))
"""


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_leave_their_wait_when_one_is_killed(count):
    with Started(count, UNTIL_IT_FAILS) as started:
        for process in started.processes:
            assert process.stdout.readline() == "begun\n"
        last = started.processes[-1]
        last.kill()                             # not waited for: it stays a zombie
        why = f"the process of rank {count - 1} has ended"
        assert started.said(*range(count - 1)) == [[why, "again: " + why]] * (count - 1)
        assert started.memory.why() == why


def test_ranks_leave_when_one_dies_within_a_sum():
    """Ranks leave their wait when one is killed between its copy and its sum."""
    with Started(2, UNTIL_IT_FAILS) as started:     # phases follow one another: the signal comes somewhere within one
        for process in started.processes:
            assert process.stdout.readline() == "begun\n"
        started.processes[1].stdin.write("go on\n")
        started.processes[1].stdin.flush()
        started.processes[1].kill()
        assert started.said(0)[0][0] == "the process of rank 1 has ended"


def test_ranks_leave_their_wait_when_told_to_stop():
    with Started(3, UNTIL_IT_FAILS) as started:
        for process in started.processes:
            assert process.stdout.readline() == "begun\n"
        started.memory.poison()
        assert started.said(0, 1) == [["the ranks were told to stop", "again: the ranks were told to stop"]] * 2
        started.processes[2].stdin.write("go on\n")
        assert started.said(2)[0][0] == "the ranks were told to stop"


def test_an_absent_rank_is_not_awaited_for_ever():
    code = """
        if rank == 1:
            sys.stdin.readline()
        try:
            ranks.all_reduce(np.ones((1, 16), np.float32), np.empty((1, 16), np.float32))
        except RuntimeError as failure:
            say(failure)
    """
    with Started(2, code, patience_s=0.2) as started:
        assert started.said(0) == [["rank 1 has not come for too long"]]


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda process: ())(0)) < 2, reason="Linux, with two CPUs")
def test_a_rank_leaves_a_cpu_shared_with_another():
    """A rank that waits for one on the same CPU goes to another, and is not bound to it."""
    code = """
        import time
        x, cpus = np.ones((1, 16), np.float32), os.sched_getaffinity(0)
        for _ in range(20):
            os.sched_setaffinity(0, {min(cpus)})
            if rank == 0:
                os.sched_setaffinity(0, cpus)
            ranks.all_reduce(x, x.copy())
            if rank == 1:
                time.sleep(0.01)
            ranks.all_reduce(x, x.copy())
        say(ranks.handle.moves > 0 if rank == 0 else ranks.handle.moves)
        say(os.sched_getaffinity(0) == (cpus if rank == 0 else {min(cpus)}))
    """
    with Started(2, code) as started:
        assert started.said() == [["True", "True"], ["0", "True"]]


def test_ranks_that_run_different_steps_notice():
    code = """
        x = np.ones((1, 16 * (rank + 1)), np.float32)
        try:
            ranks.all_reduce(x, x)
        except RuntimeError as failure:
            say("runs another step" in str(failure))
    """
    with Started(2, code) as started:
        assert started.said() == [["True"]] * 2


# ---- in a recorded program

PROGRAM = """
    T, C = 64, 512
    compiled.set_threads({threads})
    program, table = compiled.Program(T, T), np.arange(97 * C, dtype=np.float32).reshape(97, C) % 1009 + 0.25 * (rank + 1)
    tables = [np.arange(97 * C, dtype=np.float32).reshape(97, C) % 1009 + 0.25 * (each + 1) for each in range(ranks.count)]
    x, y, sums, last, wide = (np.empty((T, n), np.float32) for n in (C, C, C, C, ranks.count * C - 3))
    program.embed(table, program.token_ids, x)
    program.rms_norm(x, None, 1e-5, y)
    program.all_reduce(y, ranks, sums, residual=x)
    program.all_reduce(sums, ranks, sums)
    program.gather_rows(sums, program.logit_rows, last)
    program.all_gather(last, ranks, wide)

    def start(T):
        ids = list(range(T))
        return program.start(ids, [-1] * T, [0, T], [T], [list(range(4))], ids)

    def run(T):
        program.finish(start(T))
        return wide[:T].copy()
"""
EXACT = """
    def alone(table):                           # the same ops without ranks
        program = compiled.Program(T, T)
        program.embed(table, program.token_ids, x)
        program.rms_norm(x, None, 1e-5, y)
        program.finish(program.start(list(range(T)), [-1] * T, [0, T], [T], [list(range(4))], []))
        return x.copy(), y.copy()

    each = [alone(one) for one in tables]
    first = [all_reduce_reference([b for _, b in each], a) for a, _ in each]
    expected = np.hstack([all_reduce_reference(first)] * ranks.count)[:, :-3]
    for T in (64, 1, 33, 5, 64, 2) * 5:
        assert run(T).tobytes() == expected[:T].tobytes(), T
    say("the same")
"""


PRODUCTS = """
    def steps(summed):                              # what two products give, each rank having some of the columns
        program = compiled.Program(T, T)
        program.embed(tables[rank], program.token_ids, x)
        program.rms_norm(x, None, 1e-5, sums)
        program.linear(sums, matrix, y)
        if summed:
            program.all_reduce(y, ranks, y, residual=x)
        program.gather_rows(y, program.logit_rows, last)
        program.linear(last, matrix, own)
        if summed:
            program.all_gather(own, ranks, wide)
        found = {}
        for T_ in (64, 1, 33, 5, 64, 2) * 3:        # by rows and by tiles
            ids = list(range(T_))
            program.finish(program.start(ids, [-1] * T_, [0, T_], [T_], [list(range(4))], ids))
            found[T_] = [buffer[:T_].copy() for buffer in (x, y, own, wide)]
        return found

    own, generator = np.empty((T, C), np.float32), np.random.default_rng(0)
    matrix = compiled.Matrix(compiled.Arena(4 << 20), "f32", C, C)
    matrix.fill(generator.standard_normal((C, C)).astype(np.float32), "f32")
    me, alone = rank, {}
    for rank in range(ranks.count):
        alone[rank] = steps(False)
    rank = me
    for T_, (_, y_, own_, wide_) in steps(True).items():
        residual = alone[rank][T_][0]
        assert y_.tobytes() == all_reduce_reference([alone[each][T_][1] for each in range(ranks.count)], residual).tobytes(), T_
        program = compiled.Program(T, T)         # the second product, of the sum
        program.given(y)
        program.linear(y, matrix, own)
        y[:T_] = y_
        program.finish(program.start(list(range(T_)), [-1] * T_, [0, T_], [T_], [list(range(4))], [0]))
        assert np.array_equal(wide_[:, rank * C:(rank + 1) * C], own[:T_, :wide_.shape[1] - rank * C]), T_
    say("the same")
"""


TABLES = """
    from chatlm.worker.kernels.tiles import COLUMNS, FROM_FILES
    T, C, V = 64, 512, 97
    compiled.set_threads({threads})
    values = np.random.default_rng(1).standard_normal((V, C)).astype(np.float32)
    values[3, :9], values[4] = -0.0, 0.0
    each, token_ids, previous = -(-V // ranks.count), [3, 4, 96, 0, 48, 49, 32, 33] * 8, [-1, 3, 4, 96, 0, 48, 49, 32] * 8
    x, y = np.empty((T, C), np.float32), np.empty((T, C), np.float32)

    def table(kind, rows):
        if kind in ("float32", "float16"):
            return rows.astype(kind)
        matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, len(rows), C)
        matrix.fill(rows, "f32")
        return matrix

    def looked_up(table, part):
        program, found = compiled.Program(T, T), []
        for ids, out in ((program.token_ids, x), (program.previous_token_ids, y)):
            program.embed(table, ids, out, part)
            if part:
                program.all_reduce(out, ranks, out)
            program.mix(out, out, 0.5, 0.0, out)        # what follows reads the sum
        for T_ in (64, 1, 33, 5, 64, 2):                # by rows and by tiles
            program.finish(program.start(token_ids[:T_], previous[:T_], [0, T_], [T_], [list(range(4))], []))
            found.append((x[:T_].tobytes(), y[:T_].tobytes()))
        return found

    for kind in ("float32", "float16", *(kind for kind in COLUMNS if kind not in FROM_FILES)):
        whole, own = table(kind, values), table(kind, values[rank * each:(rank + 1) * each])
        say(looked_up(own, (rank * each, V)) == looked_up(whole, None))
"""


@pytest.mark.parametrize("count, threads", [(2, 1), (3, 2)])
def test_ranks_look_up_the_bits_of_a_whole_table(count, threads):
    """Ranks that have some rows of a table each look up the bits of the whole."""
    with Started(count, textwrap.dedent(TABLES.format(threads=threads))) as started:
        assert started.said() == [["True"] * (2 + len(_core.weight_types()) - len(_core.file_types()))] * count


@pytest.mark.parametrize("count, threads", [(2, 1), (2, 3)])
def test_products_written_to_others_have_the_same_bits(count, threads):
    """Products that are written where the others read them give the same bits."""
    code = textwrap.dedent(PROGRAM.format(threads=threads)) + textwrap.dedent(PRODUCTS)
    with Started(count, code) as started:
        assert started.said() == [["the same"]] * count


@pytest.mark.parametrize("count, threads", [(2, 1), (2, 3), (3, 2)])
def test_a_recorded_step_has_its_ops_bits(count, threads):
    """A recorded step gives the bits of its ops, however it is divided."""
    code = textwrap.dedent(PROGRAM.format(threads=threads)) + textwrap.dedent(EXACT)
    with Started(count, code) as started:
        assert started.said() == [["the same"]] * count


def test_a_step_fails_when_another_rank_is_killed():
    """A step under way fails when another rank is killed."""
    code = textwrap.dedent(PROGRAM.format(threads=2)) + textwrap.dedent("""
        run(64)
        say("begun")
        if rank == 1:
            sys.stdin.readline()
        for _ in range(2):
            try:
                run(40)
            except RuntimeError as failure:
                say(failure)
    """)
    with Started(2, code) as started:
        for process in started.processes:
            assert process.stdout.readline() == "begun\n"
        started.processes[1].kill()
        assert started.said(0) == [["the step failed: the process of rank 1 has ended"] * 2]


def test_the_other_ranks_learn_of_a_step_that_failed():
    code = textwrap.dedent(PROGRAM.format(threads=1)) + textwrap.dedent("""
        program, matrix = compiled.Program(T, T), compiled.Matrix(compiled.Arena(1 << 20), "f32", C, C)
        matrix.fill(np.eye(C, dtype=np.float32), "f32")
        program.embed(table, program.token_ids, x)
        program.linear(x, matrix, y)
        program.all_reduce(y, ranks, sums)
        try:
            run(2)                                  # rank 0 may still be in it when rank 1 has failed
            if rank == 1:
                compiled._core.refuse_memory(1)  # 64 rows need some that 2 did not
            run(64)
        except RuntimeError as failure:
            say(failure)
    """)
    with Started(2, code) as started:
        zero, one = started.said()
        assert zero == ["the step failed: a step of rank 1 failed"] and "bad_alloc" in one[0]


# ---- wrong arguments

def test_wrong_arguments_are_named():
    memory = RankMemory(2, 1024)
    ranks, floats = Ranks(memory.path, 0), lambda *shape: np.zeros(shape, np.float32)
    for message, call in {
            "count: 1 to 64": lambda: RankMemory(65, 16),
            "part_bytes: must be positive": lambda: RankMemory(2, 0),
            "rank: must be 0 to": lambda: Ranks(memory.path, 2),
            "rank: must be an integer": lambda: Ranks(memory.path, -1),
            "rank: another process has it": lambda: Ranks(memory.path, 0),
            "patience_s: must be positive": lambda: Ranks(memory.path, 1, 0),
            "x: must have 4 to 1024 bytes": lambda: ranks.all_reduce(floats(1, 272), floats(1, 272)),
            "x: must be a multiple of 16": lambda: ranks.all_reduce(floats(3, 10), floats(3, 10)),
            "out: must have the shape": lambda: ranks.all_reduce(floats(2, 16), floats(1, 16)),
            "residual: must be float32": lambda: ranks.all_reduce(floats(1, 16), floats(1, 16), np.zeros((1, 16))),
            "out: must have 1 to 32 columns": lambda: ranks.all_gather(floats(1, 16), floats(1, 33))}.items():
        with pytest.raises(ValueError, match=message):
            call()
    program, x, wide, few, sums = compiled.Program(4, 4), floats(4, 80), floats(4, 161), floats(4, 16), floats(4, 16)
    program.embed(floats(9, 80), program.token_ids, x)
    program.embed(floats(9, 16), program.token_ids, few)
    for message, call in {
            "ranks: must be Ranks": lambda: program.all_reduce(x, 2, x),
            "x: the other ranks have it": lambda: (program.all_reduce(few, ranks, sums), program.rms_norm(few, None, 1e-5, sums)),
            "x: is more than the ranks' memory": lambda: program.all_reduce(x, ranks, x),
            "out: must have 1 to 160": lambda: program.all_gather(x, ranks, wide)}.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_file_of_another_kind_is_refused(tmp_path):
    for content in (b"", b"x" * 5000):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(ValueError, match="memory: must be a file that a RankMemory has made"):
            Ranks(str(tmp_path / "other"), 0)
