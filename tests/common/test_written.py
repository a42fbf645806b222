"""What nanochat's training has written about its checkpoints is read as its loop means it, and broken files say nothing."""

import json
import os

import pytest

from chatlm.common.hub import recorded_metrics
from chatlm.common.hub.recorded_metrics import Logs, is_stale, written_beside

BASE = {"val_bpb": 1.25, "user_config": {"depth": 4, "eval_every": 250, "save_every": 100, "num_iterations": -1}}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "base_checkpoints" / "d4" / "model_000200.pt"
    path.parent.mkdir(parents=True)
    return path


def write(model, meta):
    model.with_name("meta_000200.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    return written_beside(model)


def loop_of_base_train(steps, eval_every, save_every):
    """(step, whether its val_bpb is that of an earlier one) of each checkpoint, by the loop of upstream's base_train.py."""
    evaluated = None
    for step in range(steps + 1):
        last_step = step == steps
        if eval_every > 0 and (last_step or step % eval_every == 0):
            evaluated = step
        if last_step or (step > 0 and save_every > 0 and step % save_every == 0):
            yield step, evaluated != step


@pytest.mark.parametrize("steps", (95, 100))
@pytest.mark.parametrize("eval_every", (-1, 10, 25, 30, 1000))
@pytest.mark.parametrize("save_every", (-1, 10, 50))
def test_a_val_bpb_of_an_earlier_step_is_stale(steps, eval_every, save_every):
    """A val_bpb of an earlier step is stale, as the loop of base_train says."""
    config = {"depth": 4, "eval_every": eval_every, "save_every": save_every, "num_iterations": steps}
    for step, stale in loop_of_base_train(steps, eval_every, save_every):
        assert is_stale({"user_config": config}, step) == stale, step
        if step < steps or step % save_every:       # without a number of steps, one that is saved in turn is not the last
            assert is_stale({"user_config": config | {"num_iterations": -1}}, step) == stale, step


def test_chat_sft_s_val_bpb_is_that_of_its_end():
    """The val_bpb of chat_sft is that of its end, also without evaluations before."""
    for eval_every in (-1, 200):
        assert not is_stale({"user_config": {"eval_every": eval_every, "num_iterations": -1}}, 449)


def test_only_a_val_bpb_has_the_mark(model):
    assert write(model, BASE) == ({"val_bpb": 1.25}, ("val_bpb",))
    for changed in ({"val_bpb": None}, {"val_bpb": float("inf")}, {"user_config": {}}, {"user_config": [1]}, {"user_config": {"eval_every": "250"}}):
        assert write(model, BASE | changed).stale == ()


def test_the_training_loss_is_the_one_in_the_log(model):
    average, beta = 0.0, 0.9
    for step in range(200):
        loss = 5 - step / 100
        average = beta * average + (1 - beta) * loss
        printed = average / (1 - beta ** (step + 1))
        if step == 4:
            early, of_early = average, printed
    metrics = write(model, {"loop_state": {"smooth_train_loss": average}}).metrics
    assert metrics == {"train_loss": pytest.approx(printed, rel=1e-12)}
    model = model.with_name("model_000005.pt")
    model.with_name("meta_000005.json").write_text(json.dumps({"loop_state": {"smooth_train_loss": early}}))
    assert written_beside(model).metrics["train_loss"] == pytest.approx(of_early) and of_early > 2 * early
    model.with_name("meta_000000.json").write_text(json.dumps({"loop_state": {"smooth_train_loss": 0}}))
    assert written_beside(model.with_name("model_000000.pt")).metrics == {}


@pytest.mark.parametrize("meta", ("", "{", "[]", "null", "[" * 100_000, '{"val_bpb": NaN, "loop_state": {"smooth_train_loss": -Infinity}}',
                                  '{"val_bpb": "1.2", "loop_state": 7, "user_config": "x", "reward": true, "total_batch_size": 1e999}'))
def test_a_broken_meta_file_says_nothing(model, meta):
    assert write(model, meta) == ({}, ())


def test_a_reward_that_a_fork_writes_is_taken(model):
    assert write(model, {"reward": -0.25}).metrics == write(model, {"loop_state": {"reward": -0.25}}).metrics == {"reward": -0.25}


RL_LOG = """Calculated number of steps: 467
Step 0 | Pass@1: 0.0100, Pass@2: 0.0200
Step 0/467 | Example step 0 | Pass 0 | loss: 0.000012 | Average reward: 0.9
Step 0/467 | Average reward: 0.0625 | Average sequence length: 120.10
Step 60/467 | Average reward: nan | Average sequence length: 120.10
Step 61/467 | Average reward: 0.125 | Average sequence length: 120.10
Step 61/467 | Average reward: 0.25 | Average sequence length: 119.00
Step 62/467 | Average reward: 0.5.5 | Average
Step 63/467 | Average reward: 0.1"""
SFT_LOG = """step 00448 (99.78%) | loss: 1.300000 | lrm: 0.00 | dt: 1.00ms | tok/sec: 1 | mfu: 0.00 | epoch: 1 | total time: 0.10m
step 00449 (100.00%) | loss: 1.250000 | lrm: 0.00 | dt: 1.00ms | tok/sec: 1 | mfu: 0.00 | epoch: 1 | total time: 0.10m
step 00450/00999 (45.05%) | loss: 9.000000 | base_train's counts from 0
"""


def test_rewards_and_losses_are_read_from_logs(tmp_path):
    """Rewards of RL and losses of SFT."""
    tag = tmp_path / "experiments" / "default" / "d4"
    for stage in ("sft", "rl"):
        (tag / stage).mkdir(parents=True)
    (tag / "rl.log").write_text(RL_LOG)
    (tag / "sft" / "chat_sft.log").write_text(SFT_LOG)
    assert Logs().metrics_of(tag / "rl" / "model_000061.pt") == {0: {"reward": 0.0625}, 61: {"reward": 0.25}}
    assert Logs().metrics_of(tag / "sft" / "model_000449.pt") == {448: {"train_loss": 1.3}, 449: {"train_loss": 1.25}}
    assert Logs().metrics_of(tag / "base" / "model_000449.pt") == {}
    folder = tmp_path / "chatrl_checkpoints" / "d4"
    folder.mkdir(parents=True)
    (folder.parent / "chat_rl.log").write_text(RL_LOG)      # another tag may have written it
    assert Logs().metrics_of(folder / "model_000061.pt") == {}
    (folder / "chat_rl.log").write_text(RL_LOG)
    assert len(Logs().metrics_of(folder / "model_000061.pt")) == 2


def test_of_a_huge_log_only_the_end_is_read(model, monkeypatch):
    """Of a huge log only the end is read, and only after it has changed."""
    folder = model.parent.parent.parent / "chatrl_checkpoints" / "d4"
    folder.mkdir(parents=True)
    log, reads, logs = folder / "rl.log", [], Logs()
    with log.open("wb") as file:
        file.write(RL_LOG.encode().replace(b"Step 61", b"Step 7"))
        file.truncate(1 << 40)      # sparse
        file.seek(0, os.SEEK_END)
        file.write(b"\nStep 90/467 | Average reward: 0.75 | Average sequence length: 1.00\n")
    found = recorded_metrics.re.compile(recorded_metrics.REWARD.pattern, recorded_metrics.re.MULTILINE)

    class Seen:
        def findall(self, data):
            reads.append(len(data))
            return found.findall(data)

    monkeypatch.setattr(recorded_metrics, "REWARD", Seen())
    for _ in range(3):
        assert logs.metrics_of(folder / "model_000090.pt") == {90: {"reward": 0.75}}
    assert reads == [recorded_metrics.TAIL_BYTES]
    with log.open("ab") as file:
        file.write(b"Step 91/467 | Average reward: 1 | Average sequence length: 1.00\n")
    assert logs.metrics_of(folder / "model_000090.pt")[91] == {"reward": 1.0} and len(reads) == 2


def test_a_log_is_no_link_pipe_or_folder(tmp_path):
    folder = tmp_path / "chatrl_checkpoints" / "d4"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere.log").write_text(RL_LOG)
    (folder / "rl.log").symlink_to(tmp_path / "elsewhere.log")
    os.mkfifo(folder / "chat_rl.log")
    assert Logs().metrics_of(folder / "model_000061.pt") == {}
