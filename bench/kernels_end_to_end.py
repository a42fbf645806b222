"""What decode_core changes end to end: two servers, with and without it, in one run through HTTP.

    python bench/kernels_end_to_end.py [--rounds 7] [--tokens 128]

The same program on the same model, once with CHAT_SERVER_KERNELS=reference. Contestants alternate, and the
idle server takes no time. Prints medians and ratios. transformers in bfloat16 runs in the same rounds for
comparison.
"""

import argparse
import asyncio
import os

import aiohttp

from serving import Server, Transformers, chat_server, line, many, prefill_speed


async def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    peer = Transformers(chat_server.fetch_default_model())
    os.environ["CHAT_SERVER_KERNELS"] = "reference"
    servers = {"reference ops": Server()}
    del os.environ["CHAT_SERVER_KERNELS"]
    servers["decode_core"] = Server()
    figures = {}
    try:
        async with aiohttp.ClientSession() as session:
            for server in servers.values():
                await server.first_byte_and_ready(session)
            for i in range(arguments.rounds):
                seed = 20_000 + 100 * i
                for name, server in servers.items():
                    for clients in (1, 16):
                        speed = await many(session, server.url, clients, arguments.tokens, seed)
                        figures.setdefault(f"{clients} client(s)", {}).setdefault(name, []).append(speed)
                    speed = await prefill_speed(session, server, seed + 50)
                    figures.setdefault("prefill of 1,500 words", {}).setdefault(name, []).append(speed)
                figures["1 client(s)"].setdefault("transformers", []).append(peer.generate(1, arguments.tokens, seed))
    finally:
        for server in servers.values():
            server.stop()
    for figure, speeds in figures.items():
        for name, values in speeds.items():
            line(f"{figure}: {name}", values, "tok/s", None if name == "reference ops" else speeds["reference ops"])


if __name__ == "__main__":
    asyncio.run(main())
