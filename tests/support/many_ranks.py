"""A rank that computes one model after another: python many_ranks.py rank FD PARENT. See engines.RankedEngines."""

import dataclasses
import os
import sys

import torch

import chat_server as cs


class NextModel(Exception):
    pass


class Configs(cs.Channel):
    """A channel on which another RankConfig ends the model."""

    def receive(self, wait, most):
        messages = super().receive(wait, most)
        if isinstance(messages[0], cs.RankConfig) and self.computing:
            raise NextModel(messages[0])
        return messages


def run(channel, config):
    channel.computing = True
    while True:
        try:
            links = {name: os.dup(at) for name in ("before", "after") if (at := getattr(config, name)) is not None}
            cs.run_rank(channel, dataclasses.replace(config, **links))      # which close with the model
        except NextModel as following:
            [config] = following.args
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    cs.Channel = Configs
    Configs.computing = False
    sys.exit(cs.worker_main(run, cs.RANK_PIPE, sys.argv[2:]))
