"""The generations of nanochat's checkpoints, each with a folder in tests/fixtures/nanochat."""

GENERATIONS = tuple(f"gen{number}" for number in range(1, 7))
