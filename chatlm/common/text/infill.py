"""Which tokens of a vocabulary a model fills in the middle of a text with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.messages.requests import InfillTokens

if TYPE_CHECKING:
    from chatlm.common.text.tokenizer import Tokenizer


NAMES = {  # field of InfillTokens -> the names that its token has in one family or another
    "prefix": ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "<\uff5cfim\u2581begin\uff5c>", "<PRE>",
               "\u2581<PRE>", "<|code_prefix|>", "<|prefix|>"),
    "suffix": ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<\uff5cfim\u2581hole\uff5c>", "<SUF>",
               "\u2581<SUF>", "<|code_suffix|>", "<|suffix|>"),
    "middle": ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "<\uff5cfim\u2581end\uff5c>", "<MID>",
               "\u2581<MID>", "<|code_middle|>", "<|middle|>"),
    "pad": ("<|fim_pad|>", "<fim_pad>", "<fim-pad>"),
    "repository": ("<|repo_name|>", "<|fim_repo|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "file": ("<|file_sep|>",),
}
# Where a model ends its text, whatever its files call eos. StarCoder2 and Granite write the name of a file
# in another place than Qwen2.5-Coder, so the tokens before these names end a gap but begin no prompt.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<EOT>", "\u2581<EOT>", "<|eot_id|>",
        "<end_of_turn>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<file_sep>", "<repo_name>",
        "<filename>", "<|file_separator|>")


def infill_tokens_of(tokenizer: Tokenizer) -> InfillTokens:
    """The infill tokens of a vocabulary: those that its file tells of, else those with a known name."""
    named = tokenizer.named_tokens
    found = [next((named[name] for name in names if name in named), None) if told is None else told
             for told, names in zip(tokenizer.spec.infill[:6], NAMES.values())]
    ends = {*found[3:], *(named[name] for name in ENDS if name in named)} - {None}
    return InfillTokens._make([*found, tuple(sorted(ends))])
