"""Building a Horovod that works today."""
