"""Families of score models: one module with a record ``FAMILY`` each, by name in one table.

``family.py`` says what a record says; ``models/score.py`` builds a model from the parts that it names.
"""

from dataclasses import fields

from megatron_bliss.config.choices import Choices
from megatron_bliss.config.models import ScoreConfig

FAMILIES = Choices("megatron_bliss.models.families", "FAMILY", ("transformer", "ngram", "both"))
"""score.family → :class:`~megatron_bliss.models.families.family.Family`."""


def check_family(config: ScoreConfig) -> None:
    """ValueError for an option of other families that is set: it would do nothing."""
    plain = ScoreConfig()
    defaults = {one.name: getattr(plain, one.name) for one in fields(ScoreConfig)}
    owners = {name: [key for key, one in FAMILIES.items() if name in one.options] for name in defaults}
    for name, families in owners.items():
        value = getattr(config, name)
        if families and config.family not in families and value != defaults[name]:
            raise ValueError(
                f"found score.{name} {value} with score.family {config.family}, expected its default "
                f"{defaults[name]}: it is for {' and '.join(families)} alone; leave it out, or set score.family"
            )
    family = FAMILIES[config.family]
    if config.init_from not in family.starts:
        raise ValueError(
            f"found score.init_from {config.init_from} with score.family {config.family}, expected "
            f"{', '.join(family.starts)}: change one of the two"
        )
    for name, needing in family.start_options.items():
        value = getattr(config, name)
        if config.init_from not in needing and value != defaults[name]:
            raise ValueError(
                f"found score.{name} {value} with score.init_from {config.init_from}, expected its default "
                f"{defaults[name]}: it is for {' and '.join(needing)} alone; leave it out, or set score.init_from"
            )
