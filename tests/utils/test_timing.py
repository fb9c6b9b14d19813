"""The order of timed calls."""

from fgbg_kd.utils.timing import times_in_turn


def order_of(**options):
    made = []
    calls = {name: lambda i, name=name: made.append(f"{name}{i}") for name in "ab"}
    times = times_in_turn(calls, timer=lambda call: call() or 1.0, **options)
    assert {name: len(x) for name, x in times.items()} == dict.fromkeys("ab", options["runs"])
    return made[6:]  # after three runs of each to warm up


def test_calls_take_turns():
    assert order_of(runs=3) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_a_turn_has_a_block_of_runs_and_the_last_turn_the_rest():
    assert order_of(runs=3, block=2) == ["a0", "a1", "b0", "b1", "a2", "b2"]


def test_threads_of_the_previous_call_sleep_before_a_block(monkeypatch):
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    order_of(runs=3)
    assert slept == []
    order_of(runs=3, block=2)
    assert len(slept) == 4 and min(slept) >= 0.04


def test_no_turn_begins_after_the_time_but_five_runs_are_made():
    calls = {"a": lambda i: None}
    assert len(times_in_turn(calls, 50, timer=lambda call: 1.0, seconds=0.0)["a"]) == 5
    assert len(times_in_turn(calls, 50, lambda call: 1.0, seconds=0.0, block=10)["a"]) == 10
