"""Plans of a training step for devices that are not present: memory, FLOPs, bytes, collectives."""
