"""Divergences of a student from a teacher: by hand, against full logits, and how much of these exists at once."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_alignment.losses import LinearHead, linear_divergence, token_divergence

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
V = 17


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.0, kl([0.75, 0.25], [0.5, 0.5])),  # forward: teacher || student
        (1.0, kl([0.5, 0.5], [0.75, 0.25])),  # reverse: student || teacher
        (0.5, 0.5 * kl([0.75, 0.25], [0.625, 0.375]) + 0.5 * kl([0.5, 0.5], [0.625, 0.375])),
        (0.2, 0.2 * kl([0.75, 0.25], [0.55, 0.45]) + 0.8 * kl([0.5, 0.5], [0.55, 0.45])),
    ],
)
def test_divergence_of_two_tokens_worked_by_hand(beta, expected):
    """The teacher has 3/4 and 1/4, the student 1/2 and 1/2."""
    teacher, student = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log(), torch.zeros(1, 2, dtype=torch.float64)
    assert token_divergence(student, teacher, beta).item() == pytest.approx(expected, rel=1e-12)
    # A temperature of 2 takes the root of probabilities; the loss has no further factor.
    flat = token_divergence(student, teacher, beta, temperature=2.0)
    assert flat.item() == pytest.approx(token_divergence(student, teacher / 2, beta).item(), rel=1e-12)


@pytest.mark.parametrize(("beta", "end"), [(1e-7, 0.0), (1 - 1e-7, 1.0)])
def test_ends_are_the_limits_of_what_lies_between_them_divided_by_beta(beta, end):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, V, dtype=torch.float64).unbind(0)
    between = token_divergence(student, teacher, beta) / min(beta, 1 - beta)
    torch.testing.assert_close(between, token_divergence(student, teacher, end), rtol=1e-5, atol=0.0)


def heads(dtype, softcap=None, scale=1.0, with_bias=True, positions=11, seed=0):
    """Student and teacher of two widths, and everything of the student that can be trained."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias = draw(positions, 6), draw(V, 6), draw(V) if with_bias else None
    trained = [each.requires_grad_() for each in (hidden, weight, bias) if each is not None]
    teacher = LinearHead(draw(V, 9), draw(V), scale=0.6, softcap=4.0)
    return hidden, LinearHead(weight, bias, scale, softcap), draw(positions, 9), teacher, trained


