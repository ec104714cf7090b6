"""What selection cost against what it saved, said in a line and counted by hand."""

from megatron_bliss.report.savings import savings_sentences
from megatron_bliss.report.summary import build_summary
from tests.report.costs import STAGES, evaluations


def sentences(scale=1e12, **arms):
    stages = [one | {"flops": one["flops"] * scale} for one in STAGES]
    summary = build_summary(arms, stages=stages, domains_by_field={}, seed=1, config_text="", versions={})
    return savings_sentences(summary)


def test_selection_is_set_against_the_training_it_saved():
    # random ends at 5.5; bliss has that at 2500 of 5000 tokens, after 100 + 150 of 500 TFLOP and 10 + 15 of 50 s
    found = sentences(bliss=evaluations([8, 6, 5, 4, 3]), random=evaluations([8, 7, 6.5, 6, 5.5]))
    assert found == [
        "bliss: selection cost 107.0 TFLOP (21.4 % of its target's training) and 0:55 (110 %); it reached random's "
        "final loss on lambada after 50 % of the steps, which saved 250.0 TFLOP and 0:25 of training."
    ]


def test_an_arm_that_never_gets_there_saved_nothing():
    (found,) = sentences(bliss=evaluations([8, 7, 7, 7, 7]), random=evaluations([8, 7, 6.5, 6, 5.5]))
    assert found.endswith("; it did not reach random's final loss on lambada in fewer steps: nothing was saved.")


def test_without_a_control_only_the_cost_is_said():
    (found,) = sentences(bliss=evaluations([8, 6, 5, 4, 3]))
    assert found.endswith("0:55 (110 %).")


def test_a_selection_without_a_model_costs_no_flops():
    stages = [one | {"arm": "dsir"} for one in STAGES if one["arm"] == "random"]
    arms = {"dsir": evaluations([8, 6, 5, 4, 3]), "random": evaluations([8, 7, 6.5, 6, 5.5])}
    summary = build_summary(arms, stages=STAGES + stages, domains_by_field={}, seed=1, config_text="", versions={})
    assert savings_sentences(summary)[0].startswith("dsir: selection cost no FLOPs (0 % of its target's training) and")


def test_arms_without_costs_have_no_sentence():
    summary = build_summary(
        {"bliss": evaluations([8, 6, 5, 4, 3])}, stages=[], domains_by_field={}, seed=1, config_text=""
    )
    assert savings_sentences(summary) == []
