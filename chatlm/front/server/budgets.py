"""The budgets of API keys: how many tokens a day each may use, and what its running requests take of them.

Only servers load this whose keys have `tokens-per-day=`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence as Seq
from contextlib import contextmanager
from typing import NamedTuple, TYPE_CHECKING

from chatlm.common.client_words import quota_used, rate_limited
from chatlm.common.errors import Overloaded
from chatlm.front.server.ledger import MOST_ROWS, seconds_to_midnight, today
from chatlm.front.server.responses import REQUEST_LOG

if TYPE_CHECKING:
    from chatlm.common.config import ApiKey
    from chatlm.common.messages.requests import Request
    from chatlm.front.server.ledger import Amount, Charge, UsageRow


ASSUMED = 256      # tokens of its key's budget that an answer without max_tokens takes at a time
PICTURED = 4096    # that a picture is thought to have, until its prompt is laid out


class Claim(NamedTuple):
    """The tokens that the answers to a request may take from its key's budget."""

    answers: int  # to all of its prompts
    most: int     # tokens of an answer; without max_tokens, the first ASSUMED
    grows: bool   # it has no max_tokens, so an answer may get more


def claim_of(request: Request, context_length: int) -> Claim:
    """The claim of a request to a model with this context (0: not known)."""
    answers = max(len(request.prompts), 1) * request.n
    if request.params.pooling:
        return Claim(answers, 0, False)
    if request.max_tokens is None:
        return Claim(answers, ASSUMED, True)
    return Claim(answers, min(request.max_tokens, context_length or request.max_tokens), False)


def beyond_one(claims: Iterable[Claim]) -> int:
    """The tokens of all answers to several requests but the longest. One answer may always exceed the
    budget."""
    claims = [*claims]
    longest = max((claim.most for claim in claims), default=0)
    return sum(claim.most * claim.answers for claim in claims) - longest


def prompt_estimate(request: Request) -> int:
    """The tokens of the prompts. A text that is not tokenized yet counts a token for each byte."""
    if request.prompt_ids is not None:
        return sum(map(len, request.prompt_ids))
    texts = [message.content for message in request.messages or ()]
    texts += [prompt for prompt in request.prompts if isinstance(prompt, str)]
    ids = sum(len(prompt) for prompt in request.prompts if not isinstance(prompt, str))
    pictures = sum(len(message.pictures) for message in request.messages or ())
    return ids + sum(len(text.encode("utf-8", "replace")) for text in texts) + PICTURED * pictures


class Reservation:
    """What a running request takes of its key's budget."""

    def __init__(self, budgets: Budgets, key: ApiKey, request: Request, charge: Charge, context_length: int):
        self.budgets = budgets
        self.key = key
        self.charge = charge
        self.claim = claim_of(request, context_length)
        self.estimate = prompt_estimate(request)  # tokens of its prompts, until they are counted
        self.granted: dict[int, int] = {}         # by choice: what answers without max_tokens may have
        # called when an answer without max_tokens has used its grant; the answer gets more, or is ended
        self.more: Callable[[int], None] = lambda choice: None

    def note_tokens(self, choice: int):
        """An answer has got tokens."""
        if self.claim.grows and self.charge.taken(choice) >= self.grant(choice):
            self.more(choice)

    def grant(self, choice: int) -> int:
        """The tokens that an answer may have."""
        return self.granted.get(choice, self.claim.most)

    def grow(self, choice: int, alone: bool = False) -> bool:
        """Grant an answer without max_tokens ASSUMED tokens more, if the budget has them. Returns whether it
        did.

        alone: exceed the budget if nothing else of the key runs."""
        budgets = self.budgets
        key = self.key
        fits = not key.refused or budgets.fits(key, budgets.reserved(key), 0)
        if not fits and not (alone and len(budgets.running[key.name]) == 1):
            return False
        while self.charge.taken(choice) >= self.grant(choice):
            self.granted[choice] = self.grant(choice) + ASSUMED
        return True

    def check_prompt(self):
        """Once the prompts are counted: raise Overloaded if they do not fit into what earlier requests have
        left of the budget, and such a key is to be refused."""
        if not self.key.refused:
            return
        needed = sum(self.charge.prompt_tokens) + beyond_one([self.claim])
        if not self.budgets.fits(self.key, self.budgets.reserved(self.key, before=self), needed):
            raise self.budgets.refusal(self.key, needed)

    def release(self):
        self.budgets.release(self)

    @property
    def tokens(self) -> int:
        """Its prompts, and all tokens that its answers may have. For an answer without max_tokens these are
        the next ASSUMED."""
        charge = self.charge
        running = {*charge.drawn, *charge.held}
        not_begun = self.claim.answers - len(charge.ended) - len(running)
        prompts = sum(charge.prompt_tokens) if charge.prompt_tokens else self.estimate
        granted = sum(max(self.grant(choice), charge.taken(choice)) for choice in running)
        return prompts + charge.completed + self.claim.most * not_begun + granted


