"""One model in several processes: rank 0 tells the others each step, and they share its work by shards and
stages."""
