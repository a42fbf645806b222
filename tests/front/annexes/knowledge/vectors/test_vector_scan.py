"""The scan of vectors: exact, repeatable to the bit, and up to date with the database."""

import numpy
import pytest

import knowledge_rows as rows
from chatlm.front.annexes.knowledge.vectors import scan as scanning
from chatlm.front.annexes.knowledge.vectors.messages import Scan
from chatlm.front.annexes.knowledge.vectors.process import scanned
from chatlm.front.annexes.knowledge.vectors.scan import Best, Block, Question
from chatlm.front.annexes.knowledge.vectors.windows import BadVectors, Windows
from patching import patch

D = 24


def unit(random, count, size=D):
    vectors = random.standard_normal((count, size)).astype(numpy.float32)
    return vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)


def packed(vector):
    return numpy.asarray(vector, "<f4").tobytes()


def blocks_of(numbers, scales, passages, files, rows_each):
    for begin in range(0, len(scales), rows_each):
        part = slice(begin, begin + rows_each)
        yield Block(numbers[part], scales[part], passages[part], files[part])


def some_windows(seed, count, size=D):
    random = numpy.random.default_rng(seed)
    numbers = random.integers(-127, 128, (count, size)).astype(numpy.int8)
    passages = numpy.sort(random.integers(1, count // 2, count))
    return numbers, random.uniform(0.01, 0.02, count), passages, passages // 7


def best_by_hand(question, numbers, scales, passages, files, most, allowed):
    """The same in whole numbers of Python."""
    wanted = [int(number) for number in question.numbers]
    best = {}
    for vector, scale, passage, file in zip(*(each.tolist() for each in (numbers, scales, passages, files))):
        if file in allowed:
            score = float(sum(a * b for a, b in zip(vector, wanted))) * (scale * question.scale)
            best[passage] = max(best.get(passage, (-9.0, 0)), (score, file))
    order = sorted(best, key=lambda passage: (-best[passage][0], best[passage][1], passage))
    return [(passage, best[passage][1], best[passage][0]) for passage in order[:most]]


@pytest.mark.parametrize("size", [1, 3, 384, 1024, 1500])
@pytest.mark.parametrize("rows_each", [1, 7, 64, 1000])
def test_the_nearest_are_those_of_whole_numbers_to_the_bit(size, rows_each):
    windows = some_windows(size, 200, size)
    question = Question(unit(numpy.random.default_rng(5), 1, size)[0])
    allowed = numpy.unique(windows[3])[::2]
    best = Best(question, 10, others=[int(windows[2][0]), int(windows[2][-1]), 10**9])
    for block in blocks_of(*windows, rows_each):
        best.compare(block, allowed)
    nearest, others = best.result()
    assert [tuple(near) for near in nearest] == best_by_hand(question, *windows, 10, {*allowed.tolist()})
    everything = best_by_hand(question, *windows, 10**6, {*allowed.tolist()})
    wanted = {int(windows[2][0]), int(windows[2][-1])}
    assert [tuple(near) for near in others] == [each for each in everything if each[0] in wanted]


def test_the_largest_sums_are_whole():
    """-128 in all places of a window, and the largest steps of a question: still exact."""
    for size in (384, 512, 1024, 4096):
        vector = numpy.full(size, 1 / numpy.sqrt(size), numpy.float32)
        question = Question(vector)
        least = numpy.full((2, size), -128, numpy.int8)
        block = Block(least, numpy.ones(2), numpy.array([1, 2]), numpy.ones(2))
        exact = sum(-128 * int(number) for number in question.numbers)
        assert question.scores(block).tolist() == [float(exact) * question.scale] * 2


def test_equal_scores_are_ordered_by_file_and_place():
    count = 5000  # all alike: every window is as near as any
    numbers = numpy.ones((count, D), numpy.int8)
    passages = numpy.arange(count, 0, -1)
    files = passages % 3
    best = Best(Question(numpy.ones(D, numpy.float32)), 40)
    for block in blocks_of(numbers, numpy.ones(count), passages, files, 333):
        best.compare(block, numpy.array([0, 1, 2]))
    assert [near.passage for near in best.result()[0]] == list(range(3, 123, 3))


def test_a_question_of_zeros_has_scores_of_zero():
    best = Best(Question(numpy.zeros(D, numpy.float32)), 3)
    best.compare(Block(*some_windows(0, 20)), numpy.arange(9))
    assert [near.score for near in best.result()[0]] == [0.0] * 3


def test_cosines_are_close_to_those_of_float32():
    random = numpy.random.default_rng(3)
    vectors = unit(random, 500, 384)
    wanted = unit(random, 1, 384)[0]
    scales = numpy.abs(vectors).max(1) / 127
    block = Block(numpy.rint(vectors / scales[:, None]).astype(numpy.int8), scales.astype(float),
                  numpy.arange(500), numpy.zeros(500, int))
    assert numpy.abs(Question(wanted).scores(block) - vectors @ wanted).max() < 0.004


# the database

@pytest.fixture
def database(tmp_path):
    path = tmp_path / "kept.db"
    rows.make_database(path)
    return path


def ask(windows, stores, vector, most=5, files=None, others=(), embedder=1):
    return scanned(windows, Scan(tuple(stores), embedder, packed(vector), most, files, tuple(others)))


def passages_of(answer):
    return [near.passage for near in answer.nearest]


def axis(index, size=4):
    return [float(place == index) for place in range(size)]


def test_files_that_come_and_go_are_seen_without_being_told(database):
    embedder = rows.add_embedder(database, "a")
    store = rows.add_store(database, embedder)
    windows = Windows(database, 1 << 20)
    assert ask(windows, [store], axis(0)).nearest == ()
    first, [a, b] = rows.add_file(database, store, [("x", [axis(0)]), ("y", [axis(1), axis(2)])], embedder)
    assert passages_of(ask(windows, [store], axis(2))) == [b, a]
    second, [c] = rows.add_file(database, store, [("z", [axis(2)])], embedder)
    assert passages_of(ask(windows, [store], axis(2))) == [b, c, a]
    assert ask(windows, [store], axis(2)).windows == 4
    rows.delete_file(database, first)
    answer = ask(windows, [store], axis(2), others=[a, c])
    assert passages_of(answer) == [c] and [near.passage for near in answer.others] == [c]
    assert passages_of(ask(windows, [store], axis(2), files=(first,))) == []
    assert ask(windows, [store], axis(2), files=()).nearest == ()


def test_only_windows_of_the_embedder_and_the_stores_are_compared(database):
    one, other = rows.add_embedder(database, "a"), rows.add_embedder(database, "b")
    stores = [rows.add_store(database, one) for _ in range(3)]
    places = [rows.add_file(database, store, [("x", [axis(0)])], one)[1][0] for store in stores]
    rows.add_file(database, stores[0], [("x", [axis(0)])], other)
    windows = Windows(database, 1 << 20)
    assert passages_of(ask(windows, stores[:2], axis(0), embedder=one)) == places[:2]


def test_a_file_whose_windows_were_made_again_is_read_again(database):
    embedder = rows.add_embedder(database, "a")
    store = rows.add_store(database, embedder)
    file, [a] = rows.add_file(database, store, [("x", [axis(0)])], embedder)
    windows = Windows(database, 1 << 20)
    assert ask(windows, [store], axis(1)).nearest[0].score == 0
    with rows.connect(database) as connection:
        connection.execute("DELETE FROM knowledge_windows")
        for vector in (axis(1), axis(2)):
            connection.execute(rows.ADD_WINDOW, (store, file, a, embedder, *rows.quantized(vector)))
        connection.execute("UPDATE knowledge_files SET windows = 2")
    answer = ask(windows, [store], axis(1))
    assert answer.windows == 2 and answer.nearest[0].score == pytest.approx(1)


def test_memory_is_bounded_and_a_store_that_does_not_fit_is_searched_all_the_same(database):
    embedder = rows.add_embedder(database, "a", D)
    random = numpy.random.default_rng(1)
    stores = [rows.add_store(database, embedder, with_words=False) for _ in range(3)]
    for store, count in zip(stores, (30, 30, 300)):
        rows.add_file(database, store, [("x", [vector.tolist()]) for vector in unit(random, count)], embedder)
    generous, narrow = Windows(database, 1 << 30), Windows(database, 40 * (D + 24))
    for vector in unit(random, 4):
        for store in (*stores, *stores):
            assert ask(narrow, [store], vector) == ask(generous, [store], vector)
            assert sum(kept.bytes for kept in narrow.kept.values()) <= narrow.kept_bytes
    assert len(generous.kept) == 3 and [key[0] for key in narrow.kept] == [stores[1]]


def test_answers_do_not_depend_on_how_windows_were_read(database, monkeypatch):
    embedder = rows.add_embedder(database, "a", D)
    random = numpy.random.default_rng(2)
    store = rows.add_store(database, embedder, with_words=False)
    growing = Windows(database, 1 << 30)
    wanted = unit(random, 1)[0]
    for _ in range(12):
        passages = [("x", [vector.tolist() for vector in unit(random, 3)]) for _ in range(5)]
        rows.add_file(database, store, passages, embedder)
        answer = ask(growing, [store], wanted, 20)
    for numbers in (D, 5 * D, 1000 * D):
        patch(monkeypatch, scanning, "BLOCK_NUMBERS", numbers)
        assert ask(Windows(database, 1 << 30), [store], wanted, 20) == answer


def test_another_file_in_its_place_is_read_anew(database, tmp_path):
    embedder = rows.add_embedder(database, "a")
    store = rows.add_store(database, embedder)
    rows.add_file(database, store, [("x", [axis(0)])], embedder)
    windows = Windows(database, 1 << 20)
    assert ask(windows, [store], axis(0)).nearest[0].score == pytest.approx(1)
    other = tmp_path / "other.db"
    rows.make_database(other)
    rows.add_store(other, rows.add_embedder(other, "a"))
    rows.add_file(other, 1, [("x", [axis(3)])], 1)
    for ending in ("-wal", "-shm"):
        database.with_name(database.name + ending).unlink(missing_ok=True)
    other.replace(database)
    assert ask(windows, [store], axis(0)).nearest[0].score == 0


def test_vectors_of_another_length_are_said(database):
    embedder = rows.add_embedder(database, "a")
    store = rows.add_store(database, embedder)
    rows.add_file(database, store, [("x", [axis(0)])], embedder)
    with pytest.raises(BadVectors, match="has 4 numbers, and the question's 5"):
        ask(Windows(database, 1 << 20), [store], axis(0, 5))


@pytest.mark.parametrize("edit", [
    "vector = NULL", "vector = 'text'", "vector = 7", "vector = x''", "vector = x'0102'", "vector = zeroblob(100000)", "scale = NULL", "scale = 'text'", "scale = 9e999", "scale = x'00'",
    "passage = NULL", "passage = 'text'", "passage = x'00'", "file = 'text'", "file = 1.5"])
def test_windows_that_were_damaged_are_left_out(database, edit):
    """The others are searched, by the same process, also once the store is kept."""
    embedder = rows.add_embedder(database, "a")
    store = rows.add_store(database, embedder)
    _, passages = rows.add_file(database, store, [(str(i), [axis(i)]) for i in range(3)], embedder)
    rows.add_file(database, rows.add_store(database, embedder), [("x", [axis(0)])], embedder)
    connection = rows.connect(database)
    connection.executescript("PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = replace(sql, ' NOT NULL', '') WHERE name = 'knowledge_windows'; PRAGMA writable_schema = RESET")
    windows = Windows(database, 1 << 20)
    connection.execute(f"UPDATE knowledge_windows SET {edit} WHERE passage = ?", passages[1:2])
    for _ in range(2):
        assert passages_of(ask(windows, [store], axis(1))) == [passages[0], passages[2]]
    connection.execute("DELETE FROM knowledge_windows WHERE number = 2")
    assert passages_of(ask(windows, [store], axis(1))) == [passages[0], passages[2]]
