"""ST-LLM: all video tokens into the decoder, some of them dropped in training."""

from __future__ import annotations

from dataclasses import replace

from vkernels_video.claims import page, statistics
from vkernels_video.claims.experiment import DIGITS, Claim, Record, examine, table, train
from vkernels_video.digits import QUESTIONS
from vkernels_video.train import Recipe

RECIPE = Recipe(steps=500, kinds=QUESTIONS, warm_up=100)
ARMS = {"all tokens": "all", "mean over frames": "mean", "all tokens, masked in training": "all"}
ALL, MEAN, MASKED = ARMS
TIME = ("moves", "first", "when")


def run(seed: int) -> Record:
    arms = {}
    for arm, arrange in ARMS.items():
        recipe = replace(RECIPE, seed=seed, mask=arm == MASKED)
        arms[arm] = examine(train(DIGITS.with_options(arrange=arrange), recipe, arm), recipe)
    return {"arms": arms}


def tell(records: list[Record]) -> list[str]:
    against = statistics.difference(table(records, ALL), table(records, MEAN))
    temporal = statistics.difference(table(records, ALL, TIME), table(records, MEAN, TIME))
    masked = statistics.difference(table(records, MASKED), table(records, ALL))
    return [
        f"Preset `digits`, 8 frames, {RECIPE.steps} steps of {RECIPE.size} films for every arm.",
        "",
        *page.shares(records, ARMS, QUESTIONS),
        "",
        "Films that differ in nothing but their order have the same mean of the frames: it knows the digits, not when "
        "they came. With half of the tokens gone, a part's two frames often lose the digit asked for.",
        "",
        f"- All tokens beat the mean, all questions: {page.points(against)}: **{statistics.more(against)}**.",
        f"- Questions about time (moves, first, when): {page.points(temporal)}: **{statistics.more(temporal)}**.",
        f"- Masked training costs no accuracy (margin 3 points), after equally many steps: {page.points(masked)}: "
        f"**{statistics.as_much(masked, 0.03)}**.",
    ]


CLAIM = Claim(
    "tokens",
    "All tokens against mean pooling, with and without masking (ST-LLM)",
    "A decoder that reads all tokens of all frames understands time; the mean of the frames does not. Dropping about "
    "half of the tokens in training costs no accuracy.",
    3,
    run,
    tell,
)
