"""What the names in the report mean, for readers who know a KV cache and nothing of this project."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from xkv_service.calibration.limits import ERRORS, NEGLIGIBLE
from xkv_service.calibration.report.markup import Markup, breakable, element, joined
from xkv_service.calibration.steps import SHARED

STEP_NAMES: Mapping[str, str] = {
    "recipe": "No calibration: groups of equal size, bases made for each document, factors of 8 bits, an "
    "index that is stored.",
    "derived index": "As recipe, but the index is made of the factors at loading and takes no bytes.",
    "ranks and weights": "Groups, ranks and metric of the calibration; bases made for each document, factors "
    "of 8 bits.",
    "bits": "As ranks and weights, but a column of factors has 8, 4, 2 or no bits, by what it is worth.",
    "calibrated bases": "As ranks and weights, but with the calibration’s bases, shared by all documents.",
    "calibrated bases, 4 bits": "As calibrated bases, with factors of 4 bits.",
    SHARED: "As calibrated bases, with 8, 4, 2 or no bits for a column of factors.",
}
"""Of ways to compress; each adds one decision to one before it."""

METRIC_NAMES: Mapping[str, str] = {
    "plain": "Errors of all layers count alike.",
    "tolerance": "An error counts by what noise its layer stands before predictions move.",
    "tolerance+output": "As tolerance; errors of values also by what the output projection makes of them.",
    "tolerance+query": "As tolerance; errors of keys also by the energy of queries in each rotary plane.",
    "tolerance+both": "As tolerance; keys also by the energy of queries, values by the output projection.",
    "tolerance+covariance": "As tolerance; errors of keys also by the covariance of queries.",
    "tolerance+covariance+output": "As tolerance; keys also by the covariance of queries, values by the "
    "output projection.",
}
"""Of rules that say which errors of keys and values matter. Queries are those of the probes."""

WORDS: Mapping[str, str] = {
    "Exact cache": "The keys and values that the model computes, 16 bits a number. All is compared with it.",
    "Ratio": "Bytes of the exact cache for each byte stored for a document, its index and exact tokens "
    "included. Bases that all documents share are stored once for the model and not counted.",
    "Factors, bases": "The keys, or the values, of a group of layers are stored as a product: factors, a row "
    "for each token, times bases, a row for each direction kept. The rank is the number of directions.",
    "Index": "What finds the tokens worth attending to: a sketch of each token’s keys.",
    "Probe": "A question and its answer behind a document, or the end of a document without questions.",
    "Divergence": "The mean Kullback-Leibler divergence of next-token predictions from those of the exact "
    "cache, in nats: 0 is the same predictions.",
    "Agreement": "The share of positions at which the likeliest next token is the same.",
    "Right": "The share of the probes with a known answer whose every token of it is the likeliest one, the "
    "right tokens before it given.",
    "Better": f"By more than {ERRORS} standard errors of the difference, where both were measured on several "
    "documents. That error is the root of the sum of both errors squared, as if the documents were not the "
    "same ones.",
    "Chosen": "Of metrics and of groups, the one of least divergence, however close the others are. Of steps "
    f"“{SHARED}”, unless another is better, and by more than {NEGLIGIBLE:g} nats.",
}


def explained(names: Iterable[str], meanings: Mapping[str, str]) -> Markup:
    """A list of those names that have a meaning here, each with it."""
    known = [name for name in names if name in meanings]
    pairs = [joined(element("dt", breakable(name)), element("dd", meanings[name])) for name in known]
    return element("dl", *pairs) if pairs else joined()
