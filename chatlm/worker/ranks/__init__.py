"""One model in several processes: rank 0 sends each step to the others, and they divide it into shards and
stages."""
