"""The fields of the bodies of annexes' routes, by their patterns."""

from chatlm.front.annexes import ANNEXES

WITH_DATABASE = "batches", "files", "conversations", "chats", "knowledge"  # whose routes are 404 without --database
STORE_FIELDS = {route.pattern: route.body for annex in ANNEXES if annex.name in WITH_DATABASE for route in annex.routes if route.body}
KNOWLEDGE_FIELDS = {pattern: fields for pattern, fields in STORE_FIELDS.items() if pattern.startswith("/v1/vector_stores")}
HUB_FIELDS = {route.pattern: route.body for annex in ANNEXES if annex.name not in WITH_DATABASE for route in annex.routes if route.body}
