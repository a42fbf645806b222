"""What nanochat's own code says of a checkpoint: the half of bench/nanochat_run.py that runs under nanochat's Python.

    NANOCHAT_BASE_DIR=BASE python bench/nanochat_upstream.py CHECKOUT QUESTIONS.json ANSWERS.json

QUESTIONS names a checkpoint, `source`, `tag` and `step`, and what is asked of it. ANSWERS has

- `answers` to `texts`, which it continues, and `chats`, lists of messages that it answers, in at most `max_tokens`: for each the tokens of
  `Engine.generate` at temperature 0, which of them it forced, and by how much each leads the runner-up, in logits
- `bpb`: bits per byte of so many `rows` of the validation shard, by `evaluate_bpb`
- `core`, if that is asked: the metric, by `evaluate_core`
- `items`: of each of CORE's tasks, and of the chat tasks in `tasks`, at most `most` of each, 1 for an item that is right, else 0
- `results`: what `use_calculator` makes of each of `expressions`, as text, or null

It imports nothing of chatlm, and nanochat prints what it likes to stdout.
"""

import json
import sys
from pathlib import Path

import torch


class Judge:
    """A checkpoint as nanochat loads it."""

    def __init__(self, questions):
        from nanochat.checkpoint_manager import load_model
        from nanochat.engine import Engine
        self.model, self.tokenizer, _ = load_model(questions["source"], torch.device("cpu"), phase="eval", model_tag=questions["tag"], step=questions["step"])
        self.engine = Engine(self.model, self.tokenizer)

    def prompts(self, questions):
        """The tokens of each prompt."""
        for text in questions.get("texts", ()):
            yield self.tokenizer.encode(text, prepend="<|bos|>")
        for messages in questions.get("chats", ()):
            yield self.tokenizer.render_for_completion({"messages": [*messages, {"role": "assistant", "content": ""}]})

    def answer(self, prompt, max_tokens):
        """The likeliest answer, to the token that ends it."""
        ends = {self.tokenizer.get_bos_token_id(), self.tokenizer.encode_special("<|assistant_end|>")}
        tokens, forced = [], []
        for [token], [drawn] in self.engine.generate(prompt, max_tokens=max_tokens, temperature=0.0):
            tokens.append(token)
            forced.append(not drawn)
            if token in ends:
                break
        with torch.inference_mode():
            logits = self.model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1:-1]
        best = logits.topk(2).values
        return {"tokens": tokens, "forced": forced, "leads": (best[:, 0] - best[:, 1]).tolist()}

    def bits_per_byte(self, rows):
        from nanochat.dataloader import tokenizing_distributed_data_loader_bos_bestfit
        from nanochat.loss_eval import evaluate_bpb
        from nanochat.tokenizer import get_token_bytes
        loader = tokenizing_distributed_data_loader_bos_bestfit(self.tokenizer, 1, self.model.config.sequence_len, "val", device="cpu")
        return evaluate_bpb(self.model, loader, rows, get_token_bytes("cpu"))

    def core(self):
        """(the CORE metric, {task: a digit for each item})"""
        from nanochat import core_eval
        from scripts import base_eval
        digits = []
        core_eval.evaluate_example = noting(core_eval.evaluate_example, digits)
        found = base_eval.evaluate_core(self.model, self.tokenizer, torch.device("cpu"))
        text, items = "".join(digits), {}
        for label, path in core_tasks(base_eval.get_base_dir()):
            count = len(path.read_text().splitlines())
            items[label], text = text[:count], text[count:]
        return found["core_metric"], items

    def chat_task(self, label, most):
        """A digit for each item of a chat task, in the order in which nanochat asks them."""
        from scripts import chat_eval
        digits = []
        kind = chat_eval.MMLU if label == "MMLU" else chat_eval.GSM8K if label == "GSM8K" else chat_eval.ARC
        whole, kind.evaluate = kind.evaluate, noting(kind.evaluate, digits)
        chat_eval.run_chat_eval(label, self.model, self.tokenizer, self.engine, batch_size=4, max_problems=most)
        kind.evaluate = whole
        return "".join(digits)


def noting(judge, digits):
    """A function of nanochat's that says whether an item is right, which also notes it."""
    def noted(*arguments, **named):
        right = judge(*arguments, **named)
        digits.append(str(int(right)))
        return right
    return noted


def core_tasks(base):
    import yaml
    folder = Path(base) / "eval_bundle"
    for task in yaml.safe_load((folder / "core.yaml").read_text())["icl_tasks"]:
        yield task["label"], folder / "eval_data" / task["dataset_uri"]


def calculated(expressions):
    from nanochat.engine import use_calculator
    results = map(use_calculator, expressions)
    return [None if result is None else str(result) for result in results]


def main(checkout, questions, answers):
    sys.path.insert(0, checkout)
    questions, found, items = json.loads(Path(questions).read_text()), {}, {}
    judge = Judge(questions)
    found["answers"] = [judge.answer(prompt, questions["max_tokens"]) for prompt in judge.prompts(questions)]
    if rows := questions.get("rows"):
        found["bpb"] = judge.bits_per_byte(rows)
    if questions.get("core"):
        found["core"], items = judge.core()
    for label in questions.get("tasks", ()):
        items[label] = judge.chat_task(label, questions["most"])
    found |= {"items": items, "results": calculated(questions.get("expressions", ()))}
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
