"""Random rows for sampling: every combination of parameters, every kind of logits."""

import numpy as np

from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.ops.rows import SampleRow

NO_LOGIT = np.float32(-np.inf)


def random_rows(rng, count, vocabulary):
    """Rows with every combination of parameters, most of them near a boundary."""
    choose = lambda *options: options[rng.integers(len(options))]
    rows = []
    for _ in range(count):
        tokens = tuple(rng.integers(0, vocabulary, rng.integers(1, 30)).tolist())
        penalized = rng.random() < 0.3
        rows.append(SampleRow(SamplingParams(
            temperature=choose(0.0, 1e-6, 0.3, 0.8, 1.0, 1.7, 100.0), seed=int(rng.integers(2**63)) * 2 + 1,
            top_k=int(choose(0, 0, 1, 2, 50, 1024, 1500, vocabulary - 1, vocabulary, vocabulary + 1)),
            top_p=float(choose(1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.95, 1 - 2**-32)),
            min_p=float(choose(0.0, 0.0, 0.0, 0.02, 0.5, 1.0)), choice=int(rng.integers(4)),
            repetition_penalty=choose(1.0, 1.3, 0.7) if penalized else 1.0,
            frequency_penalty=choose(0.0, 0.4, -0.4) if penalized else 0.0,
            presence_penalty=choose(0.0, 0.6, -2.0) if penalized else 0.0,
            logit_bias=choose((), ((tokens[0], 3.5), (0, -100.0))) if penalized else (),
        ), int(choose(0, 1, 77, 2**31, 2**32 + 5, rng.integers(2**40))), tokens, int(rng.integers(len(tokens)))))
    return rows


def random_logits(rng, count, vocabulary):
    """Logits of every kind: spread out, coarse (many ties), equal, sparse, extreme, with NaN and
    infinities."""
    logits = rng.normal(0, rng.choice([0.01, 1, 3, 30], (count, 1)), (count, vocabulary)).astype(np.float32)
    for row, kind in zip(logits, rng.integers(12, size=count)):
        if kind == 0:
            row[:] = np.round(row)
        elif kind == 1:
            row[:] = rng.choice([0.0, -0.0, 1.5])
        elif kind == 2:
            row[:] = NO_LOGIT
            row[rng.integers(vocabulary)] = 1.0 if rng.random() < 0.8 else NO_LOGIT
        elif kind == 3:
            row *= np.float32(1e30)
        elif kind == 4:
            row[rng.integers(vocabulary, size=5)] = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30], 5)
        elif kind == 5:
            row[:] = rng.permutation(vocabulary) % 7
        elif kind == 6:
            row[rng.random(vocabulary) < 0.9] = NO_LOGIT
    return logits
