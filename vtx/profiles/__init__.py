"""CPU profiles as data: one TOML file per processor, read by `vtx.x86.profile`."""
