"""Denoise a stack with ASPIRE, in a process of its own: importing it takes over logging and writes into the folder.

Usage: python aspire_peer.py IN.npz OUT.npz, in a scratch folder. IN: images (n, L, L), variance, basis ("ffb" or
"fle"), pixel_size, and with CTF: voltage, cs, contrast, defocus (groups,) and group (n,). OUT: images, without the
CTF; seconds of the denoising alone and the peak memory of the process in MB.
"""

import resource
import sys
import time

import numpy as np
from aspire.basis import FFBBasis2D, FLEBasis2D
from aspire.denoising import DenoiserCov2D
from aspire.operators import RadialCTFFilter
from aspire.source import ArrayImageSource

given = np.load(sys.argv[1])
size = given["images"].shape[-1]
with_ctf = "defocus" in given
# ASPIRE's CTF has the other sign: so do the images that it is to explain
images = -given["images"] if with_ctf else given["images"]
source = ArrayImageSource(images, pixel_size=float(given["pixel_size"]))
if with_ctf:
    microscope = [float(given[name]) for name in ("cs", "contrast")]
    source.unique_filters = [RadialCTFFilter(float(given["voltage"]), float(d), *microscope) for d in given["defocus"]]
    source.filter_indices = given["group"]
begin = time.perf_counter()
basis = (FFBBasis2D if given["basis"] == "ffb" else FLEBasis2D)((size, size), dtype=np.float32)
denoised = DenoiserCov2D(source, basis, float(given["variance"])).denoise[:].asnumpy()
seconds = time.perf_counter() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
np.savez(sys.argv[2], images=denoised, seconds=seconds, peak=peak)
