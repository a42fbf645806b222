"""Errors in the words that clients look for.

Agents and libraries decide by an error's text, its `code` or its `type` what they do next: shorten the
conversation, wait, choose another model, ask for another key. As of November 2026 they look for:

| error | words | who looks for them |
|---|---|---|
| a prompt is too long | `This model's maximum context length is 8192 tokens` | LiteLLM: aider, OpenHands |
| | `Please reduce the length of the messages` | OpenHands, pi |
| | `context_length_exceeded` | LangChain, Cline, Roo Code |
| | `prompt is too long: 9031 tokens > 8192 maximum` | Claude Code, LiteLLM, LangChain |
| too many requests | `Rate limit`, `rate_limit_exceeded`, `rate_limit_error` | LiteLLM, Cline, opencode |
| | `try again in 5s` | Codex |
| a key's tokens are used up | `insufficient_quota`, `exceeded your current quota` | OpenHands: no retry |
| no room | `overloaded`, `Overloaded`, `overloaded_error` | LiteLLM, Claude Code, opencode |
| an unknown model | `model_not_found`, `does not exist` | LiteLLM |
| | `model 'NAME' not found` | Continue, which then says how to pull it |
| an unknown key | `Incorrect API key provided` | LiteLLM, for which all else is a bad request |
| | `x-api-key` | Claude Code |
| a body is too large | `request entity too large`, `exceeds the maximum size` | pi |
| an image is damaged | DAMAGED_IMAGE | Codex, which then leaves it out |
| the server's fault | SERVER_ERROR | LiteLLM |

Their patterns take digits without commas. LiteLLM takes `Request too large` for a rate limit, so no error
says that."""

from __future__ import annotations

from chatlm.common.errors import Overloaded, RequestError, shown

ANTHROPIC = "anthropic"
OLLAMA = "ollama"
TOO_LONG = "context_length_exceeded"  # a code
# How messages begin that are made elsewhere
DAMAGED_IMAGE = "The image data you provided does not represent a valid image"
SERVER_ERROR = "The server had an error processing your request."


def too_long(tokens: int, longest: int, what: str, param: str, bound: str = "") -> RequestError:
    """A prompt has so many tokens, of which the model reads `longest`, its answer included.

    what: the prompt, as a client calls it: "messages", "prompt". bound: words before the number, where the
    tokens were not counted to the end."""
    room = ", which leaves no room for an answer" if tokens <= longest else ""
    message = (f"This model's maximum context length is {longest} tokens. However, your {what} resulted in "
               f"{bound}{tokens} tokens{room}. Please reduce the length of the {what}.")
    return RequestError(message, code=TOO_LONG, param=param, words={
        ANTHROPIC: f"prompt is too long: {bound}{tokens} tokens > {min(longest, tokens - 1)} maximum",
        OLLAMA: f"the input length exceeds the context length: {bound}{tokens} tokens, at most "
                f"{min(longest, tokens - 1)}"})


def too_large_to_count(reason: str, param: str | None = None) -> RequestError:
    """A conversation is so large that its tokens are not counted."""
    message = (f"The messages exceed context limits (context length exceeded): {reason}. "
               "Please reduce the length of the messages.")
    return RequestError(message, code=TOO_LONG, param=param,
                        words={ANTHROPIC: f"prompt is too long: {reason}"})


def rate_limited(reason: str, retry_after_s: int = 1) -> Overloaded:
    """A client has, or all clients have, too many requests under way."""
    return Overloaded(f"Rate limit reached: {reason}. Please try again in {retry_after_s}s.",
                      retry_after_s=retry_after_s, status=429)


def quota_used(reason: str, retry_after_s: int) -> Overloaded:
    """A key has used its tokens. Clients need not try again soon."""
    refused = Overloaded(f"You exceeded your current quota: {reason}. Please try again in {retry_after_s}s.",
                         retry_after_s=retry_after_s, status=429)
    refused.code = "insufficient_quota"
    refused.type = "insufficient_quota"
    return refused


def overloaded(reason: str, retry_after_s: int = 1) -> Overloaded:
    """There is no room now."""
    return Overloaded(f"The server is currently overloaded: {reason}. Please try again in {retry_after_s}s.",
                      retry_after_s=retry_after_s,
                      words={ANTHROPIC: f"Overloaded: {reason}. Please try again in {retry_after_s}s."})


def shutting_down() -> Overloaded:
    """The server stops; another one, or this one once it runs again, can answer."""
    return Overloaded("the server is shutting down", retry_after_s=10)


def no_such_model(name: str, what: str, remedy: str) -> RequestError:
    """what: why it is not here, such as "does not exist"; remedy: what else there is."""
    plain = shown(name)[1:].removesuffix('"')
    return RequestError(f"The model `{plain}` {what}; {remedy}", status=404, code="model_not_found",
                        param="model", words={ANTHROPIC: f"model: {plain} {what}; {remedy}",
                                              OLLAMA: f"model '{plain}' not found: it {what}; {remedy}"})


def key_needed() -> RequestError:
    reason = "this server needs an API key: Authorization: Bearer KEY"
    return _bad_key(f"Incorrect API key provided: none; {reason}", f"x-api-key header is required: {reason}",
                    reason)


def key_unknown() -> RequestError:
    reason = "this server does not know the API key"
    return _bad_key(f"Incorrect API key provided: {reason}", f"invalid x-api-key: {reason}", reason)


def _bad_key(message: str, anthropic: str, reason: str) -> RequestError:
    return RequestError(message, status=401, code="invalid_api_key",
                        words={ANTHROPIC: anthropic, OLLAMA: f"unauthorized: {reason}"})


def too_large(most: int, what: str = "the body", code: str = "request_entity_too_large",
              param: str | None = None) -> RequestError:
    """A body, or a part of one, has more than `most` bytes."""
    return RequestError(f"Request entity too large: {what} exceeds the maximum size of {most} bytes",
                        status=413, code=code, param=param)
