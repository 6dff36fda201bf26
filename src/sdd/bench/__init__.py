"""`sdd bench`: the time of fused operations and of training steps on this machine."""
