"""A pool without a model that answers each request with the next of some texts, as a model that calls tools would."""

from fake_pool import FakePool, Letters


class ScriptedPool(FakePool):
    """Answers each request with the next of these texts, the last one again and again."""

    def __init__(self, *texts):
        super().__init__()
        self.texts = [*texts]
        self.tokenizer = Letters()
        self.tokenizer.tool_format = "tagged"

    async def answer(self, request):
        self.pieces = (self.texts.pop(0) if len(self.texts) > 1 else self.texts[0],)
        async for event in super().answer(request):
            yield event

    async def start(self):
        """It needs no model."""

    async def wait_ready(self):
        """It is."""

    async def close(self):
        """Nothing was begun."""

    def describe(self):
        return []
