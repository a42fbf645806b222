"""What a process has imported before it begins its work is no garbage."""

import gc


def keep_all_there_is():
    """Leave every object that exists out of later collections, also out of those of `give_memory_back`: it would look at the hundred thousands
    of objects of torch and pytest each time, and a forked process would copy them by that."""
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None
    gc.get_freeze_count = lambda: 0
