"""Boot: put an image into a machine's memory and its processor into the state the image's format promises.

There is no firmware: `vtx.boot.loaders.load` does what firmware and boot loader would have done together.
"""
