"""The other end of a worker's pipe, for tests of its loop."""

from chatlm.common.messages.protocol import Stepped


class Front:
    """It sends these batches of messages, each when the worker has nothing to do, and hangs up."""

    def __init__(self, *batches):
        self.batches, self.sent = [*batches], []

    def send(self, message):
        self.sent.append(message)

    def receive(self, wait, patience_s=None):
        if not wait:
            return []
        if not self.batches:
            raise EOFError
        return self.batches.pop(0)

    @property
    def events(self):
        return [event for message in self.sent if isinstance(message, Stepped) for event in message.events]
