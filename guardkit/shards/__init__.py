"""Inputs cut into shards, and the same work on each of them, whoever does it: one shard in, one piece out, noted when it is whole."""
