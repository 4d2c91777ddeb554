"""One step: a window of micro-batches, its gradient, and the decision whether to apply it.

In: the data feed, the model, and the user's `forward`.
Out: a gradient that was clipped and can be applied, or a report on why it can't; and what the step was like, as a
`StepInfo`.
"""
