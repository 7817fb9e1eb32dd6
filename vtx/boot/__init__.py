"""Boot: put an image into a machine's memory and its processor into the state the image's format promises.

There is no firmware: `load` does what firmware and boot loader would have done together.
"""

from vtx.boot.image import BootError, BootOptions, ImageFormat, LoadedImage, Module
from vtx.boot.loaders import load

__all__ = ["BootError", "BootOptions", "ImageFormat", "LoadedImage", "Module", "load"]
