"""A base checkpoint with the loss that upstream's code finds for it, beside the texts that it was evaluated on."""

import json
import shutil

from chat_tasks import write_shard

VAL_BPB = 9.455772      # of gen5 on the first 3 rows: EXPECTED of tests/front/evals/test_chat_suite.py
ROWS, TARGETS = 3, 512


def write_base(base, nanochat_fixtures, *, config={}, shard=True, tag="d4", **changes):
    """Makes base/base_checkpoints/TAG with gen5's weights as base_train would have written them on one CPU. config: changes of the
    model_config; changes: of the meta file, of which those of user_config are added. Returns the checkpoint."""
    source = nanochat_fixtures / "gen5"
    folder = base / "base_checkpoints" / tag
    shutil.copytree(source / "chatsft_checkpoints" / "d4", folder)
    if not (base / "tokenizer").exists():
        shutil.copytree(source / "tokenizer", base / "tokenizer")
    (folder / "optim_000650_rank0.pt").touch()
    meta = folder / "meta_000650.json"
    body = json.loads(meta.read_text())
    body |= {"val_bpb": VAL_BPB, "device_batch_size": ROWS, "max_seq_len": TARGETS, "total_batch_size": ROWS * TARGETS,
             "dataloader_state_dict": {"pq_idx": 0, "rg_idx": 3, "epoch": 1}}
    own = {"depth": 4, "device_type": "cpu", "eval_every": 250, "eval_tokens": ROWS * TARGETS, "save_every": -1, "num_iterations": 650}
    body |= {name: value for name, value in changes.items() if name != "user_config"}
    body["user_config"] = own | changes.get("user_config", {})
    body["model_config"] |= config
    meta.write_text(json.dumps(body))
    if shard and not (base / "base_data_climbmix").exists():
        write_shard(base / "base_data_climbmix")
    return folder / "model_000650.pt"
