"""The fields of bodies and queries of the routes of vector stores."""

from __future__ import annotations

from chatlm.common.config import LIMITS
from chatlm.common.messages.tool_rounds import CallItem
from chatlm.front.api.field_types import TEXT
from chatlm.front.api.fields import A_TEXT, Field, FieldType, list_schema, object_schema
from chatlm.front.api.list_fields import LABELS

MOST_FILES = 500        # of a new store
MOST_OF_BATCH = 2_000
MOST_RESULTS = LIMITS.passages
LEAST_CHUNK, MOST_CHUNK = 100, 4096  # of a passage of a static strategy
RESULTS = {"type": "integer", "minimum": 1, "maximum": MOST_RESULTS}
SCORE = {"type": "number", "minimum": 0, "maximum": 1}
A_NAME = {"type": "string", "maxLength": 256}
ATTRIBUTES_SCHEMA = {
    "type": "object", "maxProperties": 16, "propertyNames": {"pattern": r"^[\s\S]{0,64}$"},
    "additionalProperties": {"type": ["string", "number", "boolean"], "maxLength": 512}}
OR_NULL = {"type": "null"}
ATTRIBUTES_TYPE = FieldType(
    "an object of at most 16 names of up to 64 characters, each with a string of at most 512, a number or a "
    "boolean", ATTRIBUTES_SCHEMA)
