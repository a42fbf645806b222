"""How fast a server embeds inputs, compared with reading the same token ids as prompts (answers of one token).

    python bench/embeddings.py [MODEL] [--inputs 8] [--tokens 256] [--rounds 5]

The two take turns; each round has new ids, so that no prefix is cached. Medians are printed.
"""

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from chatlm.common.hub.default_model import fetch_default_model    # noqa: E402
from servers import our_server        # noqa: E402

BODIES = {"/v1/embeddings": ("input", {}), "/v1/embeddings of the last token": ("input", {"pooling": "last"}),
          "/v1/completions": ("prompt", {"max_tokens": 1})}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    for name, default in (("inputs", 8), ("tokens", 256), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked, dice = parser.parse_args(), random.Random(1)
    found = {name: [] for name in BODIES}
    with our_server(asked.model or fetch_default_model()) as server:
        for _ in range(asked.rounds + 1):           # the first one warms up
            for name, (field, more) in BODIES.items():
                ids = [[dice.randrange(5000) for _ in range(asked.tokens)] for _ in range(asked.inputs)]
                began_s = time.perf_counter()
                answer = server.post(name.split()[0], {field: ids, **more})
                found[name].append(time.perf_counter() - began_s)
                assert len(answer.get("data") or answer["choices"]) == asked.inputs
    for name, seconds in found.items():
        rate = asked.inputs * asked.tokens / statistics.median(seconds[1:])
        print(f"{name}: {rate:,.0f} tokens a second")


if __name__ == "__main__":
    main()
