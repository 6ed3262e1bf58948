import pytest

from thrifty.train.curve import losses, plot, terminal_plot

HISTORY = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}]


def test_losses_are_taken_by_key():
    assert losses(HISTORY, "loss") == ([1, 2], [3.0, 2.0])
    assert losses(HISTORY, "eval_loss") == ([2], [2.5])


def test_a_picture_is_drawn(tmp_path):
    plot(HISTORY, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_terminal_plot_falls():
    assert terminal_plot([4.0, 3.0, 2.0, 1.0], height=2) == "   4.00 ┤█▃  \n   1.00 ┤██▆▁"


@pytest.mark.parametrize("values", [[], [1.0], [2.0] * 500])
def test_any_curve_can_be_drawn(values):
    assert max((len(row) for row in terminal_plot(values, width=40).split("\n")), default=0) <= 49
