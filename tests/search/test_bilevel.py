import pytest
import torch

from dnas_ens.search.bilevel import first_order_gradient, second_order_gradient


def problem(weights=4, architecture=3):
    """L_train = w'Aw/2 + w'Ba + b'w and L_val = (w - c)'C(w - c)/2 + d'a + a'a/2, all closed-form."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    squares = [draw(weights, weights) for _ in "AC"]
    q = {name: square @ square.T for name, square in zip("AC", squares, strict=True)}
    q |= {"B": draw(weights, architecture), "b": draw(weights), "c": draw(weights), "d": draw(architecture)}
    q |= {"w": draw(weights).requires_grad_(), "a": draw(architecture).requires_grad_()}

    def training():
        return q["w"] @ q["A"] @ q["w"] / 2 + q["w"] @ q["B"] @ q["a"] + q["b"] @ q["w"]

    def validation():
        miss = q["w"] - q["c"]
        return miss @ q["C"] @ miss / 2 + q["d"] @ q["a"] + q["a"] @ q["a"] / 2

    return q, training, validation


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_second_order_step_against_the_closed_form(momentum, weight_decay):
    q, training, validation = problem()
    xi = 0.05
    buffer = torch.arange(4, dtype=torch.float64) if momentum else None
    before = q["w"].detach().clone()
    parts = {"weights": [q["w"]], "architecture": [q["a"]], "learning_rate": xi}
    sgd = {"momentum": momentum, "momentum_buffers": [buffer], "weight_decay": weight_decay}
    loss, (gradient,) = second_order_gradient(training, validation, **parts, **sgd)
    w, a = before, q["a"].detach()
    step = q["A"] @ w + q["B"] @ a + q["b"] + weight_decay * w
    if buffer is not None:
        step = step + momentum * buffer
    virtual = w - xi * step
    slope = q["C"] @ (virtual - q["c"])
    expected = q["d"] + a - xi * q["B"].T @ slope
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)
    miss = virtual - q["c"]
    torch.testing.assert_close(loss, miss @ q["C"] @ miss / 2 + q["d"] @ a + a @ a / 2)
    assert torch.equal(q["w"].detach(), before)
    # Without a virtual step it is the first order.
    untouched = torch.ones(2, requires_grad=True)
    _, (first, zeros) = first_order_gradient(validation, [q["a"], untouched])
    torch.testing.assert_close(first, (q["d"] + q["a"]).detach())
    assert zeros.tolist() == [0.0, 0.0]


def test_weights_are_restored_when_the_validation_loss_fails():
    q, training, _ = problem()
    before = q["w"].detach().clone()

    def broken():
        raise RuntimeError("no validation today")

    with pytest.raises(RuntimeError, match="no validation"):
        second_order_gradient(training, broken, weights=[q["w"]], architecture=[q["a"]], learning_rate=0.1)
    assert torch.equal(q["w"].detach(), before)
