import math

import pytest
import torch

from cryobench.errors import CryobenchError
from cryobench.imaging.ctf import Optics, ctf_2d, random_defocus

OPTICS = Optics(voltage_kv=300, cs_mm=2.7, amplitude_contrast=0.1, pixel_size=1.5)


def closed_form(u: float, v: float, angle: float, optics: Optics, size: int) -> torch.Tensor:
    """The formula of the module's text in float64, with the wavelength from the constants of physics."""
    energy, rest = optics.voltage_kv * 1e3, 510998.95
    wavelength = 12398.41984 / math.sqrt(energy * (energy + 2 * rest))  # angstrom: hc / sqrt(E (E + 2 m c^2))
    ky = torch.fft.fftfreq(size, optics.pixel_size, dtype=torch.float64)[:, None]
    kx = torch.fft.rfftfreq(size, optics.pixel_size, dtype=torch.float64)[None, :]
    k2 = kx**2 + ky**2
    turned = torch.atan2(ky, kx) - math.radians(angle)
    defocus = u * torch.cos(turned) ** 2 + v * torch.sin(turned) ** 2
    phase = math.pi * wavelength * defocus * k2 - math.pi / 2 * optics.cs_mm * 1e7 * wavelength**3 * k2**2
    return torch.sin(phase + math.asin(optics.amplitude_contrast))


@pytest.mark.parametrize("size", [32, 49])
@pytest.mark.parametrize("optics", [OPTICS, Optics(200, 2.0, 0.07, 2.1), Optics(120, 0.0, 0.0, 3.0)])
def test_ctf_is_the_closed_form(size: int, optics: Optics) -> None:
    u, v, angle = [15000.0, 12000.0, 20000.0], [13000.0, 12000.0, 17000.0], [30.0, 0.0, 160.0]
    ctf = ctf_2d(torch.tensor(u), torch.tensor(v), torch.tensor(angle), optics, size)
    assert ctf.shape == (3, size, size // 2 + 1)
    assert ctf.dtype == torch.float32
    expected = torch.stack([closed_form(*parameters, optics, size) for parameters in zip(u, v, angle, strict=True)])
    # the wavelength's constants differ in the sixth digit between programs: a phase of 100 radians shifts by 1e-3
    torch.testing.assert_close(ctf.double(), expected, atol=5e-3, rtol=0)


def test_particles_stay_bright() -> None:
    ctf = ctf_2d(*(torch.tensor([x]) for x in (15000.0, 15000.0, 0.0)), OPTICS, 64)
    assert ctf[0, 0, 0] == pytest.approx(0.1, abs=1e-6)
    assert ctf[0, 0, 2] > ctf[0, 0, 1] > ctf[0, 0, 0]  # it rises from there: underfocus


def test_bfactor_is_an_envelope() -> None:
    defocus = [torch.tensor([x]) for x in (15000.0, 14000.0, 20.0)]
    plain, damped = ctf_2d(*defocus, OPTICS, 48), ctf_2d(*defocus, OPTICS, 48, bfactor=80.0)
    ky, kx = -5, 7
    k2 = (ky**2 + kx**2) / (48 * 1.5) ** 2
    assert float(damped[0, ky, kx]) == pytest.approx(float(plain[0, ky, kx]) * math.exp(-80 * k2 / 4), rel=1e-4)


def test_random_defocus() -> None:
    u, v, angle = random_defocus(5000, torch.Generator().manual_seed(0), 10000, 20000, 300)
    mean, difference = (u + v) / 2, u - v
    assert mean.min() >= 10000
    assert mean.max() <= 20000
    assert float(mean.mean()) == pytest.approx(15000, abs=4 * 10000 / math.sqrt(12 * 5000))
    assert difference.min() >= 0
    assert float(difference.mean()) == pytest.approx(300, abs=4 * 600 / math.sqrt(12 * 5000))
    assert angle.min() >= 0
    assert angle.max() < 180
    again = random_defocus(5000, torch.Generator().manual_seed(0), 10000, 20000, 300)
    assert all(torch.equal(a, b) for a, b in zip((u, v, angle), again, strict=True))


def test_wrong_input() -> None:
    with pytest.raises(CryobenchError, match="amplitude contrast"):
        Optics(amplitude_contrast=1.5)
    with pytest.raises(CryobenchError, match="impossible optics"):
        Optics(pixel_size=0)
    with pytest.raises(CryobenchError, match="one length"):
        ctf_2d(torch.ones(2), torch.ones(2), torch.ones(1), OPTICS, 32)
    with pytest.raises(CryobenchError, match="defocus range"):
        random_defocus(3, low=2, high=1)
