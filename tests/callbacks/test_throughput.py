"""Speed is measured between two logs, and the device is waited for only then."""

from lit_alignment import Throughput
from tests.helpers import chats, sft_data, sft_module, trainer


def test_clock_is_read_once_a_log_and_stands_still_in_validation(tmp_path, monkeypatch):
    stops = []
    stop = Throughput._stop

    def counted(self, device):
        if self._start is not None:
            stops.append(self._tokens)
        stop(self, device)

    monkeypatch.setattr(Throughput, "_stop", counted)
    module = sft_module()
    data = sft_data(module, chats(16), chats(4, seed=1), packing=False, batch_size=1)
    callback = Throughput(every_n_steps=2)
    # 16 micro-batches, 4 steps, of which 2 are logged; the validation after the epoch finds the clock stopped.
    trainer(tmp_path, callbacks=[callback], accumulate_grad_batches=4).fit(module, data)
    assert len(stops) == 2
    assert int(callback.total_tokens) == data.reports["train"].tokens and callback.total_seconds > 0
