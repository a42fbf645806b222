"""What all models of a server have in common, whether it has one or many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from chatlm.front.admission.admission import SharedAdmission

if TYPE_CHECKING:
    from chatlm.front.pool.dispatcher import Dispatcher
    from chatlm.front.pool.prefixes import Prefixes


class ResourceUser(Protocol):
    """A pool, or what makes pools."""

    async def close(self):
        """End, and leave the shared."""


class SharedResources:
    """What the pools of a server share: the sandboxes and what is known of requests there, the limits of the
    queue, the order in which clients are served, and the memory for prefixes.

    It is closed with the last one that uses it. A pool uses it from its making to its end; what may make
    further pools uses it too."""

    def __init__(self, prefixes: Prefixes | None = None):
        """prefixes: None where they cannot outlive their worker."""
        self.admission = SharedAdmission()
        self.dispatchers: list[Dispatcher] = []
        self.prefixes = prefixes
        self.users = set[ResourceUser]()

    def join(self, user: ResourceUser):
        self.users.add(user)

    def start(self):
        """Allocate the memory for prefixes, unless it is there. This comes before workers start."""
        if self.prefixes:
            self.prefixes.start(lambda: any(dispatcher.jobs for dispatcher in self.dispatchers))

    async def leave(self, user: ResourceUser):
        """`user` will not use it any more. The last one closes it."""
        if user not in self.users:
            return
        self.users.remove(user)
        if self.users:
            return
        await self.admission.close()
        if self.prefixes:
            await self.prefixes.close()
