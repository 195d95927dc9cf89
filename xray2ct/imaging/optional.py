"""Optional packages, imported where they are used: the package, or an error that says how to install it."""

from __future__ import annotations

from xray2ct.files import InputError


def import_pydicom(path, purpose: str = "reading DICOM"):
    """pydicom 3 or later; else InputError naming ``path``, the ``purpose`` and the command that installs it."""
    try:
        import pydicom
    except ImportError:
        raise InputError(f"{path}: {purpose} needs pydicom; run: pip install 'pydicom>=3'") from None
    if int(pydicom.__version__.partition(".")[0]) < 3:
        raise InputError(f"{path}: {purpose} needs pydicom 3, found {pydicom.__version__}; run: pip install -U pydicom")
    return pydicom


def import_sitk(path, purpose: str = "reading NRRD and MetaImage"):
    """SimpleITK without its warnings on the console; else InputError as :func:`import_pydicom`."""
    try:
        import SimpleITK  # slow to import
    except ImportError:
        raise InputError(f"{path}: {purpose} needs SimpleITK; run: pip install SimpleITK") from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK
