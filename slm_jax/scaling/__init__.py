"""Scaling laws: runs at equal FLOPs, the best size and text for a budget, and predictions with intervals."""
