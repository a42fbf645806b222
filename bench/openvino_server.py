"""A minimal server of OpenVINO GenAI for bench/compare.py: /health and streamed /v1/chat/completions, greedy.

    PYTHON bench/openvino_server.py FOLDER --port 8000 [--slots 16]

FOLDER is what `optimum-cli export openvino` writes. PYTHON needs
openvino-genai and aiohttp. Requests are batched by the library's ContinuousBatchingPipeline; one thread steps
it, and each request's tokens go to its client as they come. Every answer has exactly max_tokens tokens.
"""

import argparse
import asyncio
import itertools
import json
import threading

import openvino_genai
from aiohttp import web


class Steps:
    """Steps the pipeline in a thread as long as requests are open, and hands their tokens to the loop."""

    def __init__(self, folder, slots):
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1            # GB
        scheduler.max_num_seqs = slots
        scheduler.enable_prefix_caching = True
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU")
        self.tokenizer = self.pipeline.get_tokenizer()
        self.numbers = itertools.count()
        self.open = {}
        self.new = []
        self.changed = threading.Condition()

    def run(self):
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.new or self.open)
                new = self.new
                self.new = []
            for tokens, config, queue, loop in new:
                number = next(self.numbers)
                self.open[number] = self.pipeline.add_request(number, tokens, config), queue, loop
            self.pipeline.step()
            for number, (handle, queue, loop) in list(self.open.items()):
                tokens = [token for output in handle.read().values() for token in output.generated_ids] if handle.can_read() else []
                ended = handle.get_status() != openvino_genai.GenerationStatus.RUNNING
                if tokens or ended:
                    loop.call_soon_threadsafe(queue.put_nowait, (tokens, ended))
                if ended:
                    del self.open[number]

    def add(self, tokens, config, queue):
        with self.changed:
            self.new.append((tokens, config, queue, asyncio.get_running_loop()))
            self.changed.notify()


async def chat(request):
    steps = request.app["steps"]
    body = await request.json()
    text = steps.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
    prompt = steps.tokenizer.encode(text, add_special_tokens=False).input_ids
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = body["max_tokens"]
    config.ignore_eos = True
    config.do_sample = False
    queue = asyncio.Queue()
    steps.add(prompt, config, queue)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    count = 0
    ended = False
    while not ended:
        more, ended = await queue.get()
        count += len(more)
        text = steps.tokenizer.decode(more)     # each piece alone: enough to measure with
        await response.write(frame({"choices": [{"index": 0, "delta": {"content": text or " "}, "finish_reason": None}]}))
    usage = {"prompt_tokens": prompt.shape[1], "completion_tokens": count}
    await response.write(frame({"choices": [], "usage": usage}) + b"data: [DONE]\n\n")
    return response


def frame(event):
    return b"data: " + json.dumps(event).encode() + b"\n\n"


async def health(request):
    return web.json_response({"status": "ok"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=16)
    arguments = parser.parse_args()
    app = web.Application()
    app["steps"] = Steps(arguments.folder, arguments.slots)
    threading.Thread(target=app["steps"].run, daemon=True).start()
    app.add_routes([web.get("/health", health), web.post("/v1/chat/completions", chat)])
    web.run_app(app, host="127.0.0.1", port=arguments.port, print=None)


if __name__ == "__main__":
    main()
