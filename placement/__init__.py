"""Where experts live: forecast, benefit curves, knapsack, packing, split, table, reconcile.

Decides, never acts: no I/O, no clock, no Ray, no torch; numpy and the standard library only.
Letters: L layers, E experts, G groups, K replica counts, W windows.
"""
