"""VM entries of many near-valid VMCSs, on this model and on another one, compared.

`states` generates them, `scene` has the valid VMCSs they come from and the memory these point to, `on_vtx` and
`on_bochs` run them as what the bundled guest ``entries`` is given, and `compare` sorts what came out.
"""
