"""The engine: continuous batching of the dense part of a model over a seam to its experts.

Nothing is imported here, so that `raymoe.engine.seam` stays free of transformers: import
`Engine` from `raymoe.engine.engine`.
"""
