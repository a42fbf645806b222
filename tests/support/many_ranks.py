"""A rank that computes one model after another: python many_ranks.py rank FD PARENT. See ranked.Group."""

import dataclasses
import os
import sys

import torch

from chatlm.common.messages import wire
from chatlm.common.messages.wire import Channel
from chatlm.worker.entry import worker_main
from chatlm.worker.other_rank import run_rank
from chatlm.worker.ranks.messages import RANK_PIPE, RankConfig
from patching import replace_everywhere


class NextModel(Exception):
    pass


class Configs(Channel):
    """A channel on which another RankConfig ends the model."""

    def receive(self, wait, most):
        messages = super().receive(wait, most)
        if isinstance(messages[0], RankConfig) and self.computing:
            raise NextModel(messages[0])
        return messages


def run(channel, config):
    channel.computing = True
    while True:
        try:
            links = {name: os.dup(at) for name in ("before", "after") if (at := getattr(config, name)) is not None}
            run_rank(channel, dataclasses.replace(config, **links))      # which close with the model
        except NextModel as following:
            [config] = following.args
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    replace_everywhere(wire, "Channel", Configs)
    Configs.computing = False
    sys.exit(worker_main("__main__:run", RANK_PIPE, sys.argv[2:]))
