"""The life of a rank other than rank 0: it loads its shard, then computes the steps that rank 0 sends."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError, RanksFailed
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.stamps import refuse_changed
from chatlm.common.log import log
from chatlm.common.memory import give_memory_back
from chatlm.common.messages.protocol import Loading, Ready
from chatlm.worker.build import build_transformer
from chatlm.worker.device import bind_to_node, prepare_device
from chatlm.worker.ranks.messages import RankDrew
from chatlm.worker.ranks.ranks import OtherRank
from chatlm.worker.ranks.runners import DrawnTokens, RankRunner, Stage, follow, follow_stage
from chatlm.worker.weights.load import open_model

if TYPE_CHECKING:
    from chatlm.common.messages.wire import Channel
    from chatlm.worker.arrays.kinds import Device
    from chatlm.worker.kernels.kernels import StepRunner
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ranks.messages import RankConfig


def run_rank(channel: Channel, config: RankConfig):
    """Load this rank's shard, then compute the steps that rank 0 sends, until it hangs up."""
    log.setLevel(logging.ERROR)  # rank 0 logs the rest
    adopt_environment(config)
    device = prepare_device(config)
    ranks = OtherRank(channel, config)
    bind_to_node(config, config.rank)
    transformer, runner = load_shard(channel, config, device, ranks)
    give_memory_back()
    channel.send(Ready({}))
    try:
        with transformer.arrays.computing():
            follow_rank_zero(channel, ranks, transformer, runner)
    except (RuntimeError, EOFError) as error:
        raise RanksFailed(f"rank {ranks.rank}: {error or 'another rank has ended'}") from error


def adopt_environment(config: RankConfig):
    """Compute with the kernels of rank 0. ConfigError if this machine cannot."""
    os.environ.update({name: value for name, value in config.environment.items() if value})
    isa = os.environ.get("DECODE_CORE_ISA")
    if isa and decode_core() is None:
        raise ConfigError(f"rank 0 uses decode_core with {isa} instructions, but this machine cannot: "
                          "install it here, or set DECODE_CORE_ISA or CHAT_SERVER_KERNELS for rank 0")


def load_shard(channel: Channel, config: RankConfig, device: Device, ranks: OtherRank
               ) -> tuple[Transformer, StepRunner]:
    def progress(activity: str, fraction: float):
        channel.send(Loading(activity, fraction))

    settings = config.settings
    source = config.source or resolve_model(settings, progress)
    model = open_model(source, settings, device)
    if not config.source:
        channel.send(Ready({}))
        channel.receive(wait=True, most=1)  # all others have found theirs
    built = build_transformer(model, source, settings, device, progress, ranks)
    refuse_changed(source, settings)
    backend = built.transformer.kernels.backend
    runner = backend.make_runner(built.transformer, settings.max_batch, built.context_length)
    return built.transformer, runner


def follow_rank_zero(channel: Channel, ranks: OtherRank, transformer: Transformer, runner: StepRunner):
    """Compute step after step, and report checksums of what they draw."""
    def report(checksum: int):
        channel.send(RankDrew(checksum))

    runner.prepare(lambda fraction: None)
    if ranks.stages > 1:
        follow_stage(channel, Stage(runner, transformer, ranks), DrawnTokens(report))
    else:
        follow(channel, RankRunner(runner, transformer, lambda step: None, report))
