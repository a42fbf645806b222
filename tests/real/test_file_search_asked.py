"""`file_search` with a real model that learned to call functions: it asks by itself, reads and answers."""

import openai
import pytest

from real_models import real_model
from real_server import server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
MANUAL = ("# The Zarkov pump\n\nPrime the Zarkov pump with 3.7 litres of glycol before the first start.\n\n"
          "# The Zarkov valve\n\nThe Zarkov valve opens at 9 bar.").encode()


@pytest.fixture(scope="module")
def client(default_embedder_path, tmp_path_factory):
    database = tmp_path_factory.mktemp("asked") / "k.db"
    with server(real_model("qwen-1.5b"), "--embedder", f"--database={database}", forked=False) as (_, url):
        yield openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)


def test_the_model_asks_by_itself_reads_and_answers(client):
    store = client.vector_stores.create(name="manual")
    client.vector_stores.files.upload_and_poll(vector_store_id=store.id, file=("zarkov.md", MANUAL))
    tool = {"type": "file_search", "vector_store_ids": [store.id]}
    question = "With how many litres of glycol is the Zarkov pump primed? Search the documents."
    asked = client.responses.create(model="default", input=question, tools=[tool], temperature=0,
                                    max_output_tokens=200, include=["file_search_call.results"])
    assert asked.output[0].type == "file_search_call" and asked.output[0].queries and asked.output[0].results
    print([item.to_dict() for item in asked.output])
    assert asked.output[-1].type == "message" and "3.7" in asked.output_text
    first = client.responses.create(model="default", input=question, tools=[tool], temperature=0,
                                    max_output_tokens=200, tool_choice={"type": "file_search"})
    assert first.output[0].queries == [question] and "3.7" in first.output_text
    print(asked.model_dump_json(indent=1), first.output_text)
