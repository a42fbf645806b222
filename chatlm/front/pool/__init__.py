"""The workers behind one `answer`: routing, the queue, failover, unloading when idle; here or on a Ray
cluster."""
