"""Emulated bfloat16 products: their rounding, and that every product is emulated."""

import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from small import write_encoder, write_rows
from torch.utils._python_dispatch import TorchDispatchMode

import minipref
from minipref.predictor import autocast

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablations
from ablations import RoundedProducts


def rounded(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(torch.bfloat16)


a, b, c = rounded(30, 200), rounded(200, 40), rounded(30, 40)
CASES = {  # name: (operation, the same in float64)
    "mm": (lambda: a @ b, lambda: a.double() @ b.double()),
    "mm into": (lambda: torch.mm(a, b, out=torch.empty_like(c)), lambda: a.double() @ b.double()),
    "addmm": (lambda: torch.addmm(c, a, b), lambda: c.double() + a.double() @ b.double()),
    "bmm": (lambda: torch.bmm(a[None], b[None])[0], lambda: a.double() @ b.double()),
    "bmm into": (lambda: torch.bmm(a[None], b[None], out=torch.empty_like(c)[None])[0],
                 lambda: a.double() @ b.double()),
    "baddbmm, factors": (lambda: torch.baddbmm(c[None], a[None], b[None], beta=0.5, alpha=2)[0],
                         lambda: c.double() / 2 + 2 * (a.double() @ b.double())),
    "baddbmm in place": (lambda: c.clone()[None].baddbmm_(a[None], b[None], alpha=2)[0],
                         lambda: c.double() + 2 * (a.double() @ b.double())),
}


@pytest.mark.parametrize("case", CASES)
def test_a_product_is_that_of_float64_rounded_once(case):
    compute, exact = CASES[case]
    with RoundedProducts():
        found = compute()
    expected = exact().to(torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found == expected).float().mean() > 0.99              # float32's own error tips a few over a rounding edge
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-4)


def test_float32_is_left_alone():
    wide = a.float(), b.float()
    with RoundedProducts():
        found = wide[0] @ wide[1]
    assert torch.equal(found, wide[0] @ wide[1])


class Products(TorchDispatchMode):
    """Records the matrix products, each with the dtype of its first factor."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(name in str(op) for name in ("mm", "linear", "matmul", "convolution", "attention")):
            self.found.append((str(op), args[0].dtype))
        return op(*args, **(kwargs or {}))


def test_no_product_of_a_training_step_goes_without():
    model = minipref.load_encoder(ROOT / "weights" / "minipref-tiny")
    ids = torch.randint(10, 1000, (2, 40), generator=torch.Generator().manual_seed(0))

    def gradients() -> torch.Tensor:
        model.zero_grad()
        with autocast(ids.device, "bf16"):
            loss = model(ids, torch.ones_like(ids, dtype=torch.bool)).square().sum()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    with Products() as plain:
        expected = gradients()
    with Products() as products, RoundedProducts():
        found = gradients()
    assert len(products.found) == len(plain.found) > 100
    assert torch.bfloat16 in {dtype for _, dtype in plain.found}
    assert torch.bfloat16 not in {dtype for _, dtype in products.found}
    assert (found - expected).norm() < 0.05 * expected.norm()      # two orders of summing, rounded at every layer


def test_the_line_bf16_has_the_rounding_and_no_product_without_units(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablations, "choose_precision", lambda name, device: "fp32")
    encoder, rows = write_encoder(tmp_path / "encoder", dropout=0.0), write_rows(tmp_path / "rows.csv", 60)
    options = ["--encoder", str(encoder), "--train", str(rows), "--recipe", "tiny", "--epochs", "1", "--device", "cpu"]
    with Products() as products:
        assert ablations.main(["--only", "fp32", "bf16", "--", *options]) == 0
    assert {dtype for _, dtype in products.found} <= {torch.float32, torch.float64}      # float64: the length baseline
    assert "| fp32 |" in (out := capsys.readouterr().out) and "| bf16 |" in out
    fp32, bf16 = (load_file(next(tmp_path.glob(f"runs/ablations/{name}-42*/model/model.safetensors")))
                  for name in ("fp32", "bf16"))
    assert any(not torch.equal(fp32[name], bf16[name]) for name in fp32)                  # rounded on the way,
    assert all(torch.allclose(fp32[name], bf16[name], atol=0.01) for name in fp32)        # and no more than that
