"""Generation 1 as transformers' own nanochat, which does not round cos and sin."""

import json
import re

import pytest
import torch

from exported import export, greedy, loaded, our_logits, refused
from patching import patch

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def made(nanochat_fixtures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "gen1"
    export(nanochat_fixtures / "gen1", "-o", folder, "--format", "transformers", "--license", "mit")
    return folder


@pytest.fixture
def cases(nanochat_fixtures):
    return json.loads((nanochat_fixtures / "gen1" / "oracle.json").read_text())["cases"]


def test_it_is_our_forward_without_the_rounding(made, nanochat_fixtures, cases, monkeypatch):
    from chatlm.worker.arrays import rotary
    patch(monkeypatch, rotary, "rounded", lambda table: table)
    model = loaded(made)
    assert type(model).__module__ == "transformers.models.nanochat.modeling_nanochat"
    for case in cases:
        ids = case["prompt_ids"]
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0]
        assert (theirs - our_logits(nanochat_fixtures / "gen1", ids)).abs().max() <= 1e-5
    assert [greedy(model, [case["prompt_ids"]], 20)[0] for case in cases] == [case["greedy"][:20] for case in cases]


def test_the_card_gives_the_difference(made, nanochat_fixtures):
    """It is that of the rounding: neither 0 nor large."""
    card = (made / "README.md").read_text()
    found = re.search(r"differ by at most (\S+) from .* the same after (\d+) of (\d+)\.", card)
    assert 1e-5 < float(found[1]) < 0.5 and 0.9 < int(found[2]) / int(found[3]) <= 1
    assert card.startswith("---\nlicense: mit\n") and "trust_remote_code" not in card
    assert not [*made.glob("*.py")]


@pytest.mark.parametrize("generation", [2, 3, 4, 5, 6])
def test_no_other_generation_is_given_that_name(generation, nanochat_fixtures, tmp_path, capfd):
    line = refused(capfd, nanochat_fixtures / f"gen{generation}", "-o", tmp_path / "made", "--format", "transformers")
    assert f"this is generation {generation}" in line and "--format hf can hold it" in line
    assert [*tmp_path.iterdir()] == []


def test_other_models_have_no_format_of_that_name(tmp_path, capfd):
    from families import make_model, save
    save(make_model("llama2"), tmp_path / "source")
    assert "--format hf is transformers' own format for it" in refused(capfd, tmp_path / "source", "-o", tmp_path / "made", "--format", "transformers")


def test_this_server_reads_it_again(made, cases):
    """Its family is in the table: without the rounding, answers are the same here too."""
    for case in cases:
        assert (our_logits(made, case["prompt_ids"])[-1] - torch.tensor(case["next_logits"])).abs().max() < 0.2
