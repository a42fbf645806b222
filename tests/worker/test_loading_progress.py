"""What a worker tells the front while it loads."""

from types import SimpleNamespace

from chatlm.common.messages.protocol import Loading
from chatlm.worker import process


def test_the_front_is_told_when_it_changes_and_ten_times_a_second(monkeypatch):
    """Each message costs the front time of its own start, and a model has hundreds of tensors."""
    sent = []
    now_s = [5.0]
    monkeypatch.setattr(process, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    progress = process.LoadingProgress(SimpleNamespace(send=sent.append), "cpu")
    for tensor in range(200):
        progress("loading weights", tensor / 200)
        now_s[0] += 2 ** -9  # seconds
    progress("warming up", 0.0)
    assert sent[0] == Loading("loading weights on cpu", 0.0)
    assert sent[-1] == Loading("warming up on cpu", 0.0)
    assert [message.fraction for message in sent[1:-1]] == [number * 52 / 200 for number in (1, 2, 3)]
