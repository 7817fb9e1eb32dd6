"""VMRUN of near-valid VMCBs: run by the bundled guest ``vmruns``, here, on Bochs and on QEMU."""
