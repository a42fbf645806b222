"""Folders of causal models that score or label texts and write none. Only rerankers are computed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from chatlm.common.errors import ConfigError, shown
from chatlm.worker.weights.families.table import FAMILIES

SCORE = "score.weight"  # a folder's single row
# architectures of a config.json whose models score or label texts, and write none
CLASSIFIERS = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|Reward")
CANNOT = ("such a model scores or labels texts and writes none; of causal models this server ranks with "
          "Qwen3-Reranker alone")


def refuse_classifier(path: Path, config: Mapping, family: str):
    """ConfigError for a config.json of a causal model that classifies or gives rewards: no matrix of it makes
    tokens."""
    for name in architectures_of(config):
        may_rank = FAMILIES[family].has_rerankers and name.endswith("ForSequenceClassification")
        if CLASSIFIERS.search(name) and not may_rank:
            raise ConfigError(f"{path}: architectures is {shown(name)}; {CANNOT}")


def architectures_of(config: Mapping) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
