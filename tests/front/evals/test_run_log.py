"""--run-log: TensorBoard's event files, read back by tensorboard itself."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_training
from chatlm.common.errors import ConfigError
from chatlm.front.evals.run_log import RunLog
from fake_pool import serving
from watched import all_known, asked, file_of, mounted, remove, run_folder, run_of, scalars_in, until, watching  # noqa: F401

REPOSITORY = Path(__file__).resolve().parents[3]


def as_float32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


async def test_tensorboard_reads_all_metrics_once(run_folder, watching, client, tmp_path):
    """It reads those of all steps, after any number of starts."""
    list(tiny_training.train(run_folder, 40, 20))
    for number, meta in enumerate(sorted(run_folder.rglob("meta_*.json"))):
        meta.write_text(json.dumps(json.loads(meta.read_text()) | {"val_bpb": 1.25 - number / 8}))
    shutil.copytree(run_folder / "base_checkpoints", run_folder / "chatsft_checkpoints")
    flags = asked(tmp_path) | {"run_log": str(tmp_path / "log")}
    found = []
    for start in range(3):
        if start == 2:      # a pruned step and a new one
            remove(run_folder, 20)
            shutil.copy(file_of(run_folder, 40), file_of(run_folder, 60))
            meta = json.loads(file_of(run_folder, 40).with_name("meta_000040.json").read_text()) | {"val_bpb": 0.5}
            file_of(run_folder, 60).with_name("meta_000060.json").write_text(json.dumps(meta))
        models = await watching(run_folder, **flags)
        async with serving(models, models.settings) as url:
            await until(lambda: all_known(models, 4))
            steps = (await run_of(client, url, "d2"))[1]["steps"]
        await models.close()
        found.append(scalars_in(tmp_path / "log"))
        for run in ("d2-base", "d2-sft"):
            own = {step["step"]: step["metrics"] for step in steps if step["run"] == run}
            for name in {name for metrics in own.values() for name in metrics}:
                expected = [(step, as_float32(metrics[name])) for step, metrics in own.items()]
                assert sorted((step, value) for step, value, _ in found[-1][run][name]) == expected, (start, run, name)
            assert {name for metrics in own.values() for name in metrics} == {*found[-1][run]} >= {"val_bpb", "bits_per_byte", "core_metric"}
    assert found[0] == found[1] and found[2]["d2-sft"] == found[0]["d2-sft"]
    assert [step for step, *_ in sorted(found[2]["d2-base"]["val_bpb"])] == [20, 40, 60]
    step, _, time_s = next(event for event in found[2]["d2-base"]["val_bpb"] if event[0] == 40)
    assert time_s == pytest.approx(file_of(run_folder, step).stat().st_mtime, abs=0.01)


async def test_a_training_s_own_metrics_are_logged(run_folder, watching, tmp_path):
    """Nothing is computed for it."""
    list(tiny_training.train(run_folder, 20, 20))
    meta, = run_folder.rglob("meta_*.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"val_bpb": 1.25, "total_batch_size": 64}))
    models = await watching(run_folder, run_log=str(tmp_path / "log"))
    await until(lambda: (tmp_path / "log" / "d2-base").exists() and "val_bpb" in scalars_in(tmp_path / "log").get("d2-base", ()))
    scalars = scalars_in(tmp_path / "log")["d2-base"]
    assert {name: value for name, ((_, value, _),) in scalars.items()} == {"val_bpb": 1.25, "tokens": 1280}
    await models.close()


def test_foreign_broken_and_removed_logs_do_no_harm(tmp_path, caplog):
    """They are files of other servers, broken ones and removed ones."""
    rows = [(10, 1.0, {"a": 1.0, "b": 2.0}), (20, 2.0, {"a": 3.0})]
    first, second = RunLog(str(tmp_path)), RunLog(str(tmp_path))
    first.write("wide/d4", rows)
    second.write("wide/d4", rows + [(30, 3.0, {"a": 4.0})])
    first.write("wide/d4", rows + [(30, 3.0, {"a": 4.0}), (40, 4.0, {"a": 5.0})])
    expected = {"a": [(10, 1.0, 1.0), (20, 3.0, 2.0), (30, 4.0, 3.0), (40, 5.0, 4.0)], "b": [(10, 2.0, 1.0)]}
    read = scalars_in(tmp_path)["wide/d4"]
    assert {name: sorted(read[name]) for name in read} == expected and len([*(tmp_path / "wide/d4").iterdir()]) == 2
    # one was cut, and one is no event file: what is whole is not written again
    [path] = [path for path in (tmp_path / "wide/d4").iterdir() if path == first.files["wide/d4"].path]
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "wide/d4" / "events.out.tfevents.1").write_bytes(b"what is this?" * 100)
    (tmp_path / "wide/d4" / "events.out.tfevents.2").mkdir()
    third = RunLog(str(tmp_path))
    third.write("wide/d4", rows + [(30, 3.0, {"a": 4.0}), (40, 4.0, {"a": 5.0})])
    assert [*third._scalars_in(third.files["wide/d4"].path)] == [("a", 40, struct.pack("<f", 5.0))]
    # somebody removes the folder: all of the run is written again
    shutil.rmtree(tmp_path / "wide")
    assert third.is_new("wide/d4")
    third.write("wide/d4", rows)
    assert len(scalars_in(tmp_path)["wide/d4"]["a"]) == 2
    ours = [record.message for record in caplog.records if record.name == "chat_server"]     # TensorBoard's reader logs too
    assert not ours or "broken" in ours[0]


def test_only_a_changed_value_is_written(tmp_path):
    log = RunLog(str(tmp_path))
    for value in (0.1, 0.1, 0.2, 0.2, 1e39, 1e40):
        log.write("d4", [(10, 0.0, {"a": value})])
    assert [value for _, value, _ in scalars_in(tmp_path)["d4"]["a"]] == [as_float32(0.1), as_float32(0.2), float("inf")]


@pytest.mark.parametrize("options", ["ro", "size=16k"])
def test_a_full_disk_costs_a_log_one_warning(tmp_path, caplog, options):
    """The file stays whole."""
    folder = tmp_path / "full"
    with mounted(folder, options.replace("ro", "size=1m")):
        log = RunLog(str(folder))
        if options == "ro":
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        metrics = {f"metric {number}": number / 7 for number in range(50)}
        for step in range(20):
            log.write("d4", [(step, 1.0, metrics)])
        assert len(caplog.messages) == 1 and "--run-log" in caplog.messages[0]
        subprocess.run(["mount", "-o", "remount,rw,size=1m", folder], check=True)
        log.write("d4", [(step, 1.0, metrics) for step in range(20)])
        found = scalars_in(folder)["d4"]
        assert {name: [step for step, *_ in found[name]] for name in metrics} == dict.fromkeys(metrics, [*range(20)])


def test_a_log_folder_not_to_be_made_ends_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "log", Path("/proc/log")):
        with pytest.raises(ConfigError, match="--run-log "):
            RunLog(str(path))


FAKES = """raise RuntimeError("it was imported")"""


def test_neither_tensorflow_nor_torch_is_imported(tmp_path):
    """Both are installed, and say so if they are."""
    for name in ("tensorflow", "torch"):
        (tmp_path / "fakes" / name).mkdir(parents=True)
        (tmp_path / "fakes" / name / "__init__.py").write_text(FAKES)
    code = f"""import sys; sys.path[:0] = {[str(tmp_path / "fakes"), *sys.path]!r}
from chatlm.front.evals.run_log import RunLog
for _ in range(2):
    RunLog({str(tmp_path / "log")!r}).write("d4", [(10, 1.0, {{"a": 1.0}})])
print(sorted({{"tensorflow", "torch"}} & {{*sys.modules}}))"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ended.stdout == "[]\n", ended.stderr
    assert scalars_in(tmp_path / "log") == {"d4": {"a": [(10, 1.0, 1.0)]}}


def test_without_tensorboard_a_start_names_pip(tmp_path, run_folder):
    """It ends with the command that installs the package."""
    (tmp_path / "without" / "tensorboard").mkdir(parents=True)
    (tmp_path / "without" / "tensorboard" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'tensorboard'\")")
    list(tiny_training.train(run_folder, 20, 20))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "without"), os.environ.get("PYTHONPATH", "")])}
    ended = subprocess.run([sys.executable, str(REPOSITORY / "chat_server.py"), "--watch", str(run_folder), "--nice", "0", "--port", "0", "--run-log", str(tmp_path / "log")],
                           capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 2 and "--run-log needs the Python package tensorboard" in ended.stderr and "pip install" in ended.stderr
    assert "Traceback" not in ended.stderr and not (tmp_path / "log").exists()
