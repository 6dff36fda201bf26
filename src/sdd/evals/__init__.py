"""Trained runs at work: the loss on any held-out text, and continued texts."""
