"""A worker of the tests, with a part of theirs."""

import sys

from chatlm.common.processes.child import run_role
from chatlm.worker import parts
from toy_part import COUNTER

if __name__ == "__main__":
    parts.PARTS = (*parts.PARTS, COUNTER)
    sys.exit(run_role(*sys.argv[1:]))
