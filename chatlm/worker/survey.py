"""The role `survey`: describes models and the memory they take, before any weight is read."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from chatlm.common.core import kernels_line
from chatlm.common.errors import ConfigError, lack_of_memory, error_text
from chatlm.common.messages.protocol import Crashed, ModelCard, Surveyed, Unusable
from chatlm.worker.arrays.kinds import Device
from chatlm.worker.card import model_facts
from chatlm.worker.device import check_gpu
from chatlm.worker.drafting import DraftHelp, plan_drafters
from chatlm.worker.memory_plan import plan_model, prefill_chunk
from chatlm.worker.ranks.alone import PlannedRank
from chatlm.worker.weights.load import open_model

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import SurveyConfig
    from chatlm.common.messages.wire import Channel
    from chatlm.worker.drafting import DraftPlan
    from chatlm.worker.memory_plan import ModelPlan
    from chatlm.worker.weights.loaded.model import LoadedModel


def survey_models(channel: Channel, config: SurveyConfig):
    """Answer each SurveyConfig until the front hangs up. A broken model does not end the process."""
    while True:
        try:
            channel.send(surveyed(config))
        except Exception as error:
            error = lack_of_memory(error) or error
            channel.send(Unusable(str(error)) if isinstance(error, ConfigError) else
                         Crashed(error_text(error), traceback.format_exc()[-1 << 16:]))
        [config] = channel.receive(wait=True, most=1)


def surveyed(config: SurveyConfig) -> Surveyed:
    """The card of a model, and the memory it takes. No weight is read."""
    device = Device(config.device)
    if device.type == "cuda":
        check_gpu(device)
    settings = config.settings
    model = open_model(config.source, settings, device)
    draft_help = DraftHelp(config.drafts)
    drafts = plan_drafters(model, settings, device, prefill_chunk(settings, device), draft_help=draft_help)
    plans = [plan_of_stage(model, stage, settings, device, drafts)
             for stage in range(settings.pipeline_parallel_size)]
    largest = max(plans, key=lambda plan: plan.memory.weights)
    # the last stage also has rows of logits
    memory = largest.memory._replace(activations=max(plan.memory.activations for plan in plans))
    free, _ = memory.memory()
    budget = config.budget or int(free * settings.gpu_memory_utilization)
    memory = memory.within(budget // config.replicas - config.process_bytes)
    pages = memory.pages()
    scored_length = memory.context(pages, largest.groups)
    card = ModelCard(model.text, model.name, min(model.context_length, scored_length), (), {}, False,
                     kernels_line(), dict(model.sampling), model.sampling_origin, source=config.source,
                     facts=model_facts(model, config, "", memory.weights), scored_length=scored_length,
                     without=tuple(draft_help.without))
    return Surveyed(card, memory.weights + memory.draft_model, memory.activations, memory.cache_bytes(pages),
                    memory.settings.kv_cache_memory or 0, budget)


def plan_of_stage(model: LoadedModel, stage: int, settings: Settings, device: Device,
                  drafts: Seq[DraftPlan]) -> ModelPlan:
    """The plan of the first rank of a stage, whose share is the largest; without --tp and --pp, of the model.
    ConfigError if the model cannot be divided that way."""
    rank = PlannedRank(settings, stage * settings.tensor_parallel_size)
    share = rank.share_of(model, settings.quantize)
    return plan_model(share, model.architecture, settings, device, rank, drafts)
