"""Many ranks: what keeps the seeds of a network that trains on several processes the same on all of them."""
