"""Two X-ray PNGs of this project -> CT as NIfTI, without PyTorch: pip install numpy pillow onnxruntime nibabel

python onnx_inference.py model.onnx PA.png LATERAL.png ct.nii.gz
"""

import json
import sys

import nibabel as nib
import numpy as np
import onnxruntime
from PIL import Image

if len(sys.argv) != 5:
    sys.exit("usage: python onnx_inference.py model.onnx PA.png LATERAL.png ct.nii.gz")
path, pa, lateral, output = sys.argv[1:]
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
about = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
pictures = [Image.open(name) for name in (pa, lateral)]
for p in pictures:
    plain = p.format == "PNG" and p.mode in ("L", "I;16") and p.width == p.height and not p.is_animated
    if not plain or p.has_transparency_data or p.getexif().get(274, 1) != 1:  # EXIF orientation
        sys.exit(f"{p.filename}: expected a square grey PNG of 8 or 16 bit, upright and opaque, bone bright")
pixels = [np.asarray(p) for p in pictures]
images = [Image.fromarray((p / np.iinfo(p.dtype).max).astype(np.float32)) for p in pixels]
xrays = np.stack([image.resize((about["xray_size"],) * 2, Image.Resampling.BOX) for image in images])[None]
low, high = about["hu_window"]
hu = session.run(["volume"], {"xrays": xrays})[0][0, 0] * (high - low) + low  # (D, H, W)
nib.save(nib.Nifti1Image(np.rint(hu).astype(np.int16).transpose(2, 1, 0), np.array(about["affine"])), output)
