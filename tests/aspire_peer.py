"""Denoise stacks with ASPIRE, in a process of its own: importing it takes over logging and writes into the folder.

Usage: python aspire_peer.py STACK.npz ..., in a scratch folder. STACK: images (n, L, L), variance, basis ("ffb" or
"fle"), pixel_size, and with CTF: voltage, cs, contrast, defocus (groups,) and group (n,). Writes STACK.npz.out.npz:
images, without the CTF; seconds of the denoising alone and the peak memory of the process in MB.
"""

import resource
import sys
import time

import numpy as np
from aspire.basis import FFBBasis2D, FLEBasis2D
from aspire.denoising import DenoiserCov2D
from aspire.operators import RadialCTFFilter
from aspire.source import ArrayImageSource


def denoise(given):
    size = given["images"].shape[-1]
    with_ctf = "defocus" in given
    # ASPIRE's CTF has the other sign: so do the images that it is to explain
    images = -given["images"] if with_ctf else given["images"]
    source = ArrayImageSource(images, pixel_size=float(given["pixel_size"]))
    if with_ctf:
        optics = [float(given[name]) for name in ("cs", "contrast")]
        source.unique_filters = [RadialCTFFilter(float(given["voltage"]), float(d), *optics) for d in given["defocus"]]
        source.filter_indices = given["group"]
    begin = time.perf_counter()
    basis = (FFBBasis2D if given["basis"] == "ffb" else FLEBasis2D)((size, size), dtype=np.float32)
    images = DenoiserCov2D(source, basis, float(given["variance"])).denoise[:].asnumpy()
    return {"images": images, "seconds": time.perf_counter() - begin}


for name in sys.argv[1:]:
    out = denoise(np.load(name))
    np.savez(f"{name}.out.npz", peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **out)
