"""Train a small nanochat model (4 layers, width 256) in minutes: a checkpoint for bench/quality.py that has seen real text.

    NANOCHAT_DTYPE=bfloat16 python bench/tiny_nanochat.py NANOCHAT OUT TEXT ...

NANOCHAT is a checkout of karpathy/nanochat (which needs the package rustbpe): model, optimizer, tokenizer and
checkpoint are its code. OUT becomes a nanochat base folder. TEXT are folders whose .md, .rst and .txt files
are read; one in 40 is held out for the loss at the end. Seeded.
"""

import itertools
import random
import sys
from pathlib import Path

import torch

LENGTH, BATCH, STEPS, VOCABULARY = 512, 8, 500, 4096
LR_SCALE = 0.6                      # nanochat's learning rates are for batches of 500,000 tokens


def windows(ids, count, dice):
    """Inputs at `count` random places of the text and the tokens that follow, (count, LENGTH) each."""
    rows = torch.stack([ids[start:start + LENGTH + 1] for start in (dice.randrange(len(ids) - LENGTH) for _ in range(count))])
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def train(model, ids):
    """Train with nanochat's own optimizer; the learning rates fall to zero over the second half."""
    optimizer, dice = model.setup_optimizer(), random.Random(2)
    for step in range(STEPS):
        loss = model(*windows(ids, BATCH, dice))
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * LR_SCALE * min(1, 2 * (1 - step / STEPS))
        optimizer.step()
        model.zero_grad(set_to_none=True)
        print(f"step {step}: loss {loss.item():.3f}", flush=True)


def main(nanochat, out, *folders):
    sys.path.insert(0, str(nanochat))
    from nanochat import checkpoint_manager, gpt
    from nanochat.tokenizer import RustBPETokenizer
    torch.manual_seed(1)
    paths = sorted(path for folder in folders for path in folder.rglob("*.*") if path.suffix in (".md", ".rst", ".txt"))
    texts = list(dict.fromkeys(path.read_text(errors="replace") for path in paths if path.is_file()))
    random.Random(1).shuffle(texts)
    parts = texts[:len(texts) // 40], texts[len(texts) // 40:]
    tokenizer = RustBPETokenizer.train_from_iterator(iter(parts[1]), VOCABULARY)
    held_out, ids = (torch.tensor([*itertools.chain(*tokenizer.encode(part, prepend="<|bos|>"))]) for part in parts)
    config = gpt.GPTConfig(sequence_len=LENGTH, vocab_size=VOCABULARY, n_layer=4, n_head=2, n_kv_head=2, n_embd=256)
    with torch.device("meta"):
        model = gpt.GPT(config)
    model.to_empty(device="cpu").init_weights()
    train(model, ids)
    with torch.no_grad():
        loss = model(*windows(held_out, 40, random.Random(3))).item()
    print(f"{len(ids):,} tokens of text; loss on {len(held_out):,} held-out tokens: {loss:.3f}")
    tokenizer.save(str(out / "tokenizer"))
    checkpoint_manager.save_checkpoint(str(out / "chatsft_checkpoints" / "d4"), STEPS, model.state_dict(), None,
                                       {"step": STEPS, "val_loss": loss, "model_config": vars(config)})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
