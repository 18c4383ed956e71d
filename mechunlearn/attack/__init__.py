"""Attacks: `(model, edit, forget, retain, *, seed, ...) -> rows`: each tries to get the knowledge back, one a file."""

from typing import TYPE_CHECKING

from mechunlearn.core.lazy import lazy

if TYPE_CHECKING:
    from mechunlearn.attack.activation_perturbation import activation_perturbation as activation_perturbation
    from mechunlearn.attack.bounds import recovery as recovery
    from mechunlearn.attack.hints import hints as hints
    from mechunlearn.attack.membership_inference import membership_inference as membership_inference
    from mechunlearn.attack.multiple_choice import multiple_choice as multiple_choice
    from mechunlearn.attack.probing import probing as probing
    from mechunlearn.attack.prompting import prompting as prompting
    from mechunlearn.attack.quantization import quantization as quantization
    from mechunlearn.attack.relearning import relearning as relearning
    from mechunlearn.attack.sampling import sampling as sampling
    from mechunlearn.attack.soft_prompt import soft_prompt as soft_prompt
    from mechunlearn.attack.steering import steering as steering
    from mechunlearn.attack.unlearning_depth import unlearning_depth as unlearning_depth
else:
    lazy(__name__, methods=True)
