import logging
import pickle
import threading
import time

from sparse_prune.callbacks.uploads import Uploads


def test_actions_run_in_order_beside_the_caller():
    uploads, order, gate = Uploads(), [], threading.Event()
    uploads.submit("a", lambda: gate.wait(10) and order.append(1))
    uploads.submit("a", lambda: order.append(2))
    assert order == []
    uploads.wait(0.05)
    assert order == []
    gate.set()
    uploads.wait(10)
    assert order == [1, 2]


def test_a_receiver_that_fails_is_reported_once_and_left_alone(caplog):
    uploads, got = Uploads(), []

    def fail():
        raise ConnectionError("no way")

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            uploads.submit("bad", fail)
        uploads.submit("good", lambda: got.append(1))
        uploads.wait(10)
    assert got == [1]
    assert caplog.text.count("no way") == 1
    assert "bad takes no files" in caplog.text


def test_waiting_ends_when_the_time_is_up():
    uploads, gate = Uploads(), threading.Event()
    uploads.submit("slow", lambda: gate.wait(10))
    start = time.perf_counter()
    uploads.wait(0.1)
    assert time.perf_counter() - start < 5
    gate.set()


def test_a_copy_has_nothing_to_do_and_works():
    uploads, got = Uploads(), []
    uploads.submit("a", lambda: None)
    uploads.wait(10)
    other = pickle.loads(pickle.dumps(uploads))
    other.submit("a", lambda: got.append(1))
    other.wait(10)
    assert got == [1]
