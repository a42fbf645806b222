"""What readers of bodies must know of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.messages.protocol import Known

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelFacts
    from chatlm.common.text.tokenizer import Tokenizer


def known_with(settings: Settings, tokenizer: Tokenizer | None, facts: ModelFacts) -> Known:
    """What is known of a model. tokenizer: None while the model is still loading. settings: with the sampling
    defaults of the model's own files."""
    if tokenizer is None:
        return Known(settings, None)
    return Known(settings, tokenizer.tool_format, template=tokenizer.spec.chat_template or "",
                 chats=not tokenizer.continues_texts, never_written=tokenizer.never_written,
                 infill=tokenizer.infill_tokens, embedder=tokenizer.spec.embedder, width=facts.width,
                 native_tools=tokenizer.native_tools)
