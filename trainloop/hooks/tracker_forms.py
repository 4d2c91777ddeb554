"""Logs histograms and texts to Accelerate's trackers. Accelerate has no common method for them."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from ..histograms import Histogram


def log_histogram(tracker: Any, histograms: Mapping[str, Histogram], step: int) -> bool:
    """Log histograms to TensorBoard, to W&B, or to a user's own tracker with a method `log_histogram`.

    Returns:
        Whether the tracker supports histograms.
    """
    if tracker.name == "tensorboard":
        for name, histogram in histograms.items():
            tracker.tracker.add_histogram_raw(
                name,
                min=histogram.edges[0],
                max=histogram.edges[-1],
                num=sum(histogram.counts),
                sum=histogram.sum,
                sum_squares=histogram.sum_squares,
                bucket_limits=histogram.edges[1:],
                bucket_counts=histogram.counts,
                global_step=step,
            )
        tracker.tracker.flush()
    elif tracker.name == "wandb":
        found = {name: (histogram.counts, histogram.edges) for name, histogram in histograms.items()}
        tracker.log(wandb_objects(found, {}), step=step)
    elif hasattr(tracker, "log_histogram"):
        tracker.log_histogram(dict(histograms), step=step)
    else:
        return False
    return True


def log_text(tracker: Any, texts: Mapping[str, str], step: int) -> bool:
    """As `log_histogram`, for texts. A user's own tracker needs a method `log_text`."""
    if tracker.name == "tensorboard":
        for name, text in texts.items():
            tracker.tracker.add_text(name, text, global_step=step)
        tracker.tracker.flush()
    elif tracker.name == "wandb":
        tracker.log(wandb_objects({}, texts), step=step)
    elif hasattr(tracker, "log_text"):
        tracker.log_text(dict(texts), step=step)
    else:
        return False
    return True


def wandb_objects(histograms: Mapping[str, Any], texts: Mapping[str, str]) -> dict[str, Any]:
    """Histograms (counts and edges) and texts as objects of W&B. A text is shown with its line breaks and angle
    brackets.
    """
    if not histograms and not texts:
        return {}
    from wandb import Histogram, Html

    shown: dict[str, Any] = {name: Histogram(np_histogram=tuple(found)) for name, found in histograms.items()}
    shown |= {name: Html(f"<pre>{html.escape(text)}</pre>", inject=False) for name, text in texts.items()}
    return shown
