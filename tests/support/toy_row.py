"""The row of the dialect in toy_dialect.py. Whoever imports this module in a process of its own adds it
there: `sitecustomize` of a real server's processes does."""

from chatlm.front.api import spoken
from chatlm.front.api.errors import Api
from chatlm.front.api.spoken import DialectRow, of_api
from toy_dialect import DIALECT


TOY_API = Api("toy", lambda error, request_id: {"oops": str(error), "about": error.param, "id": request_id})


def toy_row():
    return DialectRow(DIALECT, of_api(TOY_API, {
        "/toy/say": "the toy's answer", "/toy/count": "how many tokens a text has"}))


def speak_toy():
    """Speak it in this process, from now on."""
    spoken.DIALECTS = (*spoken.DIALECTS, toy_row())
    spoken.rows_by_path.cache_clear()
