"""What the pages of rounding and of outliers say of given numbers, and how a share is counted."""

import math

import pytest
import torch

from benchmarks import outliers, rounding, smoothing


class Given:
    """A demo of three windows whose losses are known."""

    def __init__(self, model, losses):
        self.model, self.batches, self.losses = model, [torch.randn(30, 8), torch.randn(20, 8)], losses

    def distances(self, model):
        with torch.no_grad():
            lost = float((model(self.batches[0]) - self.model(self.batches[0])).square().mean())
        return [x + lost + step for x, step in zip(self.losses, (0.01, 0.02, 0.03), strict=True)], [lost] * 3


def test_a_row_is_a_rise_with_its_error():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)).eval()
    demo = Given(model, [2.0, 3.0, 2.5])
    rows = {way: rounding.row(demo, "int8-dynamic", how) for way, how in rounding.WAYS.items()}
    for row in rows.values():
        assert row["rise"] == pytest.approx(100 * math.expm1(0.02 + row["kl"]))
        assert row["error"] == pytest.approx((100 + row["rise"]) * 0.01 / 3**0.5)
        assert row["kl"] > 0 and row["seconds"] >= 0
    given = {"float": 12.5, "calibration": 2, "windows": 3, "machine": "here"}
    page = rounding.page({**given, "rows": {f"int8-dynamic/{way}": row for way, row in rows.items()}})
    assert all(f"| int8-dynamic | {way} | " in page for way in rounding.WAYS) and "12.500" in page


def test_windows_are_spread():
    windows = torch.arange(10)[:, None]
    assert smoothing.spread(windows, 3).flatten().tolist() == [0, 3, 6]
    assert smoothing.spread(windows, 20).flatten().tolist() == list(range(10))


def test_the_page_of_outliers_keeps_what_was_not_measured_again():
    assert outliers.recovered(4.0, 2.05, 2.0) == pytest.approx(97.5)
    given = {"speed": {"head": ["a"], "rows": [["1"]], "note": "So."}, "planted": {"head": ["b"], "rows": [["2"]]}}
    page = outliers.page({"machine": "here", **given})
    assert (
        page.index("Outliers planted")
        < page.index("| b |")
        < page.index("What taking")
        < page.index("| a |")
        < page.index("So.")
    )
    assert "good for" not in page
