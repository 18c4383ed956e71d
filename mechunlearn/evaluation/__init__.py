"""Is the knowledge gone, and what else went with it?"""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.evaluation.compare import compare as compare
    from mechunlearn.evaluation.comparison import Comparison as Comparison
    from mechunlearn.evaluation.controls import random_control as random_control
    from mechunlearn.evaluation.controls import random_mask as random_mask
    from mechunlearn.evaluation.controls import remade_from_card as remade_from_card
    from mechunlearn.evaluation.damage import damage as damage
    from mechunlearn.evaluation.drift import next_token_kl as next_token_kl
    from mechunlearn.evaluation.evaluate import evaluate as evaluate
    from mechunlearn.evaluation.recipes import DeletedTopic as DeletedTopic
    from mechunlearn.evaluation.recipes import delete_topic as delete_topic
    from mechunlearn.evaluation.recipes import wash as wash
    from mechunlearn.evaluation.report import Report as Report
    from mechunlearn.evaluation.robustness import Attacked as Attacked
    from mechunlearn.evaluation.robustness import attack_all as attack_all
    from mechunlearn.evaluation.workflow import EditedFacts as EditedFacts
    from mechunlearn.evaluation.workflow import edit_facts as edit_facts
else:
    lazy(__name__)
