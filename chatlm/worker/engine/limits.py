"""How large a step of the engine may be."""

from dataclasses import dataclass


# So many rows in a step of decode_core take hardly longer than one row: on a CPU, and on a GPU with bfloat16,
# not with packed weights.
FREE_ROWS = 8


@dataclass
class StepLimits:
    """The most that a step may have."""

    max_batch: int           # running sequences, but for those that are set aside
    prefill_chunk: int       # tokens of prompts
    max_rows: int            # rows of logits
    stages: int = 1          # of the model; as many steps may be under way
    exact_rows: bool = True  # may a step have drafts beside prompts, or in many rows?
    of_texts: bool = False   # is each prompt a text that must be computed in one step?

    @property
    def draft_rows(self) -> int:
        """Rows of logits in a step with drafts."""
        return max(self.max_rows if self.exact_rows else 0, FREE_ROWS)
