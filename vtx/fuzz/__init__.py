"""Near-valid control structures by the thousand, on this model and on another one, compared.

`entries` is about VMCSs and VM entry, `vmruns` about VMCBs and VMRUN: each has the valid structures that states come
from and the memory these point to, what is drawn, how a result is read, and the known differences. The rest is common
to both: drawing, the exchange with the bundled guest that runs the states, the emulators, and sorting what came out.
"""
