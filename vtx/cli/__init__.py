"""The command line: ``vtx run``, ``vtx guests``, ``vtx profiles``, ``vtx bench``."""
