"""One step: a window of micro-batches, its gradient, and the decision whether to apply it.

In: the data feed, the model, and the user's `forward`.
Out: a clipped gradient that can be applied, or a report on why it can't; and the measurements of the step (`StepInfo`).
"""
