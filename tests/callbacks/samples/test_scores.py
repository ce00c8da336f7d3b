"""Reports over scored records: what counts as right."""

import json
import re

from lit_alignment import ScoredPicks
from tests.helpers import pairs, reward_data, reward_model, trainer


def test_report_counts_the_pairs_whose_chosen_response_has_the_higher_reward(tmp_path):
    """Seven pairs, so that the right and the wrong ones are never as many."""
    model = reward_model()
    runner = trainer(tmp_path, callbacks=[ScoredPicks(num_samples=7)])
    runner.fit(model, reward_data(model, pairs(7), pairs(7, seed=1)))
    lines = [json.loads(line) for line in (tmp_path / "cherry_picks.jsonl").read_text().splitlines()]
    page = (tmp_path / "report.html").read_text()
    counted = []
    for step in sorted({line["step"] for line in lines}):
        scores = [line["scores"] for line in lines if line["step"] == step]
        counted.append(sum(own["chosen"] > own["rejected"] for own in scores))
    assert [int(number) for number in re.findall("([0-9]) of 7<", page)] == counted
    assert page.count('class="pane met"') == sum(counted)
