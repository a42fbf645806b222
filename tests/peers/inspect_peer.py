"""inspect_ai against the server at argv[1], in the folder argv[2]: its tasks with chats, and with prompts of token ids whose
log-probabilities it sums (argv[3]: these, in JSON). Prints what each sample got as JSON."""

import json
import os
import sys
from pathlib import Path

os.chdir(sys.argv[2])
os.environ |= {"LOCAL_API_KEY": "none", "LOCAL_BASE_URL": sys.argv[1] + "/v1", "INSPECT_LOG_DIR": str(Path(sys.argv[2]) / "logs")}

from inspect_ai import Task, eval as evaluate  # noqa: E402
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import ChatMessageUser, GenerateConfig  # noqa: E402
from inspect_ai.scorer import Score, includes, mean, scorer  # noqa: E402
from inspect_ai.solver import generate  # noqa: E402


@scorer(metrics=[mean()])
def loglikelihood():
    async def score(state, target):
        found = state.output.choices[0].prompt_logprobs.content
        return Score(value=sum(one.logprob for one in found if one is not None and one.logprob is not None), answer=json.dumps([one.logprob for one in found]))

    return score


def run(task, model, **config):
    log, = evaluate(task, model=model, display="none", log_samples=True, max_connections=8, **config)
    if log.status != "success":
        raise SystemExit(str(log.error))
    return log


def main():
    chats = Task(dataset=[Sample(input="What is the capital of Japan? Answer with its name.", target="Tokyo"),
                          Sample(input="What is the capital of France? Answer with its name.", target="Paris")], solver=generate(), scorer=includes())
    found = {"accuracy": run(chats, "openai-api/local/default", temperature=0, max_tokens=30).results.scores[0].metrics["accuracy"].value}
    samples = [Sample(input=[ChatMessageUser(content="ignored", metadata={"prompt_token_ids": ids})], target="x") for ids in json.loads(sys.argv[3])]
    ids = Task(dataset=samples, solver=generate(), scorer=loglikelihood(), config=GenerateConfig(prompt_logprobs=1, max_tokens=1, temperature=0))
    log = run(ids, "openai-api-completions/local/default")
    found["sums"] = [sample.scores["loglikelihood"].value for sample in log.samples]
    found["each"] = [json.loads(sample.scores["loglikelihood"].answer) for sample in log.samples]
    print(json.dumps(found))


main()
