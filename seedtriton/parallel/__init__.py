"""What a training on many ranks needs: seeds that are sharded like their host, and what the ranks tell each other."""