def full_logits(hidden, head):
    logits = hidden @ head.weight.T
    logits = head.scale * (logits if head.bias is None else logits + head.bias)
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    ("scale", "softcap", "temperature", "with_bias"),
    [(1.0, None, 1.0, False), (0.25, None, 0.7, True), (1.0, 2.0, 1.0, False), (0.5, 3.0, 1.6, True)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_chunked_divergence_and_gradients_equal_a_loop_over_full_logits(
    beta, scale, softcap, temperature, with_bias, weighted
):
    hidden, head, teacher_hidden, teacher, trained = heads(torch.float64, softcap, scale, with_bias)
    weights = torch.rand(11, dtype=torch.float64) if weighted else None
    settings = {"beta": beta, "temperature": temperature}
    total, each = linear_divergence(hidden, head, teacher_hidden, teacher, weights, **settings, chunk_size=4)
    student = (full_logits(hidden, head) / temperature).softmax(-1)  # [N, V]
    target = (full_logits(teacher_hidden, teacher) / temperature).softmax(-1)
    mixture = beta * target + (1 - beta) * student
    rows = []
    for s, t, m in zip(student, target, mixture, strict=True):
        to_teacher, to_student = (t * (t / m).log()).sum(), (s * (s / m).log()).sum()
        if beta in (0, 1):
            rows.append((t * (t / s).log()).sum() if beta == 0 else (s * (s / t).log()).sum())
        else:
            rows.append(beta * to_teacher + (1 - beta) * to_student)
    expected = torch.stack(rows)
    torch.testing.assert_close(each, expected, rtol=1e-10, atol=1e-10)
    expected = (expected if weights is None else expected * weights).sum()
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    # A factor on the loss must reach the gradients, which were made before it was known.
    for one, other in zip(
        torch.autograd.grad(3 * total, trained), torch.autograd.grad(3 * expected, trained), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    plain = token_divergence(full_logits(hidden, head), full_logits(teacher_hidden, teacher), **settings)
    torch.testing.assert_close(plain, each, rtol=1e-10, atol=1e-10)
    assert not each.requires_grad and plain.requires_grad


@pytest.mark.parametrize("beta", BETAS)
def test_plain_form_has_the_same_gradient_and_leaves_the_teacher_alone(beta):
    hidden, head, teacher_hidden, teacher, trained = heads(torch.float64)
    total, _ = linear_divergence(hidden, head, teacher_hidden, teacher, beta=beta)
    logits = full_logits(teacher_hidden, teacher).requires_grad_()
    plain = token_divergence(full_logits(hidden, head), logits, beta).sum()
    found, expected = (
        torch.autograd.grad(total, trained),
        torch.autograd.grad(plain, [*trained, logits], allow_unused=True),
    )
    assert expected[-1] is None
    for one, other in zip(found, expected[:-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_step_along_the_gradient_brings_the_student_nearer_and_a_copy_is_no_way_off(beta):
    hidden, head, teacher_hidden, teacher, _ = heads(torch.float64)
    before, _ = linear_divergence(hidden, head, teacher_hidden, teacher, beta=beta)
    (gradient,) = torch.autograd.grad(before, hidden)
    after, _ = linear_divergence(hidden - 0.01 * gradient, head, teacher_hidden, teacher, beta=beta)
    assert after < before
    same, _ = linear_divergence(hidden, head, hidden.detach(), head, beta=beta)
    assert same.item() == pytest.approx(0.0, abs=1e-14)
    assert torch.autograd.grad(same, hidden)[0].abs().max() < 1e-14


class Largest(TorchDispatchMode):
    """Rows of the tallest tensor over the vocabulary that any operation made, and products with it."""

    rows, products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple) else (made,):
            if isinstance(each, torch.Tensor) and each.ndim == 2 and each.shape[1] == V:
                self.rows = max(self.rows, each.shape[0])
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return made


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_of_all_positions_never_exist_together(beta, with_bias):
    hidden, head, teacher_hidden, teacher, trained = heads(torch.float32, with_bias=with_bias, positions=48)
    with Largest() as seen:
        total, _ = linear_divergence(hidden, head, teacher_hidden, teacher, beta=beta, chunk_size=4)
        total.backward()
    # The teacher's product, and the student's with its two gradients; the heads' transposes are 6 and 9 high.
    assert seen.rows <= 9 and seen.products == 12 * 4
    assert all(each.grad is not None for each in trained)
    with Largest() as plain:
        token_divergence(full_logits(hidden, head), full_logits(teacher_hidden, teacher), 0.5)
    assert plain.rows == 48


@pytest.mark.parametrize("frozen", ["head", "all", "no_grad"])
def test_what_is_frozen_costs_no_product(frozen):
    hidden, head, teacher_hidden, teacher, trained = heads(torch.float32, positions=12)
    if frozen != "no_grad":
        for each in trained[1:] if frozen == "head" else trained:
            each.requires_grad_(False)
    with torch.set_grad_enabled(frozen != "no_grad"), Largest() as seen:
        total, _ = linear_divergence(hidden, head, teacher_hidden, teacher, beta=0.5, chunk_size=4)
    assert seen.products == 3 * (3 if frozen == "head" else 2)
    assert total.requires_grad is (frozen == "head")


@pytest.mark.parametrize("beta", BETAS)
def test_chunked_and_plain_form_are_finite_however_sure_both_are(beta):
    """Probabilities that are 0 in fp32: the mixture is made of logarithms."""
    student = torch.tensor([[1e4, 0.0, -1e4], [0.0, 100.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 0.0, 1e4], [100.0, 0.0, 0.0]])
    head = LinearHead(torch.eye(3))
    total, each = linear_divergence(student, head, teacher, head, beta=beta)
    plain = token_divergence(student, teacher, beta)
    torch.testing.assert_close(each, plain)
    for loss in (total, plain.sum()):
        (gradient,) = torch.autograd.grad(loss, student)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    if 0 < beta < 1:  # apart: b log 1/b + (1 - b) log 1/(1 - b), that which their choice tells
        most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert each.tolist() == pytest.approx([most, most], rel=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_computed_in_float32(autocast):
    hidden, head, teacher_hidden, teacher, trained = heads(torch.bfloat16)
    wide_hidden, wide_head, *_ = heads(torch.bfloat16)
    wide_head = LinearHead(wide_head.weight.detach().float(), wide_head.bias.detach().float())
    wide_teacher = LinearHead(teacher.weight.float(), teacher.bias.float(), teacher.scale, teacher.softcap)
    with torch.autocast("cpu", enabled=autocast):
        total, each = linear_divergence(hidden, head, teacher_hidden, teacher, beta=0.5)
    _, expected = linear_divergence(wide_hidden.float(), wide_head, teacher_hidden.float(), wide_teacher, beta=0.5)
    assert total.dtype == each.dtype == torch.float32
    torch.testing.assert_close(each, expected, rtol=0.05, atol=5e-3)
    for gradient, of in zip(torch.autograd.grad(total, trained), trained, strict=True):
        assert gradient.dtype == of.dtype


@pytest.mark.parametrize("beta", BETAS)
def test_teacher_in_another_precision_is_compared_in_the_students(beta):
    hidden, head, teacher_hidden, teacher, _ = heads(torch.float64)
    single = LinearHead(teacher.weight.float())
    _, each = linear_divergence(hidden, head, teacher_hidden, single, beta=beta)
    logits = full_logits(teacher_hidden.float(), single)
    torch.testing.assert_close(each, token_divergence(full_logits(hidden, head), logits, beta), rtol=1e-11, atol=1e-11)
    _, narrow = linear_divergence(teacher_hidden, single, hidden, head, beta=beta)
    assert each.dtype == torch.float64 and narrow.dtype == torch.float32


def test_no_position_gives_zero_loss_and_zero_gradient():
    hidden, head, teacher_hidden, teacher, trained = heads(torch.float32, positions=0)
    total, each = linear_divergence(hidden, head, teacher_hidden, teacher, torch.zeros(0), beta=0.5)
    total.backward()
    assert total == 0 and each.shape == (0,) and all((each.grad == 0).all() for each in trained)


def test_what_does_not_fit_is_refused():
    hidden, head, teacher_hidden, teacher, _ = heads(torch.float32)
    smaller = LinearHead(teacher.weight[:-1], teacher.bias[:-1])
    with pytest.raises(ValueError, match=r"student are \(11, 17\), those of the teacher \(11, 16\)"):
        linear_divergence(hidden, head, teacher_hidden, smaller, beta=0.5)
    with pytest.raises(ValueError, match=r"student are \(11, 17\), those of the teacher \(10, 17\)"):
        linear_divergence(hidden, head, teacher_hidden[:10], teacher, beta=0.5)
    with pytest.raises(ValueError, match="hidden has 11 positions, but weights has shape"):
        linear_divergence(hidden, head, teacher_hidden, teacher, torch.ones(10), beta=0.5)
    for beta, temperature in ((-0.1, 1.0), (1.1, 1.0), (math.nan, 1.0), (0.5, 0.0)):
        with pytest.raises(ValueError, match=f"beta is {beta} and temperature {temperature}"):
            token_divergence(torch.zeros(1, 2), torch.zeros(1, 2), beta, temperature)
