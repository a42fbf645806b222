"""What a worker's card says, from figures alone: no engine is needed."""

from dataclasses import replace

import pytest

from chatlm.worker.arrays.kinds import Device
from chatlm.worker.card import cache_line, hardware_line, states_line, texts_line
from chatlm.worker.engine.facts import CacheFacts, EngineFacts, StateFacts

CACHE = CacheFacts(pages=2048, page_bytes=8192, has_holes=False, depth=3, pages_of_longest=40, types=("float16",), token_bytes=512, lasting_token_bytes=512)
ENGINE = EngineFacts(Device("cpu"), stages=1, tp=1, context_length=4096, scored_length=4096, max_batch=64, prefill_chunk=256, of_texts=False,
                     kernel_names={}, row_invariant=True, weight_types="q4_1 (93 MiB)", matrix_type="q4_1", weights_bytes=97517568, cache=CACHE, states=None)


def test_the_cache_s_line_says_how_many_tokens_it_holds():
    assert cache_line(ENGINE) == ("KV cache: 2,048 pages of 16 tokens = 32,768 tokens (16 MiB); float16, 512 bytes a token; context 4,096 tokens")


def test_with_windows_the_line_counts_a_sequence():
    """Where windows pass pages, the line says what a sequence holds."""
    cache = replace(CACHE, has_holes=True, lasting_token_bytes=128, types=("float16", "q8_0"))
    assert cache_line(replace(ENGINE, cache=cache)) == (
        "KV cache: 2,048 pages of 16 tokens in 3 layers, of which a sequence holds at most 40 (16 MiB); "
        "float16 and q8_0, 512 bytes a token, 128 once out of all windows; context 4,096 tokens")


def test_a_model_of_texts_has_a_line_of_its_own():
    assert texts_line(ENGINE) == "texts of at most 4,096 tokens, of which a step takes about 256 together; their keys and values take up to 16 MiB"


def test_states_are_counted_behind_the_cache():
    assert states_line(StateFacts(1437, 1365, 2048), 64) == (
        "; 1,437 states of 2 KiB, of which 1,365 are for snapshots; at most 64 sequences run at once")


@pytest.mark.parametrize("stages, tp, line", [(1, 1, "cpu with 2 thread(s)"), (1, 2, "2 ranks (--pp 1 --tp 2), each on cpu with 2 thread(s)"),
                                              (3, 2, "6 ranks (--pp 3 --tp 2), each on cpu with 2 thread(s)")])
def test_the_line_of_the_hardware_counts_ranks(stages, tp, line):
    assert hardware_line(replace(ENGINE, stages=stages, tp=tp), 2) == line
