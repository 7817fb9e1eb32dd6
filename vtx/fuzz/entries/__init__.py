"""VM entries of near-valid VMCSs: run by the bundled guest ``entries``, here and on Bochs."""
