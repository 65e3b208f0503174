"""Figures of the next token, as an evaluation of a MAR bundle takes them, from few contexts and draws."""

from export.digits.next_token import next_token_distances


def test_exact_is_as_near_as_the_target_and_a_draft_is_not(cpu):
    found = next_token_distances(cpu("digits-mar"), "small", (1, 42), contexts=3, draws=200)

    assert set(found) == {"target", "draft", "exact", "tau_1", "tau_42"}
    assert 0.2 < found["exact"]["acceptance_rate"] < 0.8
    assert found["tau_42"]["acceptance_rate"] > found["tau_1"]["acceptance_rate"]
    assert found["exact"]["energy_distance"] < 0.3 * found["draft"]["energy_distance"]
