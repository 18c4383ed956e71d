"""Numbers from logits, and intervals over facts."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.metrics.answers import answer_logprob as answer_logprob
    from mechunlearn.metrics.answers import answer_probability as answer_probability
    from mechunlearn.metrics.answers import answered as answered
    from mechunlearn.metrics.answers import at_answers as at_answers
    from mechunlearn.metrics.answers import logit_diff as logit_diff
    from mechunlearn.metrics.answers import measure as measure
    from mechunlearn.metrics.answers import option_logprobs as option_logprobs
    from mechunlearn.metrics.answers import with_answers as with_answers
    from mechunlearn.metrics.continuations import exact_memorization as exact_memorization
    from mechunlearn.metrics.continuations import extraction_strength as extraction_strength
    from mechunlearn.metrics.continuations import probability as probability
    from mechunlearn.metrics.continuations import read_behind as read_behind
    from mechunlearn.metrics.continuations import read_whole as read_whole
    from mechunlearn.metrics.membership import auc as auc
    from mechunlearn.metrics.membership import min_k as min_k
    from mechunlearn.metrics.membership import zlib_score as zlib_score
    from mechunlearn.metrics.stats import bootstrap_interval as bootstrap_interval
    from mechunlearn.metrics.stats import paired_interval as paired_interval
    from mechunlearn.metrics.text import ngram_entropy as ngram_entropy
    from mechunlearn.metrics.text import text_loss as text_loss
    from mechunlearn.metrics.text import token_losses as token_losses
else:
    lazy(__name__)
