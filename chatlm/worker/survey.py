"""The role `survey`: describes models and the memory they take, before any weight is read."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from chatlm.common.core import kernels_line
from chatlm.common.errors import ConfigError, lack_of_memory, named
from chatlm.common.messages.protocol import Crashed, ModelCard, Surveyed, Unusable
from chatlm.worker.arrays.kinds import Device
from chatlm.worker.build import plan_model, prefill_chunk, share_of_rank
from chatlm.worker.card import model_facts
from chatlm.worker.device import check_gpu
from chatlm.worker.drafting import DraftHelp, plan_drafters
from chatlm.worker.ranks.ranks import PlannedRank
from chatlm.worker.weights.load import open_model

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import SurveyConfig
    from chatlm.common.messages.wire import Channel
    from chatlm.worker.build import MemoryPlan
    from chatlm.worker.drafting import DraftPlan
    from chatlm.worker.model.pages import LayerGroups
    from chatlm.worker.weights.rules import LoadedModel


def survey_models(channel: Channel, config: SurveyConfig):
    """Answer each SurveyConfig until the front hangs up. A broken model does not end the process."""
    while True:
        try:
            channel.send(surveyed(config))
        except Exception as error:
            error = lack_of_memory(error) or error
            channel.send(Unusable(str(error)) if isinstance(error, ConfigError) else
                         Crashed(named(error), traceback.format_exc()[-1 << 16:]))
        [config] = channel.receive(wait=True, most=1)


def surveyed(config: SurveyConfig) -> Surveyed:
    device = Device(config.device)
    if device.type == "cuda":
        check_gpu(device)
    source = config.source
    settings = config.settings
    model = open_model(source, settings, device)
    draft_help = DraftHelp(config.drafts)
    drafts = plan_drafters(model, settings, device, prefill_chunk(settings, device), draft_help=draft_help)
    plans = [plan_of_stage(model, stage, settings, device, drafts)
             for stage in range(settings.pipeline_parallel_size)]
    plan, groups = max(plans, key=lambda planned: planned[0].weights)
    # the last stage also has rows of logits
    plan = plan._replace(activations=max(each.activations for each, _ in plans))
    free, _ = plan.memory()
    budget = config.budget or int(free * settings.gpu_memory_utilization)
    plan = plan.within(budget // config.replicas - config.process_bytes)
    pages = plan.pages()
    scored = plan.context(pages, groups)
    card = ModelCard(model.text, model.name, min(model.context_length, scored), (), {}, False, kernels_line(),
                     dict(model.sampling), model.sampling_origin, source=source,
                     facts=model_facts(model, config, "", plan.weights), scored_length=scored,
                     without=tuple(draft_help.without))
    return Surveyed(card, plan.weights + plan.draft_model, plan.activations, plan.cache_bytes(pages),
                    plan.settings.kv_cache_memory or 0, budget)


def plan_of_stage(model: LoadedModel, stage: int, settings: Settings,
                  device: Device, drafts: Seq[DraftPlan]) -> tuple[MemoryPlan, LayerGroups]:
    """The plan of the first rank of a stage, whose shard is the largest; without --tp and --pp, of the model.
    ConfigError if the model cannot be divided that way."""
    rank = PlannedRank(settings, stage * settings.tensor_parallel_size)
    _, groups, _, plan = plan_model(
        share_of_rank(model, rank, settings), model.architecture, settings, device, rank, drafts)
    return plan, groups