STRATEGY_SCHEMA = {"anyOf": [
    object_schema(["type"], type={"enum": ["auto"]}),
    object_schema(["type", "static"], type={"enum": ["static"]}, static=object_schema(
        ["max_chunk_size_tokens", "chunk_overlap_tokens"],
        max_chunk_size_tokens={"type": "integer", "minimum": LEAST_CHUNK, "maximum": MOST_CHUNK},
        chunk_overlap_tokens={"type": "integer", "minimum": 0, "maximum": MOST_CHUNK // 2}))]}
STRATEGY_TYPE = FieldType(
    '{"type": "auto"}, or {"type": "static", "static": {"max_chunk_size_tokens", "chunk_overlap_tokens"}} '
    f"with {LEAST_CHUNK} to {MOST_CHUNK:,} tokens, of which at most half overlap", STRATEGY_SCHEMA)
DAYS_TYPE = FieldType(
    'an object of the anchor "last_active_at" and days, from 1 to 365', object_schema(
        ["days"], anchor={"enum": ["last_active_at"]},
        days={"type": "integer", "minimum": 1, "maximum": 365}),
    lambda value: int(value["days"]))
NAME = Field("name", FieldType("a string of at most 256 characters", A_NAME), "what it is called")
DESCRIPTION = Field("description", FieldType("a string of at most 512 characters", {
    "type": "string", "maxLength": 512}), "what it is for")
STRATEGY = Field("chunking_strategy", STRATEGY_TYPE,
                 "how files are cut into passages: auto at headings, paragraphs and pages, to at most 512 "
                 "tokens; static to so many tokens")
ATTRIBUTES = Field("attributes", ATTRIBUTES_TYPE, "what searches can filter by")
LIFETIME = Field("expires_after", DAYS_TYPE, "after how many days without use the store expires")
FILE_IDS = FieldType(f"a list of at most {MOST_FILES} ids of files", list_schema(A_TEXT, maxItems=MOST_FILES),
                     tuple)
BATCH_IDS = FieldType(f"a list of 1 to {MOST_OF_BATCH:,} ids of files",
                      list_schema(A_TEXT, minItems=1, maxItems=MOST_OF_BATCH), tuple)
BATCH_FILES = FieldType(
    f"a list of 1 to {MOST_OF_BATCH:,} objects, each with a file_id and perhaps attributes and a "
    "chunking_strategy",
    list_schema(object_schema(["file_id"], file_id=A_TEXT, attributes={"anyOf": [ATTRIBUTES_SCHEMA, OR_NULL]},
                              chunking_strategy={"anyOf": [*STRATEGY_SCHEMA["anyOf"], OR_NULL]}),
                minItems=1, maxItems=MOST_OF_BATCH), tuple)
QUERY = FieldType("a string, or a list of 1 to 8 strings", {"anyOf": [
    A_TEXT, list_schema(A_TEXT, minItems=1, maxItems=8)]})
RANKING = FieldType(
    'an object with a ranker ("none", "auto" or "default-2024-11-15") and a score_threshold from 0 to 1',
    object_schema([], ranker={"enum": ["none", "auto", "default-2024-11-15"]},
                  score_threshold=SCORE))
WEIGHT = {"type": "number", "minimum": 0}
RANKING_OF_TOOL = FieldType(
    RANKING.allowed + ", and perhaps hybrid_search, an object with an embedding_weight and a text_weight of "
    "at least 0",
    {**RANKING.schema, "properties": {**RANKING.schema["properties"], "hybrid_search": {"anyOf": [
        OR_NULL, object_schema(["embedding_weight", "text_weight"], embedding_weight=WEIGHT,
                               text_weight=WEIGHT)]}}})
FILTERS = FieldType('an object, {"type": "eq" and so on, "key", "value"}, or {"type": "and" or "or", '
                    '"filters"}', {"type": "object"})
MOST_STORES = 8
KNOWLEDGE_TYPE = FieldType(
    f'an object with stores, a list of 1 to {MOST_STORES} ids of vector stores, and perhaps a mode: "auto", '
    f'"search" or "whole", max_num_results, from 1 to {MOST_RESULTS}, score_threshold, from 0 to 1, and '
    "return_text, a boolean",
    object_schema(["stores"], stores=list_schema(A_TEXT, minItems=1, maxItems=MOST_STORES),
                  mode={"enum": ["auto", "search", "whole", None]}, return_text={"type": "boolean"},
                  max_num_results=RESULTS, score_threshold=SCORE))
KNOWLEDGE_OF_CHAT = Field(
    "knowledge", KNOWLEDGE_TYPE, "vector stores that the answer is to be found in. The model reads the "
    "passages that fit the last question (search), or all of them (whole); auto is whole if that fits and is "
    "read fast. By default it reads as many passages as are worth it")
# of the tool file_search
SEARCHED_STORES = Field(
    "vector_store_ids", FieldType(f"a list of 1 to {MOST_STORES} ids of vector stores",
                                  list_schema(A_TEXT, minItems=1, maxItems=MOST_STORES)),
    "what is searched", required=True)
FILE_SEARCH_OPTIONS = (
    SEARCHED_STORES, Field("max_num_results", FieldType("an integer", {"type": "integer"}),
                           "passages (as many as are worth reading, at most 8)", 1,
                           MOST_RESULTS),
    Field("filters", FILTERS, "which files: by their attributes"),
    Field("ranking_options", RANKING_OF_TOOL, "as in a search; hybrid_search has the weights of what the "
                                              "vectors find and of what the words do"))
QUERIES = "queries"  # the argument of a call
MOST_QUERIES = 4
FILE_SEARCH_PARAMETERS = object_schema(
    [QUERIES], **{QUERIES: list_schema(A_TEXT, minItems=1, maxItems=MOST_QUERIES) | {
        "description": "What to look for, each in a few words or as a question"}})
FILE_SEARCH_ITEM = CallItem("file_search_call", "fs_", "searching", (QUERIES,), ("results",))
# of bodies
NEW_STORE = (
    NAME, DESCRIPTION, Field("file_ids", FILE_IDS, "uploaded files, with which it begins"), STRATEGY,
    LIFETIME, LABELS,
    Field("embedding_model", TEXT, "the model here that embeds its texts; by default that of --embedder, "
                                   "else the first that embeds"))
CHANGES = NAME._replace(cleared=""), LIFETIME._replace(cleared=None), LABELS._replace(cleared={})
SEARCH = (
    Field("query", QUERY, "what is looked for", required=True),
    Field("max_num_results", FieldType("an integer", {"type": "integer"}), "passages (10)", 1, MOST_RESULTS),
    Field("filters", FILTERS, "which files: by their attributes"),
    Field("ranking_options", RANKING, "ranker none: no reranker; passages below the threshold are left out"),
    Field("rewrite_query", FieldType("a boolean", {"type": "boolean"}), "has no effect"))
NEW_FILE = Field("file_id", TEXT, "an uploaded file", required=True), ATTRIBUTES, STRATEGY
CHANGED_FILE = (ATTRIBUTES._replace(required=True, cleared={}),)
NEW_FILES = (
    Field("file_ids", BATCH_IDS, "uploaded files"),
    Field("files", BATCH_FILES, "or these, each with its own attributes and chunking_strategy"),
    ATTRIBUTES, STRATEGY)
# of queries
BEFORE = Field("before", TEXT, "the id of the first row of the page after")
STATUS = Field("filter", FieldType("in_progress, completed, failed or cancelled", {
    "enum": ["in_progress", "completed", "failed", "cancelled"]}), "only files with this status")
PAGE = Field("page", TEXT, "next_page of the page before")