class Budgets:
    """What keys with `tokens-per-day=` have used today, and what their running requests take."""

    def __init__(self, keys: Seq[ApiKey]):
        self.keys = {key.name: key for key in keys if key.tokens_per_day is not None}
        self.used: Counter[tuple[str, str]] = Counter()  # (day, key) -> tokens
        # by key, in the order of their begin
        self.running: dict[str, dict[Reservation, None]] = defaultdict(dict)
        self.pledges: dict[str, Charge] = {}  # by the ids of requests that are about to begin

    def count(self, row: UsageRow, amount: Amount):
        """Count what a request has used."""
        self.used[row.day, row.key] += amount.tokens
        while len(self.used) > MOST_ROWS:
            del self.used[min(self.used)]

    # before a request begins

    def checked(self, client: str, works: Iterable[tuple[Request, int]]) -> bool:
        """Whether requests must run in the background, because the client's key has used its tokens of today.
        Then a header of the response says so. Each comes with its model's context.

        Raises Overloaded if such a key is to be refused."""
        is_over = self.is_over(client, works)
        if is_over:
            REQUEST_LOG.get().headers["X-Over-Budget"] = f"background; renewed in {seconds_to_midnight()} s"
        return is_over

    def is_over(self, client: str, works: Iterable[tuple[Request, int]] = ()) -> bool:
        """The same without the header."""
        key = self.keys.get(client)
        if key is None:
            return False
        needed = beyond_one(claim_of(*work) for work in works)
        if self.fits(key, self.reserved(key), needed):
            return False
        if key.refused:
            raise self.refusal(key, needed)
        return True

    def wait_s(self, client: str) -> int:
        """Seconds until a client's line of a batch may begin; 0 if it may begin now."""
        try:
            self.check_line(client)
        except Overloaded as error:
            return max(error.retry_after_s, 1)
        return 0

    def check_line(self, client: str, *works: tuple[Request, int]):
        """Raise Overloaded if a line of a batch must wait, because its key is refused now.

        Lines may wait long in the background. So they begin only while half of what is left today is free, or
        nothing else of the key runs. Otherwise a batch would keep the key's other requests out until its
        end."""
        self.is_over(client, works)
        key = self.keys.get(client)
        if key is None or not key.refused:
            return
        reserved = self.reserved(key)
        needed = beyond_one(claim_of(*work) for work in works)
        left = (key.tokens_per_day or 0) - self.used[today(), key.name]
        if reserved and reserved + needed >= left // 2:
            raise self.refusal(key, needed)

    # while it runs

    def reserve(self, request: Request, charge: Charge, context_length: int) -> Reservation | None:
        """Take what a request may use from its key's budget, until `release`. None if the key has none."""
        key = self.keys.get(charge.row.key)
        if key is None:
            return None
        reservation = Reservation(self, key, request, charge, context_length)
        self.running[key.name][reservation] = None
        return reservation

    def release(self, reservation: Reservation):
        """Give back what it took. Does nothing the second time."""
        name = reservation.key.name
        self.running[name].pop(reservation, None)
        if not self.running[name]:
            del self.running[name]

    @contextmanager
    def pledged(self, charges: Mapping[str, Charge]) -> Iterator[None]:
        """Keep the charges of several requests, by their ids, until each of them has begun."""
        self.pledges |= charges
        try:
            yield
        finally:
            for request_id, charge in charges.items():
                if self.pledges.get(request_id) is charge:  # the request has not begun
                    del self.pledges[request_id]
                    if charge.reservation:
                        charge.reservation.release()

    def take_pledge(self, request_id: str, key: str) -> Charge | None:
        """The charge of a request that begins, if it was pledged."""
        pledge = self.pledges.get(request_id)
        if pledge is None or pledge.row.key != key:  # a request of another key may have the same id
            return None
        return self.pledges.pop(request_id)

    def reserved(self, key: ApiKey, before: Reservation | None = None) -> int:
        """The tokens that the running requests of a key take from its budget. Without it, many requests that
        begin at once would all find tokens left. before: count only requests that began before this one."""
        tokens = 0
        for reservation in self.running.get(key.name, ()):
            if reservation is before:
                break
            tokens += reservation.tokens
        return tokens

    def fits(self, key: ApiKey, reserved: int, needed: int) -> bool:
        return self.used[today(), key.name] + reserved + needed < (key.tokens_per_day or 0)

    def refusal(self, key: ApiKey, needed: int) -> Overloaded:
        """The error for a key that is refused. needed: the least tokens that its request takes."""
        until = seconds_to_midnight()
        budget = key.tokens_per_day or 0
        left = budget - self.used[today(), key.name]
        if self.fits(key, 0, needed):
            return rate_limited("the requests of this API key that run may use all that is left of its "
                                f"{budget:,} tokens of today (UTC)", min(until, 5))
        if left > 0:
            return quota_used(f"this API key has {left:,} of its {budget:,} tokens of today (UTC) left, and "
                              f"this request may take {needed:,} besides its longest answer: ask for less, "
                              "or wait until midnight UTC", until)
        return quota_used(f"this API key has used its {budget:,} tokens of today (UTC); it has new ones at "
                          "midnight UTC", until)

    def body(self, client: str) -> dict | None:
        """What /v1/usage says of a key's budget; None if it has none."""
        key = self.keys.get(client)
        if key is None:
            return None
        return {"tokens_per_day": key.tokens_per_day, "used_today": self.used[today(), key.name],
                "reserved": self.reserved(key), "over_budget": "refuse" if key.refused else "background",
                "renewed_in_s": seconds_to_midnight()}
