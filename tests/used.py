"""What a sample must say, in fp64, of the gradients that optimizers really used: the oracle of tests of hooks."""

import torch

from seedtriton.gradients.row import ELEMENTS, EXTRA, QUANTITIES

VANISHING_RMS, EXPLODING_RMS = 0.01, 0.3  # limits between which the gradients of these small networks fall both ways


def row_of(gradients, segments):
    """A row of the ring but for EXTRA, from ``(segment, gradient)`` pairs without loss scale, one by one."""
    row = torch.zeros(segments, QUANTITIES, dtype=torch.float64)
    for segment, gradient in gradients:
        wide = gradient.double()
        sumsq = float((wide * wide).sum())
        rms = (sumsq / wide.numel()) ** 0.5
        live = sumsq != 0.0
        row[segment, : EXTRA] += torch.tensor(
            [sumsq, live, live and rms < VANISHING_RMS, not rms <= EXPLODING_RMS, 1, wide.numel()],
            dtype=torch.float64,
        )
    assert ELEMENTS + 1 == EXTRA == QUANTITIES - 1
    return row[:, : EXTRA]


class Used:
    """The gradients of one round of steps, noted by the loop itself right before each step."""

    def __init__(self, monitor, host, seeds):
        monitor.vanishing_rms, monitor.exploding_rms = VANISHING_RMS, EXPLODING_RMS
        self.monitor, self.rows, self.noted = monitor, [], {}
        self.segments = {id(p): 0 for p in host}
        self.segments.update({id(p): 1 + k for k, seed in enumerate(seeds) for p in seed})

    def note(self, parameters, scale=1.0):
        """These are used now, if nobody used them before in this round."""
        for parameter in parameters:
            if parameter.grad is not None and id(parameter) not in self.noted:
                gradient = parameter.grad.detach().double().clone() / scale
                self.noted[id(parameter)] = self.segments[id(parameter)], gradient

    def close(self):
        """The round is over."""
        self.rows.append(row_of(self.noted.values(), 1 + max(self.segments.values())))
        self.noted = {}

    def drop(self):
        """It is no sample."""
        self.noted = {}

    def check(self):
        """Every row of the ring is that of its round."""
        assert int(self.monitor.count) == len(self.rows) <= self.monitor.window
        found = self.monitor.ring[: len(self.rows), :, : EXTRA]
        torch.testing.assert_close(found, torch.stack(self.rows), rtol=1e-6, atol=0, equal_nan=True)
