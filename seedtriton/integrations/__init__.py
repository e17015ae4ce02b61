"""What meets clients: one module for each, which imports its client when it is used and not before."""
