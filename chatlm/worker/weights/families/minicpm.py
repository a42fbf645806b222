"""MiniCPM 1, 2 and 4: Llama's layers with factors of embeddings, of what blocks add, and of logits."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from chatlm.worker.model.blocks.input import Input
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.model import Model
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.weights.facts import Facts
from chatlm.worker.weights.families.family import Family, Gguf, Header
from chatlm.worker.weights.rules import MOST_CHANNELS, Rule

FACTOR = Rule(float, 1e-4, 10**6)
FACTORS = "scale_emb", "scale_depth", "dim_model_base"
KEYS = {"scale_emb": FACTOR, "scale_depth": FACTOR._replace(optional=True),
        "dim_model_base": Rule(int, 1, MOST_CHANNELS, optional=True)}
# of files that do not state them: those of the models of 1.2B and 2.4B
UNSAID = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}


def minicpm(facts: Facts) -> Model:
    _, residual, _ = factors = factors_of(facts)
    norm = RmsNorm(facts.eps / residual**2)  # it reads x divided by the factor
    layers = [Layer(facts.attention(number), facts.feed(number), norm, norm) for number in facts.layers]
    return with_factors(facts, factors, layers, norm)


def factors_of(facts: Facts) -> tuple[float, float, float]:
    """The factors of embeddings, of what blocks add, and of logits. Without a scale_depth or a dim_model_base
    that factor is 1."""
    config = facts.config
    depth = config["scale_depth"] or facts.count**0.5
    return (config["scale_emb"], depth / facts.count**0.5,
            (config["dim_model_base"] or facts.width) / facts.width)


def with_factors(facts: Facts, factors: tuple[float, float, float], layers: Seq[Layer],
                 norm: RmsNorm) -> Model:
    embedding, residual, logits = factors
    return facts.decoder(layers, norm, Input(embedding, residual), logits, residual)


def gguf_factors(header: Header) -> tuple[dict, dict]:
    """What a config.json would say. Files state by what logits are divided; llama.cpp takes the inverse for
    those that do not."""
    layers: int = header.value("block_count")
    width: int = header.value("embedding_length")
    embedding = header.value("embedding_scale", UNSAID["scale_emb"])
    residual = header.value("residual_scale", UNSAID["scale_depth"] / layers**0.5)
    divisor = header.value("logit_scale", width / UNSAID["dim_model_base"])
    return {}, {"scale_emb": embedding, "scale_depth": residual * layers**0.5,
                "dim_model_base": width / divisor}


FAMILIES = {"minicpm": Family(
    "MiniCPM 1, 2 and 4", {
        "attention_bias": False, "tie_word_embeddings": True, "scale_emb": None, "scale_depth": None,
        "dim_model_base": None, "mup_denominator": None},  # the last is of draft heads
    minicpm,
    keys={**KEYS, "scale_emb": FACTOR._replace(optional=True)}, needed=FACTORS,
    gguf=Gguf("minicpm", permuted=True, layers=gguf_factors, keys=dict.fromkeys(
        ("embedding_scale", "residual_scale", "logit_scale"), FACTOR)))}
