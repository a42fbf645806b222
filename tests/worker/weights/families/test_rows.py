"""A row of a family says what its files may have. What another row says does not matter to it."""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

from chatlm.common.errors import ConfigError
from chatlm.worker.weights import families
from chatlm.worker.weights.families import table
from chatlm.worker.weights.families.table import FAMILIES, GGUF_FAMILIES
from chatlm.worker.weights.formats.configs import HF_KEYS, rule_of
from chatlm.worker.weights.formats.gguf.description import gguf_blocks
from chatlm.worker.weights.formats.gguf.file import GGUF_KEYS, GGUF_OWN, gguf_rule, gguf_value

ROWS = {name: FAMILIES[name] for name in FAMILIES}
BY_ROW = "hidden_act", "hidden_activation"        # `Family.activations` says what these may be


def test_each_row_has_rules_for_all_of_its_own_keys():
    """If a row has a rule for a key, no other row has that key without one."""
    ruled = {key for row in ROWS.values() for key in row.keys} - {*HF_KEYS, *BY_ROW}
    lacking = [(name, key) for name, row in ROWS.items() for key in row.config
               if key in ruled and key not in row.keys]
    assert lacking == [] and len(ruled) > 60


@pytest.mark.parametrize("name", ROWS)
def test_what_a_family_s_files_may_have_is_the_same_without_the_others(name):
    row = ROWS[name]
    for key, default in row.config.items():
        rule = rule_of(row, key, default)
        if key not in (*HF_KEYS, *BY_ROW) and not isinstance(default, bool):
            assert rule == row.keys.get(key), key


def test_rows_with_files_of_gguf_have_rules_for_what_these_state():
    for architecture, name in GGUF_FAMILIES.items():
        row = ROWS[name]
        rows = [row, *(ROWS[variant] for variant in row.gguf.variants.values())]
        stated = {key for each in rows for key in each.gguf.keys}
        stated |= {theirs for each in rows for ours, theirs in GGUF_OWN.items() if ours in each.config}
        for key in stated:
            assert gguf_rule(f"{architecture}.{key}"), (architecture, key)


@pytest.mark.parametrize("architecture, key, fits", [
    ("cohere2moe", "expert_gating_func", 1), ("nemotron_h", "attention.layer_norm_epsilon", None),
    ("granitehybrid", "ssm.state_size", 4096), ("llama", "attention.sliding_window", 64)])
def test_a_key_of_a_file_has_the_rule_of_its_own_family(architecture, key, fits):
    name = f"{architecture}.{key}"
    assert gguf_value(Path("x"), {name: fits}, name) == fits


@pytest.mark.parametrize("architecture, key, wrong", [
    ("lfm2moe", "expert_gating_func", 1), ("cohere2", "attention.layer_norm_epsilon", None),
    ("laguna", "rope.dimension_count_swa", 1), ("qwen35", "ssm.conv_kernel", 1)])
def test_what_another_family_allows_is_refused(architecture, key, wrong):
    name = f"{architecture}.{key}"
    with pytest.raises(ConfigError, match=f"x: {name} is"):
        gguf_value(Path("x"), {name: wrong}, name)


@pytest.mark.parametrize("architecture", ["laguna", "gemma4"])
def test_a_file_that_needs_the_size_of_its_heads_says_so(architecture):
    said = {"general.architecture": architecture, "block_count": 2, "attention.head_count": 4,
            "attention.head_count_kv": 2, "feed_forward_length": 96,
            "attention.sliding_window_pattern": [True, False]}
    metadata = {key if "general" in key else f"{architecture}.{key}": value for key, value in said.items()}
    with pytest.raises(ConfigError, match=f"{architecture}.attention.key_length is missing; it must be an int"):
        gguf_blocks(Path("x"), metadata, {}, None)


def test_a_key_of_other_families_has_no_rule():
    assert "*.moe_every_n_layers" not in GGUF_KEYS
    with pytest.raises(KeyError):
        gguf_rule("llama.moe_every_n_layers")


def test_the_table_has_each_row_once():
    modules = [import_module(f"{families.__name__}.{each.name}") for each in iter_modules(families.__path__)]
    rows = [name for module in modules if module.__name__ != table.__name__
            for name in getattr(module, "FAMILIES", ())]
    assert sorted(rows) == sorted(FAMILIES)


def test_a_row_says_whether_its_files_may_have_a_draft_head_or_rank():
    assert [name for name, row in ROWS.items() if row.has_draft_head] == [
        "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"]
    assert [name for name, row in ROWS.items() if row.has_rerankers] == ["qwen3"]
