"""lm-eval's local-completions against the server at argv[1], with the tokenizer in the folder argv[2].

Its tasks are its own, on items in the folder argv[3]: which of two endings is likelier, and what the model
generates. Prints the metrics as JSON.
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

ITEMS = [("The capital of France is", [" banana.", " Paris."], 1), ("The capital of Japan is", [" Tokyo.", " purple."], 0),
         ("Cats and dogs are", [" animals.", " Tuesday."], 0), ("Water is a", [" justice.", " liquid."], 1),
         ("The opposite of hot is", [" cold.", " spoon."], 0)]


def task(name, **more):
    return {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(Path(sys.argv[3]) / "items.jsonl")}},
            "test_split": "test", "doc_to_text": "{{prompt}}", "num_fewshot": 0, **more}


def main():
    lines = [json.dumps({"prompt": prompt, "choices": choices, "label": label}) for prompt, choices, label in ITEMS]
    (Path(sys.argv[3]) / "items.jsonl").write_text("\n".join(lines))
    choose = task("choose", output_type="multiple_choice", doc_to_choice="{{choices}}", doc_to_target="{{label}}", target_delimiter="",
                  metric_list=[{"metric": "acc"}])
    go_on = task("go_on", output_type="generate_until", doc_to_target="{{choices[label]}}",
                 generation_kwargs={"until": ["."], "max_gen_toks": 4, "temperature": 0}, metric_list=[{"metric": "exact_match"}])
    server = {"base_url": sys.argv[1] + "/v1/completions", "model": "default", "tokenizer_backend": "huggingface", "tokenizer": sys.argv[2],
              "num_concurrent": 2, "max_retries": 1}
    found = {}
    for batch_size in (1, 4):
        results = lm_eval.simple_evaluate(model="local-completions", model_args=server | {"tokenized_requests": batch_size > 1},
                                          tasks=[choose, go_on], batch_size=batch_size, bootstrap_iters=0, log_samples=True,
                                          task_manager=TaskManager(include_defaults=False))
        found[batch_size] = {"acc": results["results"]["choose"]["acc,none"],
                             "loglikelihoods": [[score for score, _ in sample["filtered_resps"]] for sample in results["samples"]["choose"]],
                             "generated": [sample["filtered_resps"][0] for sample in results["samples"]["go_on"]]}
    print(json.dumps(found))


main()
